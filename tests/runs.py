"""What the tests of training runs share: short runs of the real command on real images."""

import argparse
import csv
from pathlib import Path

import torch

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
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(folder / name, weights_only=True)


def watch_iterations(monkeypatch, before=None, after=None) -> list[tuple[str, bool]]:
    """Call before(run) and after(run) around every iteration; the list fills with (phase, first).

    `run.rdp._active` is the iteration where there is one.
    """
    seen = []
    original = loop.run_iteration

    def watched(run, group, size, divisor, losses, phase, first):
        if before:
            before(run)
        result = original(run, group, size, divisor, losses, phase, first)
        seen.append((phase, first))
        if after:
            after(run)
        return result

    monkeypatch.setattr(loop, "run_iteration", watched)
    return seen
