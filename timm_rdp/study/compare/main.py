"""`timm-rdp compare`: variants x seeds x drop rates, trained alike and compared honestly."""

import argparse
import fcntl
import importlib.util
import os
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml
from timm.utils.distributed import is_distributed_env

from timm_rdp.errors import TrainingError, UsageError, nearest
from timm_rdp.study.compare.cost import total_epochs
from timm_rdp.study.compare.grid import (
    check_runs,
    rdp_options,
    read_recipe,
    same_grid,
    settle_matched,
    shared_options,
    write_grid,
)
from timm_rdp.study.compare.report import OUTPUTS, write_report
from timm_rdp.study.compare.results import read_results
from timm_rdp.study.compare.runs import (
    DIVERGED,
    DONE,
    FAILED,
    MATCHED,
    RECIPE,
    VARIANTS,
    Job,
    Progress,
    Run,
    all_runs,
    read_record,
    run_jobs,
    slot_environments,
    variant_flags,
)
from timm_rdp.study.figures import check_matplotlib
from timm_rdp.training.checks import flag
from timm_rdp.training.files import check_output, write_atomically


def build_parser() -> argparse.ArgumentParser:
    """The options of `timm-rdp compare`; all others are the training script's."""
    parser = argparse.ArgumentParser(
        prog="timm-rdp compare",
        usage="timm-rdp compare [-h] [--variants V [V ...]] [--seeds N] [--first-seed N] "
        "[--drop-paths R [R ...]]\n       [--match {flops,updates,time}] [--jobs N] [--retry] "
        "[--pick {last,best}] [--output DIR]\n       FLAGS OF TIMM-RDP TRAIN\n"
        "       timm-rdp compare --report DIR [--pick {last,best}]",
        description="Train variants x seeds x drop rates, everything else identical, and say what "
        "the results support. All other flags go to the training script (timm-rdp train --help).",
        epilog="The same command again goes on: finished runs are skipped, interrupted ones "
        "resumed; more seeds, variants and rates may be asked for. Writes runs.csv, table.md, "
        "table.csv and comparison.png.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    # fmt: off
    add("--variants", nargs="+", default=["droppath", "rdp"], metavar="V",
        help=f"of {', '.join(VARIANTS)} (default: droppath rdp)")
    add("--seeds", type=int, default=5, metavar="N",
        help="seeds per variant and drop rate (default: 5)")
    add("--first-seed", type=int, default=0, metavar="N", help="the first of them (default: 0)")
    add("--drop-paths", type=float, nargs="+", metavar="R",
        help="drop rates (default: the recipe's, else 0.1)")
    add("--match", choices=("flops", "updates", "time"), default="flops",
        help=f"of what {MATCHED} gets as much as rdp: counted FLOPs, counted updates, or time as "
        "measured in the runs of droppath and rdp (default: flops)")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    add("--retry", action="store_true", help="run those again that failed")
    add("--pick", choices=("last", "best"), default="last",
        help="the epoch that counts; best is picked on the validation set (default: last)")
    add("--output", default="output/compare", metavar="DIR",
        help="folder to write into (default: output/compare)")
    add("--report", metavar="DIR", help="train nothing, redraw from what is in DIR")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run `timm-rdp compare`.

    Returns:
        exit status: 0, 1 where runs failed, 2 for options that cannot be used, 128 + N where
        signal N stopped it
    """
    parser = build_parser()

    def refuse(message: str) -> None:
        raise UsageError(f"{message.removeprefix('argument ')} (see --help)")

    parser.error = refuse
    try:
        args, rest = parser.parse_known_args(argv)
        _check_libraries()
        if args.report is None:
            return compare(args, rest)
        if not args.report:
            raise UsageError("--report '': name the folder of a comparison")
        changed = [k for k, v in vars(args).items() if v != parser.get_default(k)]
        extra = [flag(name) for name in changed if name not in ("report", "pick")] + rest
        if extra:
            raise UsageError(f"--report trains nothing: leave out {' '.join(extra)}")
        print(write_report(Path(args.report), args.pick))
    except UsageError as error:
        print(f"timm-rdp compare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before there was a run to stop
        return 128 + signal.SIGINT
    except TrainingError as error:  # a full disk
        print(f"timm-rdp compare: {error}", file=sys.stderr)
        return 1
    return 0


def compare(args: argparse.Namespace, rest: list[str]) -> int:
    """Check everything, do the runs that are missing, write the report.

    Args:
        args: compare's own options.
        rest: the training script's.

    Raises:
        UsageError: something cannot be followed; nothing was written.
    """
    _check_own(args)
    options, rate = read_recipe(rest, args.variants)
    rates = args.drop_paths or [rate]
    output = check_output(args.output)
    grid = same_grid(output, options, args.match, OUTPUTS)
    check_runs(options, args.variants, rates, args.first_seed + args.seeds - 1, output, grid)
    if MATCHED in args.variants:
        for rate in rates:
            settle_matched(grid, options, rate)

    read_results(output, grid, args.pick)  # what is damaged is refused before anything is written
    asked = {run.name for run in _runs(args, rates)}
    grid["runs"] = sorted(asked.union(grid.get("runs", ())))

    try:
        (output / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--output {output}: cannot be made ({error.strerror}); name another folder"
        ) from None
    lock = _lock(output)
    try:
        write_grid(output, grid)
        write_atomically(str(output / RECIPE), yaml.safe_dump(shared_options(options)).encode())
        stop = _train(args, options, rates, grid, lock)
    finally:
        os.close(lock)
    if all_runs(output):  # else it was stopped before the first one began
        print(write_report(output, args.pick))
    if stop:
        print("timm-rdp compare: stopped; the same command goes on", file=sys.stderr)
        return 128 + stop
    return _tell_of_the_rest(_runs(args, rates), output)


def _tell_of_the_rest(wanted: list[Run], output: Path) -> int:
    """Say which runs there are no results of; returns the exit status."""
    statuses = {run.name: read_record(output, run)["status"] for run in wanted}
    failed = [name for name, status in statuses.items() if status == FAILED]
    unfinished = [n for n, status in statuses.items() if status not in (DONE, DIVERGED, FAILED)]
    if failed:
        print(
            f"timm-rdp compare: {len(failed)} of {len(wanted)} runs failed, the first one is "
            f"{failed[0]} (see {output / 'runs' / failed[0]}.log); --retry runs them again",
            file=sys.stderr,
        )
    if unfinished:
        print(
            f"timm-rdp compare: {len(unfinished)} of {len(wanted)} runs are not finished, the "
            f"first one is {unfinished[0]}; the same command goes on",
            file=sys.stderr,
        )
    return 1 if failed or unfinished else 0


def _check_libraries() -> None:
    check_matplotlib()
    if importlib.util.find_spec("scipy") is None:
        raise UsageError(
            'scipy is not installed and the tests need it: pip install "timm-rdp[demo]"'
        )


def _check_own(args: argparse.Namespace) -> None:
    if is_distributed_env():
        raise UsageError("started by torchrun or the like: each run is one process; start it plain")
    for name in ("variants", "drop_paths"):
        values = getattr(args, name) or []
        double = next((v for i, v in enumerate(values) if v in values[:i]), None)
        if double is not None:
            raise UsageError(f"{flag(name)}: {double} is given twice")
    for variant in args.variants:
        if variant not in VARIANTS:
            near = nearest(variant, VARIANTS) or f"; there are {', '.join(VARIANTS)}"
            raise UsageError(f"--variants {variant}: unknown variant{near}")
    for rate in args.drop_paths or []:
        if not 0 < rate < 1:
            raise UsageError(
                f"--drop-paths {rate}: must lie between 0 and 1, both excluded; for runs without "
                "drop path add plain to --variants"
            )
    for name, least in (("seeds", 1), ("first_seed", 0), ("jobs", 1)):
        if getattr(args, name) < least:
            value = getattr(args, name)
            raise UsageError(f"{flag(name)} {value}: must be {least} or more")
    if MATCHED in args.variants and args.match == "time":
        for needed in ("droppath", "rdp"):
            if needed not in args.variants:
                raise UsageError(
                    f"--match time measures droppath and rdp: add {needed} to --variants"
                )


def _lock(output: Path) -> int:
    """Keep other comparisons out of the folder while this one, or a run of it, is alive."""
    lock = os.open(output / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise UsageError(
            f"--output {output}: another comparison is at work there, or a run that one left "
            "behind; wait for it, or name another folder"
        ) from None
    return lock


def _runs(args: argparse.Namespace, rates: list[float]) -> list[Run]:
    """The grid, seed by seed, so that what there is can be compared at any time."""
    runs = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        runs += [Run("plain", None, seed)] if "plain" in args.variants else []
        runs += [Run(v, r, seed) for r in rates for v in args.variants if v != "plain"]
    return runs


def _train(
    args: argparse.Namespace,
    options: argparse.Namespace,
    rates: list[float],
    grid: dict[str, Any],
    lock: int,
) -> int:
    """Do the runs that are missing; returns the signal that stopped them, else 0."""
    output = Path(args.output)
    skipped = (DONE, DIVERGED) if args.retry else (DONE, DIVERGED, FAILED)
    missing = [r for r in _runs(args, rates) if read_record(output, r)["status"] not in skipped]
    environments = slot_environments(args.jobs, options.device)

    def job(run: Run) -> Job:
        flags = variant_flags(run.variant, run.drop_path, rdp_options(options))
        flags += ["--seed", str(run.seed), "--data-seed", str(run.seed)]
        epochs = options.epochs
        if run.variant == MATCHED:
            epochs = grid["matched_epochs"].get(str(run.drop_path), epochs)
            flags += ["--epochs", str(epochs)]
        return Job(run, tuple(flags), total_epochs(options, epochs))

    def known(run: Run) -> bool:
        return run.variant != MATCHED or str(run.drop_path) in grid["matched_epochs"]

    first = [run for run in missing if known(run)]
    later = [run for run in missing if not known(run)]
    progress = Progress([job(run) for run in missing], output)
    try:
        stop = run_jobs([job(run) for run in first], output, environments, progress, lock)
        if stop or not later:
            return stop
        for rate in rates:
            _settle_by_time(grid, options, rate, output)
        write_grid(output, grid)
        jobs = [job(run) for run in later if known(run)]
        progress.more_epochs(sum(j.epochs - total_epochs(options, options.epochs) for j in jobs))
        return run_jobs(jobs, output, environments, progress, lock)
    finally:
        progress.close()


def _settle_by_time(
    grid: dict[str, Any], options: argparse.Namespace, rate: float, output: Path
) -> None:
    """Match droppath to the time that rdp took, the median of the runs that were timed."""
    seconds = {}
    for variant in ("droppath", "rdp"):
        runs = [r for r in all_runs(output) if (r.variant, r.drop_path) == (variant, rate)]
        records = [read_record(output, run) for run in runs]
        times = [r["seconds"] for r in records if r["status"] == DONE and r["seconds"] is not None]
        if not times:
            print(
                f"timm-rdp compare: {MATCHED} at {rate} cannot be run: there is no finished run of "
                f"{variant} whose whole time was measured",
                file=sys.stderr,
            )
            return
        seconds[variant] = statistics.median(times)
    settle_matched(grid, options, rate, seconds)
