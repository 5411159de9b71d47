"""Run timm's own tests on this plugin: those of its training script on ours, those of its layers,
tasks, savers, optimizers, schedules and models on models patched by ResidualDropPath.

    python benchmarks/timm_suite.py [--only test_task.py ...] [--workers 2]

The tests are those in the source package of the timm that is installed, which pip downloads.
Prints a table of what passed, and each exception with its reason; exits with 1 for any other
failure. Models of more than 10 million parameters are left out.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
import types
import xml.etree.ElementTree as ElementTree
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

LARGEST = 10_000_000  # parameters
DROP_PATH = 0.2
# Files of timm's tests, and which of their tests (pytest's -k).
SCRIPT = {"test_train_resume.py": "", "test_multilabel.py": "train_cli or multilabel_train"}
PATCHED = {
    "test_layers_drop.py": "",
    "test_task.py": "",
    "test_checkpoint_saver.py": "",
    "test_optim.py": "",
    "test_scheduler.py": "",
    # Those of pretrained weights would download them.
    "test_models.py": "(test_model_forward or test_model_backward or features) and not pretrained",
}
# Tests whose outcome differs, and why a user would want ours.
EXCEPTIONS = {
    "test_load_config_warns_on_unknown_key": "a key that is no flag is an error, not a warning: a "
    "mistyped flag of a recipe would train something else for days",
    **dict.fromkeys(
        (
            "test_model_forward_torchscript",
            "test_model_forward_fx_torchscript",
            "test_pruned_features_torchscript",
            "test_feature_getter_stage_ends_torchscript",
        ),
        "masks and flags cannot change within a scripted module: refused in one line, which says "
        "to detach() first",
    ),
    "test_multilabel_train_and_validate_cli": "needs timm's validate.py, which is not in its "
    "source package",
}


class Refused(SystemExit, ValueError):
    """What timm's script raises where ours prints one line: argparse's exit, or an error."""


def script_module() -> types.ModuleType:
    """A module `train` with the names of timm's script, which lead to ours."""
    import timm

    from timm_rdp.errors import UsageError
    from timm_rdp.training import setup, train
    from timm_rdp.training.flags import build_parser
    from timm_rdp.training.options import args_text, parse_args

    module = types.ModuleType("train")

    @contextmanager
    def refusals():
        def create_model(*args, **kwargs):
            return module.create_model(*args, **kwargs)

        original = timm.create_model
        timm.create_model = create_model
        try:
            yield
        except (UsageError, ValueError, OSError) as error:
            raise Refused(str(error)) from error
        finally:
            timm.create_model = original

    def report(error):
        raise Refused(str(error))

    def main():
        train.report = report
        with refusals():
            train.main(sys.argv[1:])

    def parsed():
        with refusals():
            args = parse_args(sys.argv[1:])
            setup.create_loss(args)
            return args, args_text(args)

    module.main, module._parse_args = main, parsed
    module.create_model, module.parser = timm.create_model, build_parser()
    return module


def is_large(model_name: str) -> bool:
    """Whether a model has more than LARGEST parameters."""
    import timm
    import torch

    try:
        with torch.device("meta"):
            model = timm.create_model(model_name)
    except (NotImplementedError, RuntimeError):  # one that cannot be made on meta
        return False
    return sum(p.numel() for p in model.parameters()) > LARGEST


def large_models(workers: int) -> list[str]:
    """The names of timm's models that are large."""
    import timm

    names = timm.list_models()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        large = pool.map(is_large, names, chunksize=8)
    return [name for name, is_one in zip(names, large, strict=True) if is_one]


controllers = []  # kept, since a patched model belongs to one that lives
patched = Counter()


def patch_models() -> None:
    """Have `timm.create_model` return models that are patched, where they have paths."""
    import pytest
    import timm

    from timm_rdp import ResidualDropPath

    original, large = timm.create_model, set(os.environ["TIMM_SUITE_LARGE"].split())

    def create_model(model_name, *args, **kwargs):
        if model_name.partition(".")[0] in large:
            pytest.skip(f"more than {LARGEST:,} parameters")
        try:
            rate = {} if "drop_path_rate" in kwargs else {"drop_path_rate": DROP_PATH}
            model = original(model_name, *args, **kwargs, **rate)
        except TypeError:  # which a model without the option raises
            model = original(model_name, *args, **kwargs)
        try:
            controllers.append(ResidualDropPath(model))
            patched[True] += 1
        except ValueError:  # no path to drop
            patched[False] += 1
        del controllers[:-8]
        return model

    timm.create_model = timm.models.create_model = create_model


def pytest_configure(config) -> None:
    if os.environ["TIMM_SUITE"] == "script":
        sys.modules["train"] = script_module()
    else:
        patch_models()


def download(folder: Path) -> Path:
    """Fetch the source package of the installed timm, and return the folder of its tests."""
    import timm

    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", "timm", f"timm=={timm.__version__}", "--dest", str(folder)]
    subprocess.run(command, check=True)
    (archive,) = folder.glob("timm-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz") / "tests"


def run(
    tests: Path, file: str, selection: str, kind: str, workers: int, large: list[str]
) -> list[tuple[str, str]]:
    """Run one file of timm's tests; the name and outcome of each."""
    report = tests / f"{file}.xml"
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "timm_suite", "-n", str(workers)]
    command += ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tests)]
    command += ["-W", "ignore", "--tb=short", f"--junitxml={report}", str(tests / file)]
    if selection:
        command += ["-k", selection]
    environment = {**os.environ, "TIMM_SUITE": kind, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    environment["TIMM_SUITE_LARGE"] = " ".join(large)
    subprocess.run(command, env=environment, cwd=tests, check=False)
    outcomes = []
    for case in ElementTree.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        outcome = next((t for t in ("failure", "error", "skipped") if t in tags), "passed")
        outcomes.append((case.get("name", ""), outcome))
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description="Run timm's own tests on this plugin.")
    parser.add_argument("--only", nargs="+", metavar="FILE", help="of timm's tests (default: all)")
    parser.add_argument(
        "--workers", type=int, default=2, metavar="N", help="processes (default: 2)"
    )
    args = parser.parse_args()
    lines, unexplained = [], []
    with tempfile.TemporaryDirectory() as folder:
        tests = download(Path(folder))
        for kind, files in (("script", SCRIPT), ("patched", PATCHED)):
            for file, selection in files.items():
                if args.only and file not in args.only:
                    continue
                large = large_models(args.workers) if file == "test_models.py" else []
                outcomes = run(tests, file, selection, kind, args.workers, large)
                counts = Counter(outcome for _, outcome in outcomes)
                lines.append(f"| {file} | {kind} | {counts['passed']} | {counts['skipped']} | ")
                failed = [n for n, o in outcomes if o in ("failure", "error")]
                explained = [n for n in failed if n.partition("[")[0] in EXCEPTIONS]
                unexplained += [f"{file}::{n}" for n in failed if n not in explained]
                lines[-1] += f"{len(explained)} | {len(failed) - len(explained)} |"
    print("\n| file | run on | passed | skipped | exceptions | failed |\n|---|---|---|---|---|---|")
    print("\n".join(lines))
    print("\nExceptions:")
    for name, reason in EXCEPTIONS.items():
        print(f"- {name}: {reason}")
    for name in unexplained:
        print(f"FAILED {name}")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
