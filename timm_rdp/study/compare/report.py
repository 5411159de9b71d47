"""What a comparison leaves behind: runs.csv, table.csv, table.md, comparison.png."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from timm_rdp.errors import UsageError
from timm_rdp.study.compare.figure import draw
from timm_rdp.study.compare.grid import read_grid
from timm_rdp.study.compare.results import Result, Row, read_results, tabulate
from timm_rdp.study.compare.runs import DIVERGED, FAILED, MATCHED
from timm_rdp.study.compare.stats import REFERENCES, Comparison, Mean, p_text, sentences, signed
from timm_rdp.study.figures import save
from timm_rdp.training.files import write_atomically

OUTPUTS = ("runs.csv", "table.csv", "table.md", "comparison.png")
Table = Mapping[float, Sequence[Row]]  # by drop rate


def write_report(output: Path, pick: str = "last") -> str:
    """Write the four outputs from what a folder holds, finished or not, and return what it says.

    Args:
        output: the folder of the comparison.
        pick: "last" epoch of each run, or "best".

    Raises:
        UsageError: there is no comparison, or no run that has begun.
    """
    grid = read_grid(output)
    if grid is None:
        raise UsageError(f"--report {output}: holds no comparison (no grid.json); check the folder")
    results = read_results(output, grid, pick)
    if not results:
        raise UsageError(f"--report {output}: holds no run yet; start it without --report")
    table, comparisons = tabulate(results)
    notes = _notes(table, comparisons, grid, pick)
    said = _said(table, comparisons)
    _write_csv(output / "runs.csv", RUN_COLUMNS, (_run_cells(r) for r in results))
    _write_csv(output / "table.csv", *_table_csv(table))
    text = "\n".join([*_table_md(table, grid), *said, "", *notes]) + "\n"
    write_atomically(str(output / "table.md"), text.encode())
    image = io.BytesIO()
    save(draw(table, grid["options"]["model"], pick), image)
    write_atomically(str(output / "comparison.png"), image.getvalue())
    return "\n".join([*said, f"{', '.join(OUTPUTS)} are in {output}"])


RUN_COLUMNS = (
    "variant", "drop_path", "seed", "status", "epochs", "top1", "eval_loss", "train_loss",
    "seconds", "flops", "error",
)  # fmt: skip


def _run_cells(r: Result) -> tuple:
    rate = 0.0 if r.run.drop_path is None else r.run.drop_path
    numbers = (r.top1, r.eval_loss, r.train_loss, r.seconds, r.flops)
    return (r.run.variant, rate, r.run.seed, r.status, r.epochs, *map(_cell, numbers), r.error)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.10g}"


def _table_csv(table: Table) -> tuple[list[str], list[list]]:
    header = ["drop_path", "variant", "epochs", "seeds", "diverged", "failed", "unfinished"]
    header += ["mean", "sd", "low", "high"]
    for reference in REFERENCES:
        columns = ("pairs", "difference", "sd", "low", "high", "p", "p_corrected")
        header += [f"{column}_to_{reference}" for column in columns]
    header += ["seconds", "flops", "relative_flops"]
    lines = []
    for row in (row for rows in table.values() for row in rows):
        counts = (row.count(DIVERGED), row.count(FAILED), row.unfinished)
        cells = [row.drop_path, row.variant, row.epochs, row.top1.n, *counts]
        cells += map(_cell, (row.top1.mean, row.top1.sd, row.top1.low, row.top1.high))
        for reference in REFERENCES:
            c = row.comparisons.get(reference)
            if c is None:
                cells += [""] * 7
                continue
            d = c.difference
            numbers = (d.mean, d.sd, d.low, d.high, c.p, c.corrected)
            cells += [d.n, *map(_cell, numbers)]
        cells += map(_cell, (row.seconds, row.flops, row.relative))
        lines.append(cells)
    return header, lines


def _table_md(table: Table, grid: dict[str, Any]) -> list[str]:
    options = grid["options"]
    folder = Path(options["data_dir"] or "").name
    data = options["dataset"] or folder or "the demo (handwritten digits)"
    lines = [f"# {options['model']} on {data}"]
    every = [row for rows in table.values() for row in rows]
    against = [r for r in REFERENCES if any(r in row.comparisons for row in every)]
    heading = ["variant", "epochs", "seeds", "top-1, %", "sd", "95 % interval"]
    for reference in against:
        heading += [f"minus {reference}", "p", "corrected"]
    heading += ["median time", "FLOPs", "relative"]
    for rate, rows in table.items():
        lines += ["", f"## Drop path {rate:g}", "", _line(heading), _line(["---"] * len(heading))]
        for row in rows:
            m = row.top1
            seeds = ", ".join(filter(None, (str(m.n), row.missing)))
            cells = [row.variant, _number(row.epochs, "d"), seeds]
            cells += [_number(m.mean, ".2f"), _number(m.sd, ".2f"), _interval(m, "{:.2f}".format)]
            for reference in against:
                c = row.comparisons.get(reference)
                if c is None:
                    cells += ["", "", ""]
                    continue
                d = c.difference
                paired = "" if d.n == row.top1.n else f" ({d.n} pairs)"
                mean = "" if d.mean is None else signed(d.mean)
                cells.append(f"{mean} {_interval(d, signed)}{paired}".strip())
                cells += [
                    "" if p is None else p_text(p)[2:].strip("= ") for p in (c.p, c.corrected)
                ]
            cells += [_time(row.seconds), _number(row.flops, ".3g"), _number(row.relative, ".2f")]
            lines.append(_line(cells))
    return [*lines, ""]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _interval(m: Mean, text: Callable[[float], str]) -> str:
    if m.n == 1:
        return "(one seed: none)"
    return "" if m.low is None else f"[{text(m.low)}, {text(m.high)}]"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _said(table: Table, comparisons: Sequence[Comparison]) -> list[str]:
    said = sentences(comparisons)
    if not said:
        said = ["There are no runs of droppath to compare with: add droppath to --variants."]
    missing = {}  # plain is in the rows of every rate
    for rate, rows in table.items():
        for row in rows:
            place = row.variant if row.variant == "plain" else f"{row.variant} at {rate:g}"
            missing[place] = row.missing
    if any(missing.values()):
        listed = "; ".join(f"{place}: {what}" for place, what in missing.items() if what)
        said.append(f"Runs that are not in the means: {listed}.")
    return [f"- {line}" for line in said]


def _notes(
    table: Table, comparisons: Sequence[Comparison], grid: dict[str, Any], pick: str
) -> list[str]:
    tests = sum(c.p is not None for c in comparisons)
    epoch = (
        "after the last epoch, so that nothing is picked on it"
        if pick == "last"
        else "in the best epoch of each run: picked on that very set, and so flattering to all"
    )
    notes = [
        f"Top-1 is in per cent on the validation set, {epoch}. Differences are in points, paired "
        "by seed: the same initial weights and the same order of the data.",
        "Intervals are 95 %, from the t distribution, not corrected for their number. p is that of "
        "the two-sided paired t test (scipy.stats.ttest_rel); corrected p is after Holm's "
        f"correction over the {tests} {'test' if tests == 1 else 'tests'} of this table, and below "
        "0.05 counts as a difference.",
        "FLOPs are those of forward and backward passes, counted operation by operation and "
        "averaged over drop masks, for all epochs; relative is to droppath. Dropped paths are not "
        "run by rdp and droppath-batch, but are by timm's droppath. Time is the median run's, "
        "training and validation without the start of the process.",
    ]
    if any(costs["update"] is None for costs in grid["costs"].values()):
        notes.append("The FLOPs of this model could not be counted without data.")
    if any(row.variant == MATCHED for rows in table.values() for row in rows):
        what = {
            "flops": "by counted FLOPs",
            "updates": "by optimizer updates",
            "time": "by measured time",
        }
        notes.append(
            "droppath-matched is droppath with the number of --epochs whose cost comes nearest to "
            f"that of rdp, {what[grid['match']]}, and never with fewer than the others."
        )
    return [line for note in notes for line in (note, "")][:-1]


def _write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    write_atomically(str(path), text.getvalue().encode())
