"""What a comparison consists of, checked as a whole before anything is written."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from timm_rdp.errors import UsageError
from timm_rdp.study.compare.cost import (
    COSTS_OF_PATHS,
    build_on_meta,
    count_costs,
    flops_per_image,
    matched_epochs,
    over_run,
    total_epochs,
    updates_per_batch,
)
from timm_rdp.study.compare.runs import RDP_VARIANTS, RECIPE, variant_flags
from timm_rdp.training.checkpoint import check_checkpoints
from timm_rdp.training.checks import check_limits, flag
from timm_rdp.training.data import check_data
from timm_rdp.training.files import write_atomically
from timm_rdp.training.flags import build_parser as build_training_parser
from timm_rdp.training.options import parse_args, read_config

GRID = "grid.json"
DEFAULT_RATE = 0.1
# Training flags that differ from run to run, and what to give to compare in their place.
SET_HERE = {
    "seed": "--first-seed and --seeds",
    "data_seed": "--first-seed and --seeds",
    "rdp": "--variants rdp",
    "rdp_batch": "--variants rdp-next",
    "rdp_seed": "--first-seed and --seeds, which masks follow",
    "drop_path": "--drop-paths",
    "skip_dropped": "--variants",
    "experiment": "--output",
    **dict.fromkeys(
        ("resume", "no_resume_opt", "start_epoch"),
        "the same command again, which goes on where it was interrupted",
    ),
}
FOR_RDP = ("rdp_every", "rdp_start_epoch")
# Of no consequence for the results: they may change from one call to the next.
FREE = (
    "log_interval",
    "log_wandb",
    "wandb_project",
    "wandb_tags",
    "wandb_resume_id",
    "save_images",
    "checkpoint_hist",
    "recovery_interval",
    "pin_mem",
)


def read_recipe(rest: Sequence[str], variants: Sequence[str]) -> tuple[argparse.Namespace, float]:
    """The training options that all runs share, and their drop rate (0.1 where they have none).

    Args:
        rest: the command line, without compare's own flags.
        variants: of VARIANTS.

    Raises:
        UsageError: an option is wrong, or is one that compare sets itself.
    """
    parser = build_training_parser()
    absent = object()
    nothing = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([])), absent))
    typed = {k: v for k, v in vars(parser.parse_args(rest, nothing)).items() if v is not absent}
    for name, instead in SET_HERE.items():
        if name in typed:
            raise UsageError(f"{flag(name)} differs from run to run: give {instead}")
    for name in FOR_RDP:
        if name in typed and not set(variants) & set(RDP_VARIANTS):
            raise UsageError(f"{flag(name)} {typed[name]} needs rdp or rdp-next in --variants")
    if typed.get("output"):
        raise UsageError("--output is given twice")
    config = read_config(typed["config"], parser) if typed.get("config") else {}
    # Whatever the config says of these: its other options are checked.
    neutral = ["--seed", "0", "--drop-path", str(DEFAULT_RATE), "--resume", ""]
    if not (typed.get("torchscript") or config.get("torchscript")):
        neutral.append("--rdp")  # which options for RDP are refused without
    options = parse_args([*rest, *neutral])
    if "checkpoint_hist" not in typed.keys() | config.keys():
        options.checkpoint_hist = 1  # timm keeps ten, of every run
    return options, config.get("drop_path") or DEFAULT_RATE


def shared_options(options: argparse.Namespace) -> dict[str, Any]:
    """Those of the options that all runs share, as recipe.yaml holds them."""
    flags = vars(build_training_parser().parse_args([])).keys()
    own = {"config", "data", "output", *SET_HERE, *FOR_RDP}
    shared = {k: v for k, v in vars(options).items() if k in flags and k not in own}
    if options.demo:
        shared["data_dir"] = None  # wherever it is on this machine
    return shared


def identity(options: argparse.Namespace) -> dict[str, Any]:
    """The options that make a grid what it is, as grid.json holds them."""
    kept = {k: v for k, v in shared_options(options).items() if k not in FREE}
    kept |= {name: getattr(options, name) for name in FOR_RDP}
    return json.loads(json.dumps(kept, sort_keys=True, default=str))


def rdp_options(options: argparse.Namespace | dict) -> list[str]:
    """The flags that only the RDP variants get."""
    values = options if isinstance(options, dict) else vars(options)
    return [word for name in FOR_RDP if values[name] for word in (flag(name), str(values[name]))]


def read_grid(output: Path) -> dict[str, Any] | None:
    """What grid.json in a folder says; None where there is none.

    Raises:
        UsageError: it is no such file.
    """
    try:
        grid = json.loads((output / GRID).read_text())
        for name in ("options", "versions", "data", "costs", "matched_epochs"):
            if not isinstance(grid[name], dict):
                raise ValueError(f"{name} is no mapping")
        _check_grid(grid)
    except FileNotFoundError:
        return None
    except KeyError as error:
        raise UsageError(f"{output / GRID} has no entry {error}; use another folder") from None
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{output / GRID} cannot be read ({error}); use another folder") from None
    return grid


def _check_grid(grid: dict[str, Any]) -> None:
    """Raise KeyError or ValueError where something is missing that is read later."""
    grid["match"]
    for name in ("model", "data_dir", "dataset", *FOR_RDP):
        grid["options"][name]
    for rate, costs in grid["costs"].items():
        for name in ("update",) if rate == _key(None) else ("update", *COSTS_OF_PATHS):
            costs[name]
    if grid["costs"]:
        for name in ("batches_per_epoch", "batch_size"):
            grid["data"][name]
    if not isinstance(grid.get("runs", []), list):
        raise ValueError("runs is no list")


def write_grid(output: Path, grid: dict[str, Any]) -> None:
    """Write grid.json."""
    write_atomically(str(output / GRID), (json.dumps(grid, indent=2) + "\n").encode())


def same_grid(
    output: Path, options: argparse.Namespace, match: str, written: Sequence[str]
) -> dict[str, Any]:
    """The grid that the output folder holds, or a new one.

    Tells where it was begun with another version of torch or timm.

    Args:
        output: the folder, which need not exist.
        options: shared by all runs.
        match: what droppath-matched has in common with rdp.
        written: names of the files that a report writes.

    Raises:
        UsageError: the folder holds another grid, or results of something else.
    """
    grid = read_grid(output)
    own = identity(options)
    versions = {"timm": timm.__version__, "torch": str(torch.__version__)}
    if grid is None:
        there = [name for name in ("runs", *written) if (output / name).exists()]
        if there:
            raise UsageError(
                f"--output {output}: holds {there[0]}, but no {GRID} that says of which grid; "
                "name another folder"
            )
        return {
            "options": own,
            "match": match,
            "versions": versions,
            "data": {},
            "costs": {},
            "matched_epochs": {},
        }
    then = {**grid["options"], "match": grid["match"]}
    now = {**own, "match": match}
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name) and not _same_folder(name, then, now):
            raise UsageError(
                f"--output {output}: holds another grid ({flag(name)} {then.get(name)} there, "
                f"{now.get(name)} here); name another folder"
            )
    for name, version in versions.items():
        if grid["versions"].get(name) != version:
            print(
                f"timm-rdp compare: {output} was begun with {name} {grid['versions'].get(name)}, "
                f"this is {version}: results may differ",
                file=sys.stderr,
            )
    return grid


def _same_folder(name: str, then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether an option is the data folder, only written in another way."""
    folders = [options.get(name) for options in (then, now)]
    return name == "data_dir" and all(folders) and len(set(map(os.path.realpath, folders))) == 1


def check_runs(
    options: argparse.Namespace,
    variants: Sequence[str],
    rates: Sequence[float],
    last_seed: int,
    output: Path,
    grid: dict[str, Any],
) -> None:
    """Check every command line that will run, and count into the grid what it costs.

    Raises:
        UsageError: one of them cannot be used, or a model has no paths at its rate.
    """
    if options.val_split == "":
        raise UsageError("--val-split '': accuracy is compared on the validation split; name one")
    if options.epochs < 1:
        raise UsageError(f"--epochs {options.epochs}: there is nothing to compare; give 1 or more")
    start, total = options.rdp_start_epoch, total_epochs(options, options.epochs)
    if start >= total and set(variants) & set(RDP_VARIANTS):
        raise UsageError(
            f"--rdp-start-epoch {start}: a run has {total} epochs, so that RDP would never begin; "
            "give a smaller one"
        )
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / RECIPE
        recipe.write_text(yaml.safe_dump(shared_options(options)))
        cells = [(v, r) for r in rates for v in variants if v != "plain"]
        if "plain" in variants:
            cells.append(("plain", None))
        parsed = {}
        for variant, rate in cells:
            flags = variant_flags(variant, rate, rdp_options(options))
            run = ["--seed", str(last_seed), "--output", str(output / "runs")]
            parsed[rate] = parse_args(["-c", str(recipe), *flags, *run])
    first = next(iter(parsed.values()))
    check_limits(first)
    check_data(first)
    check_checkpoints(first)
    new = [(rate, args) for rate, args in parsed.items() if _key(rate) not in grid["costs"]]
    for rate, args in new:
        model, data_config, batches = build_on_meta(args)
        grid["costs"][_key(rate)] = count_costs(args, model, data_config, rate is not None)
        grid["data"] = {"batches_per_epoch": batches, "batch_size": args.batch_size}


def _key(rate: float | None) -> str:
    return "plain" if rate is None else str(rate)


def flops_of_epochs(grid: dict[str, Any], variant: str, rate: float | None, epochs: int):
    """FLOPs of a run's first epochs as expected over masks; None where they were not counted."""
    costs, options = grid["costs"].get(_key(rate)), grid["options"]
    if not costs or costs["update"] is None:
        return None
    images = grid["data"]["batches_per_epoch"] * grid["data"]["batch_size"]
    own = flops_per_image(variant, costs, options["rdp_every"])
    start = options["rdp_start_epoch"] if variant in RDP_VARIANTS else 0
    return images * over_run(own, costs["update"], epochs, start)


def settle_matched(
    grid: dict[str, Any],
    options: argparse.Namespace,
    rate: float,
    seconds: dict[str, float] | None = None,
) -> int | None:
    """The --epochs of droppath-matched at a rate, kept in the grid; None where not yet known.

    Args:
        grid: as in grid.json; gets the number.
        options: shared by all runs.
        rate: the drop rate.
        seconds: of a run of rdp and of droppath, where time is what is matched.

    Raises:
        UsageError: FLOPs are what is matched, and they cannot be counted.
    """
    if _key(rate) in grid["matched_epochs"]:
        return grid["matched_epochs"][_key(rate)]
    total = total_epochs(options, options.epochs)
    if grid["match"] == "flops":
        own = flops_of_epochs(grid, "rdp", rate, total)
        if own is None:
            raise UsageError(
                f"--match flops: the operations of {options.model} cannot be counted without "
                "data; give --match updates or --match time"
            )
        ratio = own / flops_of_epochs(grid, "droppath", rate, total)
    elif grid["match"] == "updates":
        own = updates_per_batch("rdp", grid["costs"][_key(rate)], options.rdp_every)
        ratio = over_run(own, 1.0, total, options.rdp_start_epoch) / total
    elif seconds is None:
        return None
    else:
        ratio = seconds["rdp"] / seconds["droppath"]
    grid["matched_epochs"][_key(rate)] = matched_epochs(options, ratio)
    return grid["matched_epochs"][_key(rate)]
