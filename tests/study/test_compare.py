"""`timm-rdp compare`: what it runs, what it makes of the results, and what it refuses."""

import csv
import itertools
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import scipy.stats
import timm
import torch
import yaml
from PIL import Image
from timm.layers import DropPath
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from timm_rdp import ResidualDropPath
from timm_rdp.study import figures
from timm_rdp.study.compare import cost as compare_cost
from timm_rdp.study.compare import grid as compare_grid
from timm_rdp.study.compare import main as compare
from timm_rdp.study.compare import measured as compare_measured
from timm_rdp.study.compare import report as compare_report
from timm_rdp.study.compare import runs as compare_runs
from timm_rdp.study.compare.cost import flop_counter
from timm_rdp.study.compare.results import holm, mean_of, paired_p
from timm_rdp.study.compare.runs import Cell
from timm_rdp.training import train

# Saves every batch of the last epoch as an image.
SEEN = ("--save-images", "--log-interval", "1")
OUTPUTS = ("comparison.png", "runs.csv", "table.csv", "table.md")


def recipe(data: Path) -> list[str]:
    """Two epochs of five updates of 16 digits each."""
    return (
        f"--data-dir {data} --num-classes 10 --model test_vit --img-size 32 -j 0 -b 16 --epochs 2 "
        "--warmup-epochs 0 --lr 1e-3 --opt adamw --device cpu"
    ).split()


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def state(folder: Path) -> dict[Path, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture(scope="module")
def grid(tmp_path_factory, digits_folder) -> Path:
    """A comparison of two real runs: droppath and rdp."""
    output = tmp_path_factory.mktemp("grid") / "out"
    command = [*recipe(digits_folder), "--output", str(output), "--drop-paths", "0.5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_cost, "FLOP_CYCLES", 3)
        assert compare.main([*command, "--seeds", "1", "--jobs", "2", *SEEN]) == 0
    return output


# Stands in for the training command where it does not matter what is learnt: writes what a run
# leaves behind, after what is planned for it, and notes how it was called.
STUB = """
import json, os, pathlib, signal, sys, time
argv = sys.argv[1:]
value = lambda flag: argv[len(argv) - argv[::-1].index(flag)]
name, seed = value("--experiment"), int(value("--seed"))
folder = pathlib.Path(value("--output"), name)
with open(os.environ["CALLS"], "a") as file:
    print(json.dumps([name, argv, os.environ.get("OMP_NUM_THREADS")]), file=file)
plan = json.loads(os.environ["PLAN"]).get(name, {})
if "error" in plan:
    print("a log line\\nerror: " + plan["error"], file=sys.stderr)
    sys.exit(plan["status"])
folder.mkdir(exist_ok=True)
(folder / "args.yaml").touch()
if "wait" in plan:
    def stop(number, _):
        (folder / "stopped").write_text(str(number))
        sys.exit(128 + number)
    signal.signal(signal.SIGINT, stop), signal.signal(signal.SIGTERM, stop)
    print("waiting", flush=True)
    time.sleep(30)
time.sleep(plan.get("seconds", 0))
epochs = int(value("--epochs")) if "--epochs" in argv else 2
lines = ["epoch,train_loss,eval_loss,eval_top1"]
for epoch in range(epochs):
    top1 = plan.get("top1", [60 + seed, 50 + seed] if epoch == 0 else [50 + seed])[0]
    lines.append(f"{epoch},1.5,2.5,{top1}")
(folder / "summary.csv").write_text("\\n".join(lines))
"""


class Stubbed:
    """Runs compare with the stub in place of training.

    Args:
        folder: where its output folder and the notes of the stub go.
        data: the image folder.
        patch: undone by whoever made it.
    """

    def __init__(self, folder: Path, data: Path, patch: pytest.MonkeyPatch):
        self.output, self._calls = folder / "out", folder / "calls.txt"
        self._data, self._patch = data, patch
        original = compare_runs.training_command
        as_stub = lambda *a: [sys.executable, "-c", STUB, *original(*a)[4:]]
        patch.setattr(compare_runs, "training_command", as_stub)
        patch.setattr(compare_cost, "FLOP_CYCLES", 1)
        patch.setattr(compare_runs, "_POLL", 0.02)
        patch.setenv("CALLS", str(self._calls))

    def __call__(self, *argv: object, plan: dict | None = None) -> int:
        """The exit status; `plan` says by name what becomes of a run."""
        self._patch.setenv("PLAN", json.dumps(plan or {}))
        self._calls.write_text("")
        command = [*recipe(self._data), "--output", str(self.output), *map(str, argv)]
        return compare.main(command)

    def calls(self) -> list[list]:
        """Name, arguments and OMP_NUM_THREADS of every run of the last call."""
        return [json.loads(line) for line in self._calls.read_text().splitlines()]


@pytest.fixture
def stubbed(tmp_path, monkeypatch, digits_folder) -> Stubbed:
    return Stubbed(tmp_path, digits_folder, monkeypatch)


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory, digits_folder) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        stubbed = Stubbed(tmp_path_factory.mktemp("finished"), digits_folder, patch)
        assert stubbed("--seeds", 1) == 0
    return stubbed.output


@pytest.fixture
def finished(finished_once, stubbed, capsys) -> Stubbed:
    """The same, with a finished comparison of one seed in its output folder."""
    shutil.copytree(finished_once, stubbed.output)
    capsys.readouterr()
    return stubbed


# What is run


@pytest.mark.xdist_group("grid")
def test_each_run_is_the_run_that_its_command_line_gives_by_itself(grid, digits_folder, tmp_path):
    for variant, more in (("droppath", []), ("rdp", ["--rdp"])):
        command = [*recipe(digits_folder), "--seed", "0", "--data-seed", "0", "--drop-path", "0.5"]
        command += ["--output", str(tmp_path), "--experiment", variant, *more]
        assert train.main(command) == 0
        own = read(tmp_path / variant / "summary.csv")
        assert own == read(grid / "runs" / f"{variant}-0.5-seed0" / "summary.csv")
        args = yaml.safe_load((tmp_path / variant / "args.yaml").read_text())
        other = yaml.safe_load((grid / "runs" / f"{variant}-0.5-seed0" / "args.yaml").read_text())
        different = {name for name in args if args[name] != other[name]}
        assert different <= {"output", "experiment", "resume", *compare_grid.FREE}


@pytest.mark.xdist_group("grid")
def test_variants_of_a_seed_train_on_the_same_images_in_the_same_order(
    grid, digits_folder, tmp_path
):
    def seen(folder: Path) -> list[bytes]:
        files = sorted(folder.glob("train-batch-*.jpg"))
        assert len(files) == 5
        return [file.read_bytes() for file in files]

    first, second = (seen(grid / "runs" / f"{v}-0.5-seed0") for v in ("droppath", "rdp"))
    assert first == second
    other = [*recipe(digits_folder), "--seed", "1", "--data-seed", "1", "--output", str(tmp_path)]
    assert train.main([*other, "--experiment", "run", *SEEN]) == 0
    assert not set(seen(tmp_path / "run")) & set(first)


def test_variants_differ_in_their_drop_path_alone(stubbed):
    assert stubbed("--variants", *compare_runs.VARIANTS, "--seeds", 1, "--rdp-every", 3) == 0
    flags = {}
    for name, argv, _ in stubbed.calls():
        assert argv[argv.index("--seed") + 1] == argv[argv.index("--data-seed") + 1] == "0"
        common = ["-c", "--output", "--experiment", "--resume", "--seed", "--data-seed"]
        for flag in common:
            del argv[argv.index(flag) : argv.index(flag) + 2]
        flags[name] = " ".join(argv)
    matched = flags.pop("droppath-matched-0.1-seed0")
    assert matched.startswith("--drop-path 0.1 --epochs ")
    rdp = "--rdp --rdp-every 3 --rdp-start-epoch 0"
    assert flags == {
        "plain-seed0": "--drop-path 0.0",
        "droppath-0.1-seed0": "--drop-path 0.1",
        "droppath-batch-0.1-seed0": "--drop-path 0.1 --rdp --rdp-every 1000000000",
        "rdp-0.1-seed0": f"--drop-path 0.1 {rdp}",
        "rdp-next-0.1-seed0": f"--drop-path 0.1 {rdp} --rdp-batch next",
        "rdp-random-0.1-seed0": f"--drop-path 0.1 {rdp} --rdp-second random",
        "rdp-unfrozen-0.1-seed0": f"--drop-path 0.1 {rdp} --rdp-second all",
        "droppath-early-0.1-seed0": "--drop-path 0.1 --drop-path-schedule early",
        "droppath-late-0.1-seed0": "--drop-path 0.1 --drop-path-schedule late",
    }


def test_plain_has_no_drop_path_even_where_the_model_has_one_by_default(digits_folder, tmp_path):
    assert any(
        isinstance(m, DropPath) for m in timm.create_model("swin_tiny_patch4_window7_224").modules()
    )
    options, _ = compare_grid.read_recipe(recipe(digits_folder), ["plain"])
    flags = compare_runs.training_of(Cell("plain", None, 0), tmp_path, options, {}).flags
    rate = float(flags[flags.index("--drop-path") + 1])
    model = timm.create_model("swin_tiny_patch4_window7_224", drop_path_rate=rate)
    assert not any(isinstance(m, DropPath) for m in model.modules())


def test_a_config_gives_the_drop_rate_and_cannot_turn_rdp_on_for_all(stubbed, tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text("rdp: true\nrdp_batch: next\ndrop_path: 0.25\nseed: 7\nsmoothing: 0.2\n")
    assert stubbed("-c", config, "--variants", "droppath", "rdp", "--seeds", 1) == 0
    calls = {name: argv for name, argv, _ in stubbed.calls()}
    assert set(calls) == {"droppath-0.25-seed0", "rdp-0.25-seed0"}
    assert "--rdp-batch" not in calls["rdp-0.25-seed0"]
    shared = yaml.safe_load((stubbed.output / "recipe.yaml").read_text())
    assert shared["smoothing"] == 0.2
    assert not {"rdp", "rdp_batch", "drop_path", "seed", "data_seed"} & shared.keys()


@pytest.mark.xdist_group("grid")
def test_finished_runs_are_skipped_and_nothing_of_theirs_is_touched(grid, digits_folder):
    runs, everything = state(grid / "runs"), {p: text for p, (_, text) in state(grid).items()}
    command = [*recipe(digits_folder), "--output", str(grid), "--drop-paths", "0.5"]
    assert compare.main([*command, "--seeds", "1", *SEEN]) == 0
    assert state(grid / "runs") == runs
    assert {p: text for p, (_, text) in state(grid).items()} == everything


def test_a_grid_can_be_extended_by_seeds_variants_and_rates(finished):
    more = ("--seeds", 2, "--variants", "plain", "droppath", "--drop-paths", 0.1, 0.3)
    assert finished(*more) == 0
    names = [name for name, *_ in finished.calls()]
    assert names == [
        "plain-seed0", "droppath-0.3-seed0",
        "plain-seed1", "droppath-0.1-seed1", "droppath-0.3-seed1",
    ]  # fmt: skip
    table = read(finished.output / "table.csv")
    found = {(row["drop_path"], row["variant"]): row["seeds"] for row in table}
    assert found == {
        ("0.1", "plain"): "2", ("0.1", "droppath"): "2", ("0.1", "rdp"): "1",
        ("0.3", "plain"): "2", ("0.3", "droppath"): "2",
    }  # fmt: skip


def test_failed_runs_are_told_and_run_again_on_request_alone(stubbed, capsys):
    plan = {"rdp-0.1-seed0": {"error": "--data-dir is gone", "status": 2}}
    assert stubbed("--seeds", 1, plan=plan) == 1
    out, err = capsys.readouterr()
    assert "1 of 2 runs failed" in err and "rdp-0.1-seed0.log" in err and "--retry" in err
    assert "rdp at 0.1: 1 failed" in out
    (row,) = [r for r in read(stubbed.output / "runs.csv") if r["variant"] == "rdp"]
    assert row["status"] == "failed" and row["error"] == "error: --data-dir is gone"
    assert stubbed("--seeds", 1) == 1 and stubbed.calls() == []
    assert stubbed("--seeds", 1, "--retry") == 0
    assert [name for name, *_ in stubbed.calls()] == ["rdp-0.1-seed0"]
    assert {r["status"] for r in read(stubbed.output / "runs.csv")} == {"done"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_runs_with_the_same_one_and_the_next_call_resumes(
    stubbed, number, capsys
):
    log = stubbed.output / "runs" / "rdp-0.1-seed0.log"

    def send():
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not (log.exists() and "waiting" in log.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    before = signal.getsignal(number)
    status = stubbed("--seeds", 2, plan={"rdp-0.1-seed0": {"wait": 1}})
    sender.join()
    out, err = capsys.readouterr()
    assert signal.getsignal(number) is before
    assert status == 128 + number and "the same command goes on" in err
    assert (log.parent / "rdp-0.1-seed0" / "stopped").read_text() == str(int(number))
    assert [name for name, *_ in stubbed.calls()] == ["droppath-0.1-seed0", "rdp-0.1-seed0"]
    # What there is was reported, and what there is not.
    assert "droppath at 0.1: 1 unfinished; rdp at 0.1: 2 unfinished" in out
    statuses = {r["variant"] + r["seed"]: r["status"] for r in read(stubbed.output / "runs.csv")}
    assert statuses["rdp0"] == "interrupted" and statuses["rdp1"] == "not begun"
    assert stubbed("--seeds", 2) == 0
    names = [name for name, *_ in stubbed.calls()]
    assert names == ["rdp-0.1-seed0", "droppath-0.1-seed1", "rdp-0.1-seed1"]
    assert all(argv[argv.index("--resume") + 1] == "auto" for _, argv, _ in stubbed.calls())
    seconds = {r["variant"] + r["seed"]: r["seconds"] for r in read(stubbed.output / "runs.csv")}
    assert seconds["rdp0"] == "" and seconds["rdp1"] != ""  # part of it was not measured


def test_a_run_that_ends_early_without_an_error_is_not_taken_for_done(stubbed):
    assert stubbed("--variants", "droppath", "--seeds", 1) == 0
    record = stubbed.output / "runs" / "droppath-0.1-seed0.json"
    summary = stubbed.output / "runs" / "droppath-0.1-seed0" / "summary.csv"
    assert json.loads(record.read_text())["status"] == "done"
    record.unlink()
    summary.write_text("\n".join(summary.read_text().splitlines()[:2]))
    assert compare.main(["--report", str(stubbed.output)]) == 0
    (row,) = read(stubbed.output / "runs.csv")
    assert (row["status"], row["epochs"], row["top1"]) == ("interrupted", "1", "")


def test_runs_end_at_the_stop_epoch(stubbed):
    more = ("--variants", "droppath", "--seeds", 1, "--epochs", 3, "--stop-epoch", 2)
    assert stubbed(*more) == 0
    (row,) = read(stubbed.output / "runs.csv")
    assert (row["status"], row["epochs"]) == ("done", "2")


def test_jobs_run_side_by_side_and_share_the_cores(stubbed, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    plan = {f"{v}-0.1-seed{s}": {"seconds": 1} for v in ("rdp", "droppath") for s in (0, 1)}
    start = time.monotonic()
    assert stubbed("--seeds", 2, "--jobs", 4, plan=plan) == 0
    whole = time.monotonic() - start
    assert {threads for *_, threads in stubbed.calls()} == {"2"}
    assert {row["status"] for row in read(stubbed.output / "runs.csv")} == {"done"}
    begun = [p.stat().st_mtime for p in stubbed.output.glob("runs/*/args.yaml")]
    ended = [p.stat().st_mtime for p in stubbed.output.glob("runs/*/summary.csv")]
    assert max(begun) < min(ended), whole


def test_jobs_on_cuda_take_turns_over_the_gpus_that_are_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    environments = compare_runs.slot_environments(3, "cuda")
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["2", "5", "2"]
    (alone,) = compare_runs.slot_environments(1, "cuda")
    assert alone["CUDA_VISIBLE_DEVICES"] == "2,5"


def test_two_comparisons_do_not_work_in_one_folder(finished, capsys):
    with compare.locked(finished.output):
        assert finished("--seeds", 2) == 2
    assert "another comparison is at work there" in capsys.readouterr().err
    assert finished.calls() == []


# droppath-matched, and what runs cost


def spent(rate: float, cycles: int) -> tuple[float, float, float, float]:
    """FLOPs of real passes of 16 images: of a plain update, and of the mean iteration of each phase
    in seed 0's first cycles; and the share of cycles in which something is dropped."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=10, drop_path_rate=rate).train()
    images = torch.randn(16, 3, 32, 32)

    def flops() -> int:
        # Not every version of torch counts the fused attention of CPUs.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(images).sum().backward()
        model.zero_grad()
        return counter.get_total_flops()

    update = flops()
    rdp = ResidualDropPath(model)
    phases = {"droppath": [], "complement": []}
    for _ in range(cycles):
        for it in rdp.cycle():
            with it:
                phases[it.phase].append(flops())
    droppath, complement = (sum(own) / len(own) for own in phases.values())
    # Two paths in each of six blocks, whose rates rise linearly.
    none = math.prod((1 - rate * i / 5) ** 2 for i in range(6))
    return update, droppath, complement, 1 - none


@pytest.mark.parametrize(
    "every, start", [(1, 0), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((2, 0), (1, 4)))]
)
def test_matched_epochs_cost_the_flops_that_rdp_costs(
    stubbed, digits_folder, every, start, monkeypatch
):
    epochs, cycles = 40, 6
    monkeypatch.setattr(compare_cost, "FLOP_CYCLES", cycles)
    more = f"--epochs {epochs} --rdp-every {every} --rdp-start-epoch {start}".split()
    options, _ = compare_grid.read_recipe([*recipe(digits_folder), *more], ["rdp"])
    grid = compare_grid.same_grid(stubbed.output, options)
    variants = ["rdp", "droppath", "droppath-matched"]
    compare_grid.check_runs(options, variants, [0.3], grid)
    update, droppath, complement, share = spent(0.3, cycles)
    per_cycle = droppath + share * complement / every
    expected = round(start + (epochs - start) * per_cycle / update)
    assert grid["matched_epochs"]["0.3"] == expected > epochs


def test_matched_epochs_once_settled_hold_for_later_seeds(stubbed):
    variants = ("--variants", "droppath-matched", "rdp", "--drop-paths", 0.5)
    assert stubbed(*variants, "--seeds", 1) == 0
    path = stubbed.output / "grid.json"
    grid = json.loads(path.read_text())
    assert grid["matched_epochs"]["0.5"] > 2
    path.write_text(json.dumps({**grid, "matched_epochs": {"0.5": 9}}))
    assert stubbed(*variants, "--seeds", 2) == 0
    (matched,) = [argv for name, argv, _ in stubbed.calls() if "matched" in name]
    assert matched[matched.index("--epochs") + 1] == "9"


def test_warmup_before_and_cooldown_after_the_schedule_count_as_epochs(digits_folder):
    more = ["--epochs", "10", "--warmup-epochs", "4", "--warmup-prefix", "--cooldown-epochs", "6"]
    options, _ = compare_grid.read_recipe([*recipe(digits_folder), *more], ["rdp"])
    assert compare_cost.total_epochs(options, 10) == 20
    assert compare_cost.matched_epochs(options, 1.5) == 20  # 30 epochs in all
    assert compare_cost.matched_epochs(options, 0.8) == 10


def test_flops_are_those_of_real_passes_over_the_same_masks(stubbed, monkeypatch, digits_folder):
    cycles = 6
    monkeypatch.setattr(compare_cost, "FLOP_CYCLES", cycles)
    options, _ = compare_grid.read_recipe(recipe(digits_folder), ["rdp"])
    grid = compare_grid.same_grid(stubbed.output, options)
    variants = ["plain", "droppath", "rdp"]
    compare_grid.check_runs(options, variants, [0.4], grid)
    assert compare_grid.flops_of_epochs(grid, "rdp-random", 0.4, 3) is None
    compare_grid.check_runs(options, [*variants, "rdp-random"], [0.4], grid)
    update, droppath, complement, share = spent(0.4, cycles)
    both = droppath + share * complement
    expected = {  # of 3 epochs of 5 batches
        "plain": 15 * update,
        "droppath": 15 * update,
        "droppath-batch": 15 * droppath,
        "rdp": 15 * both,
        "rdp-next": 15 * both / (1 + share),
        "rdp-unfrozen": 15 * (droppath + share * update),
        "droppath-late": 15 * update,
    }
    for variant, value in expected.items():
        rate = None if variant == "plain" else 0.4
        counted = compare_grid.flops_of_epochs(grid, variant, rate, 3)
        assert counted == pytest.approx(value, rel=0.01), variant
    random = compare_grid.flops_of_epochs(grid, "rdp-random", 0.4, 3)
    assert 15 * droppath < random < 15 * (droppath + share * update)
    grid["options"]["rdp_start_epoch"] = 2
    late = compare_grid.flops_of_epochs(grid, "rdp", 0.4, 3)
    assert late == pytest.approx(10 * update + 5 * both, rel=0.01)


def counted(module: nn.Module, x: torch.Tensor) -> int:
    with flop_counter() as counter:
        module(x).sum().backward()
    return counter.get_total_flops()


class Apart(nn.Module):
    """A grouped convolution as so many convolutions of a group each."""

    def __init__(self, kind: type[nn.Module], channels: int, groups: int, **kwargs):
        super().__init__()
        share = channels // groups
        self.convs = nn.ModuleList([kind(share, 2 * share, **kwargs) for _ in range(groups)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.chunk(len(self.convs), 1)
        return torch.cat([conv(part) for conv, part in zip(self.convs, parts, strict=True)], 1)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("frozen", [None, "weight", "input"])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_a_grouped_convolution_costs_what_its_groups_cost(kind, frozen, groups):
    kwargs = dict(kernel_size=3, stride=2, padding=1)
    counts = []
    for module in (kind(8, 16, groups=groups, **kwargs), Apart(kind, 8, groups, **kwargs)):
        for parameter in module.parameters():
            parameter.requires_grad_(frozen != "weight")
        counts.append(counted(module, torch.randn(2, 8, 9, 7, requires_grad=frozen != "input")))
    outputs = 2 * 9 * 7 if kind is nn.ConvTranspose2d else 2 * 5 * 4
    passes = 3 if frozen is None else 2
    assert counts == [passes * 2 * outputs * 9 * 8 * 16 // groups] * 2


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_model_without_groups_costs_what_torch_counts(name):
    model = timm.create_model(name, num_classes=10).to("meta")
    images = torch.empty(2, *model.default_cfg["input_size"], device="meta")
    with FlopCounterMode(display=False) as torchs:
        model(images).sum().backward()
    assert counted(model, images) == torchs.get_total_flops()


@pytest.mark.parametrize("name", ["convnext_atto", "efficientnet_b0", "mobilenetv3_small_100"])
def test_a_depthwise_models_backward_costs_twice_its_forward(name):
    model = timm.create_model(name).to("meta")
    images = torch.empty(2, *model.default_cfg["input_size"], device="meta", requires_grad=True)
    with flop_counter() as forward:
        model(images)
    assert counted(model, images) == pytest.approx(3 * forward.get_total_flops(), rel=0.01)


def test_a_model_whose_operations_cannot_be_counted_is_compared_without(
    stubbed, monkeypatch, capsys
):
    def fails(*_):
        raise RuntimeError("a value was asked of a meta tensor")

    monkeypatch.setattr(compare_cost, "_flops", fails)
    assert stubbed("--seeds", 1, "--variants", "rdp", "droppath", "droppath-matched") == 2
    assert "--variants droppath-matched" in capsys.readouterr().err
    assert not stubbed.output.exists()
    assert stubbed("--seeds", 1, "--variants", "rdp", "droppath") == 0
    assert {row["flops"] for row in read(stubbed.output / "runs.csv")} == {""}
    assert "could not be counted" in (stubbed.output / "table.md").read_text()


# What is made of the results


def test_mean_interval_and_paired_test_by_hand():
    *values, low, high = mean_of([1.0, 2.0, 3.0])
    assert values == [3, 2.0, 1.0]
    half = 4.302652729911275 / 3**0.5  # t of 2 degrees of freedom, 97.5 %
    assert (low, high) == pytest.approx((2 - half, 2 + half))
    # t = 2 sqrt(3); with 2 degrees of freedom p = 1 - t / sqrt(2 + t^2)
    t = 2 * 3**0.5
    p = 1 - t / (2 + t * t) ** 0.5
    assert paired_p([1.0, 2.0, 3.0]) == pytest.approx(p)


def test_one_value_or_none_has_no_interval_and_one_pair_no_test():
    assert mean_of([5.0]) == (1, 5.0, None, None, None)
    assert mean_of([]) == (0, None, None, None, None)
    assert paired_p([1.0]) is None and paired_p([]) is None


def test_equal_differences_are_no_certainty():
    assert paired_p([0.0, 0.0]) == 1.0
    assert paired_p([1.1 - 1.0, 2.1 - 2.0, 3.1 - 3.0]) is None  # t would be infinite


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, None, 0.5]) == [1.0, None, 1.0]
    assert holm([]) == []


SCORES = {  # at 0.2: the score of seeds 0 to 3
    "plain": [70.0, 71.0, 72.0, 70.5],
    "droppath": [71.0, 72.5, 72.0, 71.0],
    "droppath-matched": [71.5, 72.0, 73.0, 71.25],
    "rdp": [74.0, 75.25, 75.5, 74.5],
}


@pytest.fixture(scope="module")
def scored_once(tmp_path_factory, digits_folder) -> Path:
    """A finished grid with SCORES, and a fifth seed for which rdp diverges."""
    plan = {"plain-seed4": {"top1": [71.0]}}
    for variant, values in SCORES.items():
        rate = "" if variant == "plain" else "-0.2"
        for seed, value in enumerate(values):
            plan[f"{variant}{rate}-seed{seed}"] = {"top1": [value]}
    message = "the training loss is nan in epoch 0, update 3 (plain iteration): training stops"
    plan["rdp-0.2-seed4"] = {"error": message, "status": 1}
    with pytest.MonkeyPatch.context() as patch:
        stubbed = Stubbed(tmp_path_factory.mktemp("scored"), digits_folder, patch)
        argv = ("--variants", *SCORES, "--drop-paths", 0.2, "--seeds", 5, "--jobs", 2)
        assert stubbed(*argv, plan=plan) == 0
    return stubbed.output


@pytest.fixture
def scored(scored_once, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(scored_once, tmp_path / "scored"))


def test_the_table_holds_what_scipy_makes_of_the_same_numbers(scored):
    output = scored
    table = {row["variant"]: row for row in read(output / "table.csv")}
    pairs = [
        (variant, reference)
        for reference in ("droppath", "droppath-matched")
        for variant in ("plain", "droppath-matched", "rdp")
        if variant != reference
    ]
    p = {}
    for variant, reference in pairs:
        row = table[variant]
        both = list(zip(_of(output, variant), _of(output, reference), strict=False))
        test = scipy.stats.ttest_rel(*zip(*both, strict=True))
        low, high = test.confidence_interval(0.95)
        p[variant, reference] = test.pvalue
        assert int(row[f"pairs_to_{reference}"]) == len(both)
        for column, value in (("p", test.pvalue), ("low", low), ("high", high)):
            assert float(row[f"{column}_to_{reference}"]) == pytest.approx(value), column
    corrected = dict(zip(p, scipy_holm(list(p.values())), strict=True))
    for (variant, reference), value in corrected.items():
        found = float(table[variant][f"p_corrected_to_{reference}"])
        assert found == pytest.approx(value)
    assert table["droppath"]["p_to_droppath-matched"] == ""  # the same pair the other way round
    rdp = table["rdp"]
    assert (rdp["seeds"], rdp["diverged"], rdp["failed"], rdp["unfinished"]) == ("4", "1", "0", "0")
    assert float(rdp["mean"]) == pytest.approx(sum(SCORES["rdp"]) / 4)


def _of(output: Path, variant: str) -> list[float]:
    rows = [r for r in read(output / "runs.csv") if r["variant"] == variant]
    return [float(r["top1"]) for r in rows if r["status"] == "done"]


def scipy_holm(p: list[float]) -> list[float]:
    """Holm's correction after its definition: p times what is left, never below the one before."""
    order = sorted(range(len(p)), key=p.__getitem__)
    scaled = [min(1, p[i] * (len(p) - rank)) for rank, i in enumerate(order)]
    return [max(scaled[: order.index(i) + 1]) for i in range(len(p))]


def test_the_sentences_say_what_the_data_support_and_no_more(scored, capsys):
    assert compare.main(["--report", str(scored)]) == 0
    out = capsys.readouterr().out
    text = (scored / "table.md").read_text()
    said = [line for line in text.splitlines() if line.startswith("- ")]
    assert all(line in out for line in said)
    assert "rdp - droppath at 0.2: +3.19 points [" in said[0]
    assert said[0].endswith(": rdp is better.") and "4 seeds, corrected p = " in said[0]
    assert "rdp at 0.2: 1 diverged" in said[-1]
    assert "Holm's correction over the 5 tests" in text
    assert "after the last epoch, so that nothing is picked on it" in text


def test_a_worse_and_an_undecided_result_are_called_so(stubbed, capsys):
    top1 = {"droppath": [80, 81, 82], "rdp": [70, 71.5, 72], "rdp-next": [81, 80, 82.5]}
    plan = {f"{v}-0.1-seed{s}": {"top1": [x]} for v, xs in top1.items() for s, x in enumerate(xs)}
    assert stubbed("--seeds", 3, "--variants", *top1, plan=plan) == 0
    worse, undecided, *_ = capsys.readouterr().out.splitlines()
    assert worse.startswith("- rdp - droppath at 0.1: -9.83") and worse.endswith("rdp is worse.")
    assert undecided.endswith("no difference seen.")


def test_one_seed_gets_neither_interval_nor_test(stubbed, capsys):
    assert stubbed("--seeds", 1) == 0
    assert "one seed: no interval or test can be given" in capsys.readouterr().out
    assert "(one seed: none)" in (stubbed.output / "table.md").read_text()
    (row,) = [r for r in read(stubbed.output / "table.csv") if r["variant"] == "rdp"]
    assert row["low"] == row["sd"] == row["p_to_droppath"] == ""


def test_the_last_epoch_counts_unless_the_best_is_asked_for_and_that_is_said(finished):
    # The stub's first epoch is 10 points better.
    assert {row["top1"] for row in read(finished.output / "runs.csv")} == {"50"}
    assert compare.main(["--report", str(finished.output), "--pick", "best"]) == 0
    assert {row["top1"] for row in read(finished.output / "runs.csv")} == {"60"}
    assert "picked on that very set" in (finished.output / "table.md").read_text()


@pytest.mark.parametrize("more", [["--lr", "1e30"], ["--lr", "1e30", "--opt", "sgd"]])
def test_a_run_that_diverges_is_counted_shown_and_not_run_again(
    stubbed, more, tmp_path, digits_folder, capsys
):
    assert train.main([*recipe(digits_folder), *more, "--output", str(tmp_path / "alone")]) == 1
    (told,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    plan = {"droppath-0.1-seed0": {"error": told.removeprefix("error: "), "status": 1}}
    assert stubbed("--variants", "droppath", "--seeds", 1, plan=plan) == 0
    (row,) = read(stubbed.output / "runs.csv")
    assert (row["status"], row["top1"], row["error"]) == ("diverged", "", told)
    table = (stubbed.output / "table.md").read_text()
    assert "droppath at 0.1: 1 diverged" in table and "| 0, 1 diverged |" in table
    assert stubbed("--variants", "droppath", "--seeds", 1, "--retry") == 0
    assert stubbed.calls() == []


def test_report_redraws_the_same_from_what_is_there_and_touches_nothing_else(
    scored, tmp_path, monkeypatch
):
    output = scored
    texts = {name: (output / name).read_bytes() for name in OUTPUTS}
    for name in OUTPUTS:
        (output / name).unlink()
    before = state(output)
    monkeypatch.setattr(compare_grid, "check_data", None)  # no data are read
    assert compare.main(["--report", str(output)]) == 0
    assert {name: (output / name).read_bytes() for name in OUTPUTS} == texts
    assert {p: s for p, s in state(output).items() if p.name not in OUTPUTS} == before


def test_a_comparison_stopped_in_its_first_run_says_that_nothing_can_be_said(stubbed, capsys):
    plan = {"droppath-0.1-seed0": {"error": "no disk", "status": 1}}
    plan["rdp-0.1-seed0"] = plan["droppath-0.1-seed0"]
    stubbed("--seeds", 1, plan=plan)
    (stubbed.output / "runs" / "droppath-0.1-seed0.json").unlink()
    capsys.readouterr()
    assert compare.main(["--report", str(stubbed.output)]) == 0
    out = capsys.readouterr().out
    assert "no seed is done in both" in out and "add droppath" not in out
    assert "droppath at 0.1: 1 unfinished; rdp at 0.1: 1 failed" in out


def test_a_run_whose_folder_was_removed_is_trained_again(stubbed, capsys):
    assert stubbed("--seeds", 2) == 0
    shutil.rmtree(stubbed.output / "runs" / "rdp-0.1-seed1")
    assert compare.main(["--report", str(stubbed.output)]) == 0
    assert "rdp at 0.1: 1 unfinished" in capsys.readouterr().out
    assert stubbed("--seeds", 2) == 0
    assert [name for name, *_ in stubbed.calls()] == ["rdp-0.1-seed1"]
    assert {r["status"] for r in read(stubbed.output / "runs.csv")} == {"done"}


def test_epochs_without_a_validation_have_no_row_and_count(finished):
    table = "epoch,train_loss,eval_loss,eval_top1\n1,1,1,77"  # --val-interval 2
    (finished.output / "runs" / "rdp-0.1-seed0" / "summary.csv").write_text(table)
    assert finished("--seeds", 1) == 0 and finished.calls() == []
    row = next(r for r in read(finished.output / "runs.csv") if r["variant"] == "rdp")
    assert (row["status"], row["epochs"], row["top1"]) == ("done", "2", "77")


@pytest.mark.parametrize("again", [False, True], ids=["report", "same command"])
@pytest.mark.parametrize(
    "name, content",
    [
        ("runs/rdp-0.1-seed0.json", b""),
        ("runs/rdp-0.1-seed0.json", b"{gar"),
        ("runs/rdp-0.1-seed0.json", b"[]"),
        ("runs/rdp-0.1-seed0.json", b"{}"),
        ("runs/rdp-0.1-seed0/summary.csv", b""),
        ("runs/rdp-0.1-seed0/summary.csv", b"\xff\xfe"),
        ("runs/rdp-0.1-seed0/summary.csv", b"epoch,train_loss,eval_loss,eval_top1\n0,1,1,50"),
        ("runs/rdp-0.1-seed0/summary.csv", b"epoch,train_loss,eval_loss\n0,1,1\n1,1,1"),
        ("runs/rdp-0.1-seed0/summary.csv", b"epoch,train_loss,eval_loss,eval_top1\n1,1,1,nan"),
        ("runs/rdp-0.1-seed0/summary.csv", b"epoch,train_loss,eval_loss,eval_top1\nx,1,1,1"),
        ("grid.json", b'{"options": {}, "match": "flops"}'),
        ("grid.json", b"[]"),
        ("grid.json", b"no json"),
    ],
)
def test_a_damaged_file_is_named_and_nothing_is_overwritten(finished, name, content, again, capsys):
    (finished.output / name).write_bytes(content)
    before = state(finished.output)
    capsys.readouterr()
    run_again = lambda: finished("--seeds", 1)
    report = lambda: compare.main(["--report", str(finished.output)])
    assert (run_again if again else report)() == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and str(finished.output / name) in err, err
    assert "delete" in err or "another folder" in err
    assert state(finished.output) == before and (not again or finished.calls() == [])


@pytest.mark.parametrize("entry", ["options", "costs", "data"])
def test_a_grid_that_lacks_an_entry_is_named(finished, entry, capsys):
    path = finished.output / "grid.json"
    grid = json.loads(path.read_text())
    grid[entry] = {"0.1": {}} if entry == "costs" else {}
    path.write_text(json.dumps(grid))
    capsys.readouterr()
    assert compare.main(["--report", str(finished.output)]) == 2
    err = capsys.readouterr().err
    lacking = {"options": "'model'", "costs": "'update'", "data": "'batches_per_epoch'"}[entry]
    assert str(path) in err and lacking in err and len(err.splitlines()) == 1


def _with_data_dir(grid: dict, folder: str) -> dict:
    return {**grid, "options": {**grid["options"], "data_dir": folder}}


def test_the_same_data_by_another_path_are_the_same_grid(
    finished, digits_folder, monkeypatch, capsys
):
    monkeypatch.chdir(digits_folder.parent)
    assert finished("--seeds", 1, "--data-dir", digits_folder.name) == 0
    assert finished.calls() == []
    path = finished.output / "grid.json"
    path.write_text(json.dumps(_with_data_dir(json.loads(path.read_text()), "/gone/digits")))
    capsys.readouterr()
    assert finished("--seeds", 1) == 2
    assert "--data-dir" in capsys.readouterr().err


def test_the_figure_shows_every_seed_and_what_is_missing(scored, monkeypatch):
    from matplotlib.text import Text

    output = scored
    boxes = {}  # saving lays out first, then draws
    original = Text.draw

    def record(self, renderer):
        original(self, renderer)
        if self.get_text() and self.get_visible():
            boxes[self] = (self.get_text(), self.get_window_extent(renderer))

    monkeypatch.setattr(Text, "draw", record)
    kept = []
    draw = compare_report.draw
    monkeypatch.setattr(compare_report, "draw", lambda *a: kept.append(draw(*a)) or kept[0])
    compare_report.write_report(output)
    (axes,) = kept[0].axes
    dots = [line for line in axes.lines if line.get_alpha() is not None]
    shown = sorted(y for line in dots for y in line.get_ydata())
    done = [float(r["top1"]) for r in read(output / "runs.csv") if r["status"] == "done"]
    assert shown == sorted(done)
    for line in dots:
        places = line.get_transform().transform(line.get_xydata())
        assert all(axes.bbox.contains(*place) for place in places), line.get_xydata()
    drawn = list(boxes.values())
    texts = [text for text, _ in drawn]
    assert "rdp: 1 diverged" in texts and set(SCORES) <= set(texts)
    for (one, a), (other, b) in itertools.combinations(drawn, 2):
        width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert not (width > 2 and height > 2), f"{one!r} lies over {other!r}"
    with Image.open(output / "comparison.png") as image:
        assert image.size[0] <= figures.WIDTH * figures.DPI


@pytest.mark.parametrize("scores, cut", [([50, 51], True), ([50, 51, 50, 51, 50, 51], False)])
def test_intervals_that_leave_the_frame_are_said_to_be_cut(stubbed, scores, cut, monkeypatch):
    plan = {
        f"{variant}-0.1-seed{seed}": {"top1": [score]}
        for variant in ("droppath", "rdp")
        for seed, score in enumerate(scores)
    }
    kept = []
    draw = compare_report.draw
    monkeypatch.setattr(compare_report, "draw", lambda *a: kept.append(draw(*a)) or kept[0])
    assert stubbed("--seeds", len(scores), "--jobs", 4, plan=plan) == 0
    assert ("cut off" in kept[0].get_suptitle()) == cut


def test_runs_are_found_by_name_and_other_folders_left_alone(finished):
    cells = [Cell("plain", None, 3), Cell("droppath-matched", 1e-5, 0), Cell("rdp", 0.1, 12)]
    assert compare_runs.cells_of([cell.name for cell in cells]) == cells
    table = (finished.output / "table.md").read_bytes()
    for name in ("plain-0.1-seed3", "rdp-seed1", "rdpx-0.1-seed1", "rdp-0.1-seed0.old", "notes"):
        shutil.copytree(finished.output / "runs" / "rdp-0.1-seed0", finished.output / "runs" / name)
    assert compare.main(["--report", str(finished.output)]) == 0
    assert (finished.output / "table.md").read_bytes() == table


# What is refused


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--variants", "rdp", "rpd-next"], ("--variants", "'rpd-next'", "rdp-next")),
        (["--variants", "rdp", "rdp"], ("--variants", "twice")),
        (["--seeds", "0"], ("--seeds 0", "at least 1")),
        (["--seeds", "two"], ("--seeds two", "whole number")),
        (["--first-seed", "-1"], ("--first-seed -1", "between 0 and")),
        (["--jobs", "0"], ("--jobs 0", "at least 1")),
        (["--drop-paths", "0"], ("--drop-paths 0 ", "above 0 and below 1")),
        (["--drop-paths", "1.0"], ("--drop-paths 1.0", "above 0 and below 1")),
        (["--drop-paths", "0.1", "0.1"], ("--drop-paths", "twice")),
        (["--seed", "3"], ("--seed ", "--first-seed")),
        (["--rdp"], ("--rdp ", "--variants")),
        (["--rdp-second", "all"], ("--rdp-second ", "--variants")),
        (["--drop-path-schedule", "late"], ("--drop-path-schedule ", "--variants")),
        (["--initial-checkpoint", "no.pth"], ("--initial-checkpoint no.pth",)),
        (["--drop-path", "0.2"], ("--drop-path ", "--drop-paths")),
        (["--experiment", "x"], ("--experiment", "--output")),
        (["--resume", "x"], ("--resume", "same command")),
        (["--variants", "droppath", "--rdp-every", "2"], ("--rdp-every 2", "--variants")),
        (["--match", "flops"], ("--match",)),
        (["--lr", "-1"], ("--lr -1",)),
        (["--epohcs", "3"], ("--epohcs", "--epochs")),
        (["--epochs", "0"], ("--epochs 0",)),
        (["--val-split", ""], ("--val-split",)),
        (["--data-dir", "nowhere"], ("--data-dir nowhere",)),
        (["--model", "vgg11"], ("--model vgg11", "drop_path_rate")),
        (["--model", "lcnet_050"], ("--model lcnet_050", "no DropPath is called", "another model")),
        (["--variants", "droppath", "--model", "lcnet_050"], ("no DropPath is called",)),
        (["--torchscript"], ("--torchscript", "--rdp")),
        (["--report", "nowhere"], ("--report",)),
        (["--report", ""], ("--report", "leave out")),
        (["--output", ""], ("--output ''",)),
        (["--output", "/proc/out"], ("--output /proc/out",)),
        (["--rdp-start-epoch", "2"], ("--rdp-start-epoch 2", "2 epochs", "never begin")),
        (["--rdp-start-epoch", "1", "--stop-epoch", "1"], ("--rdp-start-epoch 1", "1 epochs")),
        (["--variants", "droppath-matched", "--stop-epoch", "1"], ("--stop-epoch 1", "matched")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_nothing_is_written(
    argv, words, tmp_path, monkeypatch, capsys, digits_folder
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare_cost, "FLOP_CYCLES", 1)
    assert compare.main([*recipe(digits_folder), "--output", "out", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1, err
    assert all(word in err for word in words), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change, words",
    [
        (["--lr", "2e-3"], ("--lr 0.001 there, 0.002 here",)),
        (["--rdp-every", "2"], ("--rdp-every 1 there, 2 here",)),
    ],
)
def test_results_of_another_grid_are_refused_and_kept(finished, change, words, capsys):
    before = state(finished.output)
    capsys.readouterr()
    assert finished("--seeds", 2, *change) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert all(word in err for word in words), err
    assert state(finished.output) == before and finished.calls() == []


def test_what_does_not_change_results_may_change_from_call_to_call(finished):
    assert finished("--seeds", 2, "--log-interval", 7, "--checkpoint-hist", 3, "--jobs", 2) == 0
    assert len(finished.calls()) == 2


def test_a_folder_with_results_of_something_else_is_refused(stubbed, capsys):
    stubbed.output.mkdir()
    (stubbed.output / "table.md").write_text("mine")
    assert stubbed("--seeds", 1) == 2
    assert "holds table.md" in capsys.readouterr().err
    assert (stubbed.output / "table.md").read_text() == "mine"
    (stubbed.output / "grid.json").write_text("{}")
    assert stubbed("--seeds", 1) == 2
    assert (
        "grid.json cannot be used, name another folder: 'options' is missing"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("missing", ["scipy", "matplotlib"])
def test_a_missing_library_is_named_with_how_to_install_it(missing, monkeypatch, capsys, tmp_path):
    import importlib.util

    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else original(name)
    )
    assert compare.main(["--output", str(tmp_path / "out")]) == 2
    _, err = capsys.readouterr()
    assert missing in err and 'pip install "timm-rdp[demo]"' in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# Several labels an image


@pytest.mark.slow
def test_multilabel_runs_are_compared_by_their_own_metric_which_is_named(
    labels, digits_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(compare_cost, "FLOP_CYCLES", 2)
    output = tmp_path / "out"
    more = ["--output", str(output), "--drop-paths", "0.5", "--seeds", "1", "--epochs", "1"]
    assert compare.main([*recipe(digits_folder), *labels, *more]) == 0
    assert "points, one seed" in capsys.readouterr().out
    for row in read(output / "runs.csv"):
        folder = output / "runs" / f"{row['variant']}-0.5-seed0"
        own = read(folder / "summary.csv")[-1]
        assert float(row["map"]) == pytest.approx(float(own["eval_map"])) and "top1" not in row
    text = (output / "table.md").read_text()
    assert "| map, % |" in text and "Map is in per cent" in text and "op-1" not in text
    argv = [*recipe(digits_folder), *labels, *more, "--eval-metric", "top1"]
    argv[argv.index("--output") + 1] = str(tmp_path / "never")
    assert compare.main(argv) == 2
    assert "--eval-metric top1" in capsys.readouterr().err and not (tmp_path / "never").exists()


def test_a_lower_loss_is_better(stubbed, capsys, monkeypatch):
    losses = {"droppath": [2.0, 2.1, 2.2], "rdp": [1.0, 1.2, 1.2]}
    plan = {f"{v}-0.1-seed{s}": {"top1": [x]} for v, xs in losses.items() for s, x in enumerate(xs)}
    monkeypatch.setattr(
        sys.modules[__name__], "STUB", STUB.replace("eval_loss,eval_top1", "eval_top1,eval_loss")
    )
    assert stubbed("--seeds", 3, "--eval-metric", "loss", plan=plan) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("- rdp - droppath at 0.1: -0.97 in loss") and "rdp is better." in first
    assert "| loss |" in (stubbed.output / "table.md").read_text()


def test_every_variant_has_a_colour_and_a_marker_of_its_own() -> None:
    looks = compare_report.LOOKS.values()
    for kind in ("color", "marker"):
        assert len({look[kind] for look in looks}) == len(looks)


# Measures


@pytest.mark.slow
def test_runs_are_measured_from_their_checkpoints_once(
    tmp_path, digits_folder, monkeypatch, capsys
):
    monkeypatch.setattr(compare_cost, "FLOP_CYCLES", 2)
    output = tmp_path / "out"
    command = [*recipe(digits_folder), "--output", str(output), "--drop-paths", "0.5"]
    command += ["--variants", "plain", "rdp", "--seeds", "1", "--epochs", "1", "--measure", "40"]
    assert compare.main(command) == 0
    names = compare_measured.NAMES
    rows = read(output / "runs.csv")
    for row in rows:  # with all images, without removing any, the accuracy is that of validation
        rate = "" if row["variant"] == "plain" else "-0.5"
        found = json.loads(
            (output / f"runs/{row['variant']}{rate}-seed0.measures.json").read_text()
        )
        assert found["score"] == pytest.approx(float(row["top1"]) / 100)
        assert found["removed"]["0"] == [found["score"]] * 5
        assert all(float(row[name]) == pytest.approx(found[name]) for name in names)
    table = {row["variant"]: row for row in read(output / "table.csv")}
    assert float(table["rdp"]["nll"]) == pytest.approx(float(rows[1]["nll"]))
    text = (output / "table.md").read_text()
    assert "| NLL | ECE | ECE scaled |" in text and "on 40 validation images" in text
    curve = [row for row in read(output / "removal.csv") if row["variant"] == "rdp"]
    assert [row["paths_removed"] for row in curve] == [str(k) for k in range(13)]
    assert (output / "removal.png").stat().st_size > 5000
    # FLOPs of a network that has no such blocks at all, counted by torch.
    flops = {}
    for depth in (0, 3, 6):
        model = timm.create_model("test_vit", img_size=32, num_classes=10, depth=depth).eval()
        with (
            FlopCounterMode(display=False) as counter,
            sdpa_kernel(SDPBackend.MATH),
            torch.no_grad(),
        ):
            model(torch.zeros(1, 3, 32, 32))
        flops[depth] = counter.get_total_flops()
    assert float(curve[0]["flops_even"]) == flops[6]
    assert float(curve[12]["flops_even"]) == flops[0]
    assert flops[0] < float(curve[6]["flops_even"]) < flops[6]
    before = state(output / "runs")
    assert compare.main(command) == 0 and state(output / "runs") == before
    (output / "runs" / "plain-seed0.measures.json").write_text("{")
    capsys.readouterr()
    assert compare.main(["--report", str(output)]) == 2
    assert "plain-seed0.measures.json is damaged" in capsys.readouterr().err


def test_all_variants_start_from_the_initial_checkpoint(stubbed, tmp_path):
    model = timm.create_model("test_vit", num_classes=10)
    torch.save(model.state_dict(), tmp_path / "start.pth")
    more = ("--initial-checkpoint", tmp_path / "start.pth", "--seeds", 1, "--epochs", 1)
    assert stubbed("--variants", *compare_runs.VARIANTS, *more) == 0
    assert len(stubbed.calls()) == len(compare_runs.VARIANTS)
    recipe_of_all = yaml.safe_load((stubbed.output / "recipe.yaml").read_text())
    assert recipe_of_all["initial_checkpoint"] == str(tmp_path / "start.pth")


@pytest.mark.parametrize(
    "more, words",
    [
        (["--measure", "3"], ("--measure 3", "at least 16")),
        (["--measure", "40", "--dataset", "wds/x"], ("--measure", "--dataset wds/x")),
        (["--measure", "40", "--split-bn", "--aug-splits", "2"], ("--measure", "--split-bn")),
    ],
)
def test_what_cannot_be_measured_is_one_line(more, words, digits_folder, tmp_path, capsys):
    command = [*recipe(digits_folder), "--output", str(tmp_path / "out"), *more]
    assert compare.main(command) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and all(word in err for word in words), err
    assert list(tmp_path.iterdir()) == []
