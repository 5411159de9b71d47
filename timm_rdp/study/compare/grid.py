"""What a comparison consists of, checked as a whole before anything is written."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from timm_rdp.errors import UsageError, refused_with
from timm_rdp.study.compare import cost, runs
from timm_rdp.study.compare.runs import FOR_RDP, MATCHED, RDP_VARIANTS
from timm_rdp.training.checkpoint import check_weights_files
from timm_rdp.training.dataset import check_data
from timm_rdp.training.flags import build_parser as build_training_parser
from timm_rdp.training.flags import flag
from timm_rdp.training.model import eval_metric
from timm_rdp.training.options import parse_args, read_config, typed_flags
from timm_rdp.training.saver import write_atomically

GRID = "grid.json"
OUTPUTS = ("runs.csv", "table.csv", "table.md", "comparison.png")
DEFAULT_RATE = 0.1
_BY_VARIANT = ("rdp", "rdp_batch", "rdp_second", "skip_dropped", "drop_path_schedule")
# Training flags that differ from run to run, and what to give to compare in their place.
SET_HERE = {
    **dict.fromkeys(("seed", "data_seed", "rdp_seed"), "--first-seed and --seeds"),
    **dict.fromkeys(_BY_VARIANT, "--variants"),
    **dict.fromkeys(("resume", "no_resume_opt", "start_epoch"), "the same command again"),
    "drop_path": "--drop-paths",
    "experiment": "--output",
}
# Of no consequence for the results: they may change from one call to the next.
FREE = (
    *("log_interval", "log_wandb", "wandb_project", "wandb_tags", "wandb_resume_id"),
    *("save_images", "checkpoint_hist", "recovery_interval", "pin_mem"),
)


def read_recipe(rest: list[str], variants: Sequence[str]) -> tuple[argparse.Namespace, float]:
    """The training options in `rest` that all runs share, and their drop rate (0.1 without one)."""
    parser = build_training_parser()
    typed = typed_flags(parser, rest)
    for name, instead in SET_HERE.items():
        if name in typed:
            raise UsageError(f"{flag(name)} differs from run to run: give {instead}")
    for name in FOR_RDP:
        if name in typed and RDP_VARIANTS.isdisjoint(variants):
            raise UsageError(f"{flag(name)} {typed[name]} needs rdp or the like in --variants")
    config = read_config(typed["config"], parser) if typed.get("config") else {}
    # Whatever the config says of these: its other options are checked.
    neutral = ["--seed", "0", "--drop-path", str(DEFAULT_RATE), "--resume", ""]
    patched = not {"droppath-batch", *RDP_VARIANTS}.isdisjoint(variants)
    options = parse_args([*rest, *neutral, *(["--rdp"] if patched else [])])
    if "checkpoint_hist" not in typed.keys() | config.keys():
        options.checkpoint_hist = 1  # timm keeps ten, of every run
    return options, config.get("drop_path") or DEFAULT_RATE


def shared_options(options: argparse.Namespace) -> dict[str, Any]:
    """Those of the options that all runs share, as recipe.yaml holds them."""
    own = {"config", "data", "output", *SET_HERE, *FOR_RDP}
    flags = vars(build_training_parser().parse_args([])).keys() - own
    demo = {"data_dir": None} if options.demo else {}  # wherever it is on this machine
    return {k: v for k, v in vars(options).items() if k in flags} | demo


def read_grid(output: Path) -> dict[str, Any] | None:
    """What grid.json in a folder says, with all that is read later; None where there is none."""
    if not (output / GRID).exists():
        return None
    with refused_with(f"{output / GRID} cannot be used, name another folder"):
        grid = json.loads((output / GRID).read_text())
        itemgetter("model", "data_dir", "dataset", *FOR_RDP)(grid["options"])
        itemgetter("versions", "matched_epochs")(grid)
        metric_of(grid)
        for cell in runs.cells_of(grid["runs"]):
            flops_of_epochs(grid, cell.variant, cell.drop_path, 1)
    return grid


def metric_of(grid: dict[str, Any]) -> str:
    """The metric that the runs of a grid are compared by."""
    return eval_metric(argparse.Namespace(**grid["options"]))


def write_grid(output: Path, grid: dict[str, Any], options: argparse.Namespace) -> None:
    """Write grid.json and recipe.yaml."""
    write_atomically(str(output / GRID), (json.dumps(grid, indent=2) + "\n").encode())
    write_atomically(str(output / runs.RECIPE), yaml.safe_dump(shared_options(options)).encode())


def same_grid(output: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The grid that the output folder holds, or a new one; the folder may hold nothing else.

    Tells where it was begun with another version of torch or timm.
    """
    grid = read_grid(output)
    kept = {k: v for k, v in shared_options(options).items() if k not in FREE}
    kept |= {name: getattr(options, name) for name in FOR_RDP}
    own = json.loads(json.dumps(kept, sort_keys=True, default=str))
    versions = {"timm": timm.__version__, "torch": str(torch.__version__)}
    if grid is None:
        for name in ("runs", *OUTPUTS):
            if (output / name).exists():
                raise UsageError(
                    f"--output {output}: holds {name} of something else; name another folder"
                )
        empty: dict[str, Any] = {name: {} for name in ("data", "costs", "matched_epochs")}
        return {"options": own, "versions": versions, **empty, "runs": []}
    for name in sorted(grid["options"].keys() | own.keys()):
        a, b = grid["options"].get(name), own.get(name)
        is_same_folder = (
            name == "data_dir" and a and b and os.path.realpath(a) == os.path.realpath(b)
        )
        if a != b and not is_same_folder:
            raise UsageError(
                f"--output {output}: holds another grid ({flag(name)} {a} there, {b} here); "
                "name another folder"
            )
    if grid["versions"] != versions:
        begun = ", ".join(f"{name} {version}" for name, version in grid["versions"].items())
        print(f"{output} was begun with {begun}: results may differ now", file=sys.stderr)
    return grid


def check_runs(
    options: argparse.Namespace,
    variants: Sequence[str],
    rates: Sequence[float],
    grid: dict[str, Any],
) -> None:
    """Check what will run, and settle in the grid what it costs and how long MATCHED takes."""
    if options.val_split == "":
        raise UsageError("--val-split '': accuracy is compared on the validation split; name one")
    if options.epochs < 1:
        raise UsageError(f"--epochs {options.epochs}: there is nothing to compare; give 1 or more")
    eval_metric(options)
    start, total = options.rdp_start_epoch, cost.total_epochs(options, options.epochs)
    if start >= total and not RDP_VARIANTS.isdisjoint(variants):
        raise UsageError(
            f"--rdp-start-epoch {start}: a run has {total} epochs, so that RDP would never begin; "
            "give a smaller one"
        )
    if options.stop_epoch is not None and MATCHED in variants:
        raise UsageError(f"--stop-epoch {options.stop_epoch}: leave out {MATCHED}, which goes on")
    check_data(options)
    check_weights_files(options)
    counted = rates if set(variants) != {"plain"} else ()
    for rate in (*counted, *([0.0] if "plain" in variants else ())):
        key, random = str(rate or "plain"), bool(rate) and "rdp-random" in variants
        if key not in grid["costs"] or (random and "random" not in grid["costs"][key]):
            args = argparse.Namespace(**{**vars(options), "drop_path": rate})
            model, data_config, batches = cost.build_on_meta(args)
            grid["costs"][key] = cost.count_costs(args, model, data_config, random)
            grid["data"] = {"batches_per_epoch": batches, "batch_size": args.batch_size}
    for rate in rates if MATCHED in variants else ():
        if str(rate) not in grid["matched_epochs"]:
            rdp, usual = (flops_of_epochs(grid, v, rate, total) for v in ("rdp", "droppath"))
            if rdp is None or usual is None:
                raise UsageError(
                    f"--variants {MATCHED}: the operations of {options.model} cannot be counted "
                    "without data; leave it out"
                )
            grid["matched_epochs"][str(rate)] = cost.matched_epochs(options, rdp / usual)


def flops_of_epochs(
    grid: dict[str, Any], variant: str, rate: float | None, epochs: int
) -> float | None:
    """FLOPs of a run's first epochs as expected over masks; None where they were not counted."""
    costs, options = grid["costs"].get(str(rate or "plain")), grid["options"]
    if costs is None or costs["update"] is None:
        return None
    images = grid["data"]["batches_per_epoch"] * grid["data"]["batch_size"]
    early, own = 0, costs["update"]  # epochs without RDP, and FLOPs of an image in the others
    if variant == "droppath-batch":
        own = costs["droppath"]
    if variant in RDP_VARIANTS:
        early = min(options["rdp_start_epoch"], epochs)
        complements = costs["complements"] / options["rdp_every"]
        second = {"rdp-random": "random", "rdp-unfrozen": "update"}.get(variant, "complement")
        if costs.get(second) is None:  # of a grid that was begun without that variant
            return None
        own = costs["droppath"] + complements * costs[second]
        own /= 1 + complements if variant == "rdp-next" else 1  # an image an iteration
    return images * (early * costs["update"] + (epochs - early) * own)
