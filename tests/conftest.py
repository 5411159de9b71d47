"""What tests share: a handful of real images, and the check that bad input is refused well."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

TRAIN_PER_CLASS = 8
VAL_PER_CLASS = 4
LABELS = ("odd", "large", "prime", "triple")

# The tests share the cores among processes, and their models are tiny. The number of threads can
# change the last bit, so the processes that tests start have as many.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="where the tests marked gpu run (default: a GPU)")


@pytest.fixture
def device(request) -> torch.device:
    """Where the tests marked gpu run."""
    return torch.device(request.config.getoption("--device") or "cuda")


@pytest.fixture(scope="session", autouse=True)
def demo_cache(tmp_path_factory) -> Path:
    """The demo's images go to a folder of this test run, never to the home folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIMM_RDP_CACHE", str(folder))
        yield folder


@pytest.fixture
def fresh_compiler():
    """Nothing is compiled yet, and what the test compiles does not outlive it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # No processes that outlive the test, no results of an earlier run.
    with torch._inductor.config.patch(compile_threads=1, fx_graph_cache=False):
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory) -> Path:
    """80 training and 40 validation images of scikit-learn's digits, as an image folder.

    Read it, do not change it: all tests share it.
    """
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, range(10))
    return folder


def write_digits(folder: Path, classes, train=TRAIN_PER_CLASS, val=VAL_PER_CLASS) -> None:
    """Write `train` and `val` images of each class as folder/{train,validation}/CLASS/*.png."""
    digits = load_digits()
    for digit in classes:
        for place, index in enumerate(np.flatnonzero(digits.target == digit)[: train + val]):
            target = folder / ("train" if place < train else "validation") / str(digit)
            target.mkdir(parents=True, exist_ok=True)
            grey = (digits.images[index] * (255 / 16)).round().astype("uint8")
            Image.fromarray(grey).save(target / f"{index:04d}.png")


@pytest.fixture(scope="session")
def labels(digits_folder, tmp_path_factory):
    """The digits as a Hugging Face data set, and the flags that read it."""
    import datasets

    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("labels")
    for split in ("train", "validation"):
        data = {name: [] for name in ("image", "labels", "vector", *LABELS)}
        for path in sorted((digits_folder / split).rglob("*.png")):
            digit = int(path.parent.name)
            holds = [digit % 2 == 1, digit > 4, digit in (2, 3, 5, 7), digit % 3 == 0]
            data["image"].append({"bytes": path.read_bytes(), "path": path.name})
            data["labels"].append([i for i, hold in enumerate(holds) if hold])
            data["vector"].append([float(hold) for hold in holds])
            for name, hold in zip(LABELS, holds, strict=True):
                data[name].append(hold)
        table = datasets.Dataset.from_dict(data).cast_column("image", datasets.Image())
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return (
        f"--task multilabel --dataset hfds/{folder} --num-classes 4 --target-key labels "
        f"--data-dir {folder / 'cache'}"
    ).split()


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """Run the training command and return the one line with which it refuses its input.

    Asserts on the way that the exit status is 2, that there is no second line and no traceback,
    and that neither the working folder nor the output folder has been written to.
    """

    def run(*argv: object) -> str:
        from timm_rdp.training.train import main

        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        monkeypatch.chdir(work)
        argv = [str(arg) for arg in argv]
        if "--output" not in argv:
            argv += ["--output", str(work / "out")]
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        capsys.readouterr()
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.endswith("\n") and len(err.splitlines()) == 1, err
        assert "Traceback" not in err
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        return err

    return run


@pytest.fixture
def fault(record_property) -> Callable[..., None]:
    """To be called at the end of a test: the fault that it survived, and how often."""

    def survived(name: str, times: int = 1) -> None:
        record_property("fault", (name, times))

    return survived


def pytest_terminal_summary(terminalreporter) -> None:
    """A table of the faults that were injected and survived."""
    survived: dict[str, int] = {}
    for report in terminalreporter.stats.get("passed", []):
        for key, value in report.user_properties:
            if key == "fault":
                survived[value[0]] = survived.get(value[0], 0) + value[1]
    lost = [r.nodeid for r in terminalreporter.stats.get("failed", []) if "test_faults" in r.nodeid]
    if not survived and not lost:
        return
    terminalreporter.section("faults injected and survived")
    for name, times in sorted(survived.items()):
        terminalreporter.write_line(f"{times:>5}  {name}")
    terminalreporter.write_line(f"{sum(survived.values()):>5}  in all, {len(lost)} lost")
