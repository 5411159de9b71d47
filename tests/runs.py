"""What the tests of training runs share: short runs of the real command on real images."""

import argparse
import csv
from pathlib import Path
from types import SimpleNamespace

import torch

from timm_rdp.core.versions import safe_globals
from timm_rdp.training import loop, train

VIT = ("--model", "test_vit", "--img-size", "32", "--model-kwargs", "img_size=32", "depth=3")
RESNET = ("--model", "test_resnet", "--img-size", "32")


def flags(data: Path, output: Path, *more: object) -> list[str]:
    """A command line for two epochs of five updates of 16 digits each; `more` overrides."""
    common = (
        f"--data-dir {data} --num-classes 10 -j 0 -b 16 --epochs 2 --warmup-epochs 0 --lr 1e-3 "
        f"--opt adamw --device cpu --output {output} --experiment run"
    ).split()
    return [*common, *map(str, more)]


def run(data: Path, output: Path, *more: object) -> Path:
    """Run the command to its end, and return the run's folder."""
    assert train.main(flags(data, output, *more)) == 0
    arguments = flags(data, output, *more)
    name = arguments[len(arguments) - arguments[::-1].index("--experiment")]
    return Path(output) / name


def rows(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's summary.csv."""
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(folder: Path, name: str = "last.pth.tar") -> dict:
    """A run's checkpoint."""
    with safe_globals([argparse.Namespace]):
        return torch.load(folder / name, weights_only=True)


def watch_iterations(monkeypatch, before=None, after=None) -> list[tuple[str, bool]]:
    """Call before(run) and after(run) around every iteration; the list fills with (phase, first).

    `run` has the run's `task` and its `rdp`, whose `_active` is the iteration.
    """
    seen = []
    run = SimpleNamespace()
    original, epoch = loop.run_iteration, train.train_one_epoch

    def train_one_epoch(*args, task, rdp, **kwargs):
        run.task, run.rdp = task, rdp
        epoch(*args, task=task, rdp=rdp, **kwargs)

    def watched(*args):
        *_, phase, first = args
        if before:
            before(run)
        result = original(*args)
        run.newest = result[1]
        seen.append((phase, first))
        if after:
            after(run)
        return result

    monkeypatch.setattr(train, "train_one_epoch", train_one_epoch)
    monkeypatch.setattr(loop, "run_iteration", watched)
    return seen
