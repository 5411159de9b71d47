"""`timm-rdp compare`: variants x seeds x drop rates, trained alike and compared honestly."""

import argparse
import fcntl
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from timm.utils.distributed import is_distributed_env

from timm_rdp.args import Parser, show_defaults
from timm_rdp.errors import TrainingError, UsageError, refused_with, report
from timm_rdp.study.compare import grid as grids
from timm_rdp.study.compare import measured, runs
from timm_rdp.study.compare.report import write_report
from timm_rdp.study.compare.results import read_results
from timm_rdp.study.features.models import MIN_IMAGES, check_chosen
from timm_rdp.study.options import RATE, at_least, check_installed, check_output
from timm_rdp.training.flags import COUNT, SEED, flag


def build_parser() -> Parser:
    """The options of `timm-rdp compare`; all others are the training script's."""
    parser = Parser(
        prog="timm-rdp compare",
        description="Train variants x seeds x drop rates, everything else identical, and say what "
        "the results support. All other flags go to the training script (timm-rdp train --help).",
        epilog="The same command again goes on: finished runs are skipped, interrupted ones "
        "resumed; more seeds, variants and rates may be asked for. Writes runs.csv, table.md, "
        f"table.csv and comparison.png. {runs.MATCHED} gets epochs for the FLOPs of rdp.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    # fmt: off
    add("--variants", nargs="+", default=["droppath", "rdp"], choices=runs.VARIANTS, metavar="V",
        help=f"of {', '.join(runs.VARIANTS)} (default: droppath rdp)")
    add("--seeds", type=COUNT, default=5, help="seeds per variant and drop rate")
    add("--first-seed", type=SEED, default=0, help="the first of them (default: 0)")
    add("--drop-paths", type=RATE, nargs="+", metavar="RATE",
        help="drop rates (default: the recipe's, else 0.1); without: plain of --variants")
    add("--jobs", type=COUNT, default=1, help="runs at a time")
    add("--measure", type=at_least(MIN_IMAGES), metavar="N",
        help="measure the runs on N validation images: calibration, accuracy with paths removed "
        "and on damaged images")
    add("--retry", action="store_true", help="run those again that failed")
    add("--pick", choices=("last", "best"), default="last",
        help="the epoch that counts; best is picked on the validation set")
    add("--output", default="output/compare", metavar="DIR", help="folder to write into")
    add("--report", metavar="DIR", help="train nothing, redraw from what is in DIR")
    # fmt: on
    return show_defaults(parser)


def main(argv: list[str] | None = None) -> int:
    """Run `timm-rdp compare`.

    The exit status is 1 where runs failed, 2 for options that cannot be used, 128 + N where signal
    N stopped it, else 0.
    """
    parser = build_parser()
    try:
        args, rest = parser.parse_known_args(argv)
        check_installed("matplotlib", "scipy")
        if args.report is None:
            return compare(args, rest)
        changed = [k for k, v in vars(args).items() if v != parser.get_default(k)]
        extra = [flag(name) for name in changed if name not in ("report", "pick")] + rest
        if extra:
            raise UsageError(f"--report trains nothing: leave out {' '.join(extra)}")
        print(write_report(Path(args.report), args.pick))
    except (UsageError, TrainingError) as error:
        return report(error)
    except KeyboardInterrupt:  # before there was a run to stop
        return 128 + signal.SIGINT
    return 0


def compare(args: argparse.Namespace, rest: list[str]) -> int:
    """Check everything, do the runs that are missing, write the report."""
    if is_distributed_env():
        raise UsageError("started by torchrun or the like: each run is one process; start it plain")
    for name in ("variants", "drop_paths"):
        values = getattr(args, name) or ()
        if len(set(values)) < len(values):
            raise UsageError(f"{flag(name)} {' '.join(map(str, values))}: one is given twice")
    options, rate = grids.read_recipe(rest, args.variants)
    rates = args.drop_paths or [rate]
    if args.measure:
        if options.split_bn:
            raise UsageError("--measure: a network without --split-bn is measured; leave one out")
        check_chosen(options)
    output = check_output(args.output)
    grid = grids.same_grid(output, options)
    grids.check_runs(options, args.variants, rates, grid)
    if args.measure:
        grid["measure"] = args.measure
        if "inference" not in grid:
            grid["inference"] = measured.inference_flops(options)
    read_results(output, grid, args.pick)  # what is damaged is refused before anything is written
    cells = []  # seed by seed, so that what there is can be compared at any time
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        cells += [runs.Cell("plain", None, seed)] if "plain" in args.variants else []
        cells += [runs.Cell(v, r, seed) for r in rates for v in args.variants if v != "plain"]
    grid["runs"] = sorted({cell.name for cell in cells}.union(grid["runs"]))

    (output / "runs").mkdir(parents=True, exist_ok=True)
    with locked(output) as lock:
        grids.write_grid(output, grid, options)
        trainings = [runs.training_of(cell, output, options, grid) for cell in cells]
        ended = (runs.DONE, runs.DIVERGED)
        skipped = ended if args.retry else (*ended, runs.FAILED)
        missing = [t for t in trainings if runs.read_record(t.folder)["status"] not in skipped]
        stop = runs.train_all(missing, runs.slot_environments(args.jobs, options.device), lock)
        status = {t.folder: runs.read_record(t.folder)["status"] for t in trainings}
        if args.measure and not stop:
            done = [folder for folder, own in status.items() if own == runs.DONE]
            measured.measure_runs(done, args.measure, options.device)
    print(write_report(output, args.pick))
    if stop:
        print("stopped; the same command goes on", file=sys.stderr)
        return 128 + stop
    if left := [folder for folder, own in status.items() if own not in ended]:
        raise TrainingError(
            f"{len(left)} of {len(cells)} runs failed or did not finish, the first one is "
            f"{left[0].name} (see {left[0]}.log); the same command goes on, --retry also with "
            "those that failed"
        )
    return 0


@contextmanager
def locked(output: Path) -> Iterator[int]:
    """Keep other comparisons out of the folder while this one, or a run of it, is alive."""
    with open(output / ".lock", "w") as lock:
        with refused_with(f"--output {output}: another comparison is at work there, wait for it"):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield lock.fileno()
