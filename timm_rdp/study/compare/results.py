"""What the runs of a comparison came to, variant by variant."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm_rdp.study.compare.grid import flops_of_epochs
from timm_rdp.study.compare.runs import (
    DIVERGED,
    DONE,
    FAILED,
    VARIANTS,
    Run,
    all_runs,
    damaged,
    read_record,
    summary_rows,
)
from timm_rdp.study.compare.stats import Comparison, Mean, compare, mean_of

MEASURED = ("top1", "eval_loss", "train_loss")
NOT_BEGUN = "not begun"


@dataclass
class Result:
    """What a run came to; numbers that it did not come to are None."""

    run: Run
    status: str
    epochs: int
    top1: float | None
    eval_loss: float | None
    train_loss: float | None
    seconds: float | None
    flops: float | None
    error: str


@dataclass
class Row:
    """One variant at one drop rate, which for plain is the section's that it is shown in."""

    drop_path: float
    variant: str
    results: list[Result]
    top1: Mean
    seconds: float | None
    flops: float | None
    relative: float | None = None  # flops over those of droppath
    comparisons: dict[str, Comparison] = field(default_factory=dict)  # by reference

    def count(self, status: str) -> int:
        return sum(r.status == status for r in self.results)

    @property
    def unfinished(self) -> int:
        return len(self.results) - sum(self.count(s) for s in (DONE, DIVERGED, FAILED))

    @property
    def epochs(self) -> int | None:
        return next((r.epochs for r in self.results if r.status == DONE), None)

    @property
    def missing(self) -> str:
        """What kept runs out of the mean, as text; '' where all are in it."""
        counts = (self.count(DIVERGED), self.count(FAILED), self.unfinished)
        kinds = zip(counts, ("diverged", "failed", "unfinished"), strict=True)
        return ", ".join(f"{count} {kind}" for count, kind in kinds if count)


def read_results(output: Path, grid: dict[str, Any], pick: str) -> list[Result]:
    """What every run in a folder, or asked for, came to, finished or not.

    Args:
        output: the folder of the comparison.
        grid: what its grid.json says.
        pick: "last" epoch of each run, or "best".

    Raises:
        UsageError: what there is of one is damaged.
    """
    return [_result(output, run, grid, pick) for run in all_runs(output, grid.get("runs", ()))]


def _result(output: Path, run: Run, grid: dict[str, Any], pick: str) -> Result:
    record = read_record(output, run)
    measured: dict[str, float | None] = dict.fromkeys(MEASURED)
    if record["status"] == DONE:
        measured = _measured(output / "runs" / run.name, pick)
    return Result(
        run=run,
        status=record["status"] or NOT_BEGUN,
        epochs=record["epochs"],
        **measured,
        seconds=record["seconds"],
        flops=flops_of_epochs(grid, run.variant, run.drop_path, record["epochs"]),
        error=record["error"],
    )


def _measured(folder: Path, pick: str) -> dict[str, float]:
    rows = summary_rows(folder)
    try:
        row = max(rows, key=lambda r: float(r["eval_top1"])) if pick == "best" else rows[-1]
        columns = zip(MEASURED, ("eval_top1", "eval_loss", "train_loss"), strict=True)
        measured = {name: float(row[column]) for name, column in columns}
        if not all(map(math.isfinite, measured.values())):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise damaged(folder, "does not hold a number for each result") from None
    return measured


def tabulate(results: Sequence[Result]) -> tuple[dict[float, list[Row]], list[Comparison]]:
    """The rows of each drop rate, in the order of VARIANTS, and every comparison among them."""
    rates = sorted({r.run.drop_path for r in results if r.run.drop_path is not None}) or [0.0]
    cells: dict[tuple[str, float | None], list[Result]] = {}
    for result in results:
        cells.setdefault((result.run.variant, result.run.drop_path), []).append(result)
    scores = {
        cell: {r.run.seed: r.top1 for r in own if r.status == DONE} for cell, own in cells.items()
    }
    comparisons = compare(scores, rates)
    table = {}
    for rate in rates:
        place = {v: (v, None if v == "plain" else rate) for v in VARIANTS}
        rows = [_row(rate, v, cells[place[v]]) for v in VARIANTS if place[v] in cells]
        usual = next((row.flops for row in rows if row.variant == "droppath"), None)
        for row in rows:
            row.relative = row.flops / usual if row.flops and usual else None
            own = [c for c in comparisons if (c.drop_path, c.variant) == (rate, row.variant)]
            row.comparisons = {c.reference: c for c in own}
        table[rate] = rows
    return table, comparisons


def _row(rate: float, variant: str, results: list[Result]) -> Row:
    done = [r for r in results if r.status == DONE]
    seconds = [r.seconds for r in done if r.seconds is not None]
    return Row(
        drop_path=rate,
        variant=variant,
        results=results,
        top1=mean_of([r.top1 for r in done]),
        seconds=statistics.median(seconds) if seconds else None,
        flops=done[0].flops if done else None,
    )
