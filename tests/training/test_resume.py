"""A run that is stopped anywhere and resumed ends as one that was never stopped, to the bit."""

import os
import signal

import pytest
from core_helpers import same_bits
from runs import RESNET, VIT, checkpoint, flags, rows, run

from timm_rdp.training import loop, train
from timm_rdp.training.dataset import _StrictImageDataset

EVERYTHING = (
    *("--mixup", 0.4, "--cutmix", 0.5, "--reprob", 0.4, "--drop", 0.1, "--drop-path", 0.5),
    *("--grad-accum-steps", 2, "--sched-on-updates", "--warmup-epochs", 1, "--epochs", 3),
    *("--model-ema", "--model-ema-warmup", "--clip-grad", 1, "--aa", "rand-m5-n1"),
    *("--color-jitter", 0.3),
)
CASES = {
    "same": (*VIT, *EVERYTHING, "--rdp"),
    "next": (*VIT, *EVERYTHING, "--rdp", "--rdp-batch", "next"),
    "plain": (*VIT, *EVERYTHING),
    "no prefetcher": (*VIT, *EVERYTHING, "--no-prefetcher", "--rdp"),
    "own data stream": (*VIT, *EVERYTHING, "--data-seed", 3, "--skip-dropped"),
    "batch norm": (*RESNET, "--drop-path", 0.4, "--rdp", "--opt", "lookahead_momentum"),
    "plateau": (
        *RESNET, "--sched", "plateau", "--patience-epochs", 0, "--decay-rate", 0.5, "--epochs", 4,
        "--lr", 0.3, "--opt", "sgd",
    ),
    "one loader for all epochs": (*VIT, *EVERYTHING, "--use-multi-epochs-loader", "--rdp"),
    "scheduled sizes": (
        *VIT, "--train-img-sizes", 32, 32, "--train-batch-sizes", 16, 8, "--drop-path", 0.4,
        "--rdp",
    ),
}  # fmt: skip


def stop_at(monkeypatch, epoch: int, update: int, signum=signal.SIGTERM) -> None:
    """Have this process get a signal in the middle of an update."""
    original = loop.run_iteration

    def watched(*args):
        losses, current = args[4:6]
        if (losses.epoch, current) == (epoch, update):
            monkeypatch.setattr(loop, "run_iteration", original)
            os.kill(os.getpid(), signum)
        return original(*args)

    monkeypatch.setattr(loop, "run_iteration", watched)


def final_state(folder) -> dict:
    """All that a run leaves, less its options, which name the checkpoint it was resumed from."""
    state = checkpoint(folder)
    del state["args"]
    return {**state, "summary": (folder / "summary.csv").read_bytes()}


@pytest.fixture(scope="module")
def whole_runs(digits_folder, tmp_path_factory):
    """Runs that were never stopped, each made once."""
    made = {}

    def get(case: str):
        if case not in made:
            made[case] = run(digits_folder, tmp_path_factory.mktemp("whole"), *CASES[case])
        return made[case]

    return get


def assert_same_end(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert same_bits(one[key], other[key]), key


@pytest.mark.parametrize("epoch, update", [(0, 0), (1, 1), (1, 2), (2, 0)])
@pytest.mark.parametrize(
    "case",
    [
        "same",
        pytest.param("next", marks=pytest.mark.slow),
        "own data stream",
        pytest.param("plain", marks=pytest.mark.slow),
        pytest.param("no prefetcher", marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_anywhere_and_resumed_ends_bitwise_as_one_never_stopped(
    case, epoch, update, whole_runs, digits_folder, tmp_path, monkeypatch
):
    stop_at(monkeypatch, epoch, update)
    argv = flags(digits_folder, tmp_path, *CASES[case], "--resume", "auto")
    assert train.main(argv) == 128 + signal.SIGTERM
    assert list((tmp_path / "run").glob("recovery-*"))
    assert train.main(argv) == 0
    assert_same_end(final_state(tmp_path / "run"), final_state(whole_runs(case)))


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
@pytest.mark.parametrize(
    "case",
    [
        "batch norm",
        *(pytest.param(c, marks=pytest.mark.slow) for c in ("plateau", "scheduled sizes")),
    ],
)
def test_other_loaders_schedules_and_optimizers_resume_exactly_too(
    case, whole_runs, digits_folder, tmp_path, monkeypatch
):
    argv = flags(digits_folder, tmp_path, *CASES[case], "--resume", "auto")
    for epoch, update in ((0, 1), (1, 0), (1, 2)):
        stop_at(monkeypatch, epoch, update)
        assert train.main(argv) == 128 + signal.SIGTERM
    assert train.main(argv) == 0
    assert_same_end(final_state(tmp_path / "run"), final_state(whole_runs(case)))


def test_a_run_continued_at_an_epoch_ends_bitwise_as_one_never_stopped(
    whole_runs, digits_folder, tmp_path
):
    case = "one loader for all epochs"
    for name in ("checkpoint-0", "checkpoint-1"):
        resume = ("--resume", whole_runs(case) / f"{name}.pth.tar")
        folder = run(digits_folder, tmp_path / name, *CASES[case], *resume)
        ours, whole = final_state(folder), final_state(whole_runs(case))
        for state in (ours, whole):  # another folder has rows and a history of its own
            state["summary"] = state["summary"].splitlines()[-1]
            del state["saver"]
        assert_same_end(ours, whole)


def test_with_workers_the_order_and_the_masks_are_exact(digits_folder, tmp_path, monkeypatch):
    # Without augmentation, which the workers draw for themselves, everything else must be equal.
    recipe = (*VIT, "--rdp", "--drop-path", 0.5, "--drop", 0.1, "--no-aug", "--workers", 2)
    recipe = (*recipe, "--epochs", 3)
    whole = run(digits_folder, tmp_path / "whole", *recipe)
    at_epoch = run(
        digits_folder, tmp_path / "epoch", *recipe, "--resume", whole / "checkpoint-0.pth.tar"
    )
    argv = flags(digits_folder, tmp_path / "update", *recipe, "--resume", "auto")
    for epoch, update in ((0, 2), (1, 1)):  # before the first validation, and after it
        stop_at(monkeypatch, epoch, update)
        assert train.main(argv) == 128 + signal.SIGTERM
    assert train.main(argv) == 0
    for folder in (at_epoch, tmp_path / "update" / "run"):
        for key in ("state_dict", "optimizer", "rdp"):
            assert same_bits(checkpoint(folder)[key], checkpoint(whole)[key]), (folder, key)
        assert rows(folder)[-1] == rows(whole)[-1]


def test_a_resumed_epoch_loads_no_image_twice(digits_folder, tmp_path, monkeypatch):
    stop_at(monkeypatch, 0, 3)
    argv = flags(digits_folder, tmp_path, *VIT, "--epochs", 1, "--resume", "auto")
    assert train.main(argv) == 128 + signal.SIGTERM
    loaded = []
    original = _StrictImageDataset.__getitem__
    monkeypatch.setattr(
        _StrictImageDataset,
        "__getitem__",
        lambda self, index: loaded.append((id(self), index)) or original(self, index),
    )
    assert train.main(argv) == 0
    training = [index for owner, index in loaded if owner == loaded[0][0]]
    assert len(training) == len(set(training)) == 16  # the fifth of five batches
