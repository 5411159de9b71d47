"""What the runs of a comparison came to, variant by variant."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm_rdp.errors import refused_with
from timm_rdp.study.compare.grid import flops_of_epochs
from timm_rdp.study.compare.runs import (
    DIVERGED,
    DONE,
    FAILED,
    VARIANTS,
    Cell,
    all_cells,
    damaged,
    read_record,
    summary_rows,
)
from timm_rdp.study.compare.stats import Comparison, Mean, compare, mean_of

MEASURED = {"top1": "eval_top1", "eval_loss": "eval_loss", "train_loss": "train_loss"}
NOT_BEGUN = "not begun"


@dataclass
class Result:
    """What a run came to; numbers that it did not come to are None."""

    cell: Cell
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
    top1: Mean = field(init=False)
    seconds: float | None = field(init=False)  # the median run's
    flops: float | None = field(init=False)
    relative: float | None = None  # flops over those of droppath
    comparisons: dict[str, Comparison] = field(default_factory=dict)  # by reference

    def __post_init__(self):
        seconds = [r.seconds for r in self.done if r.seconds is not None]
        self.top1 = mean_of([r.top1 for r in self.done if r.top1 is not None])
        self.seconds = statistics.median(seconds) if seconds else None
        self.flops = self.done[0].flops if self.done else None

    @property
    def done(self) -> list[Result]:
        return [r for r in self.results if r.status == DONE]

    @property
    def epochs(self) -> int | None:
        return self.done[0].epochs if self.done else None

    @property
    def counts(self) -> dict[str, int]:
        """How many runs are not in the mean, by what kept them out of it."""
        ended = {s: sum(r.status == s for r in self.results) for s in (DIVERGED, FAILED)}
        unfinished = len(self.results) - len(self.done) - sum(ended.values())
        return ended | {"unfinished": unfinished}

    @property
    def missing(self) -> str:
        """The counts as text; '' where all runs are in the mean."""
        return ", ".join(f"{count} {kind}" for kind, count in self.counts.items() if count)


def read_results(output: Path, grid: dict[str, Any], pick: str) -> list[Result]:
    """What every run in a folder, or asked for, came to, finished or not.

    Args:
        output: the folder of the comparison.
        grid: what its grid.json says.
        pick: "last" epoch of each run, or "best".

    Raises:
        UsageError: what there is of one is damaged.
    """
    return [_result(output, cell, grid, pick) for cell in all_cells(output, grid.get("runs", ()))]


def _result(output: Path, cell: Cell, grid: dict[str, Any], pick: str) -> Result:
    record = read_record(output, cell)
    measured: dict[str, float | None] = dict.fromkeys(MEASURED)
    if record["status"] == DONE:
        rows = summary_rows(output / "runs" / cell.name)
        with refused_with(damaged(output / "runs" / cell.name)):
            row = max(rows, key=lambda r: float(r["eval_top1"])) if pick == "best" else rows[-1]
            measured = {name: float(row[column]) for name, column in MEASURED.items()}
            if not all(map(math.isfinite, measured.values())):
                raise ValueError(f"not a finite number in {row}")
    return Result(
        cell=cell,
        status=record["status"] or NOT_BEGUN,
        epochs=record["epochs"],
        **measured,
        seconds=record["seconds"],
        flops=flops_of_epochs(grid, cell.variant, cell.drop_path, record["epochs"]),
        error=record["error"],
    )


def tabulate(results: Sequence[Result]) -> tuple[dict[float, list[Row]], list[Comparison]]:
    """The rows of each drop rate, in the order of VARIANTS, and every comparison among them."""
    rates = sorted({r.cell.drop_path for r in results if r.cell.drop_path is not None}) or [0.0]
    cells: dict[tuple[str, float | None], list[Result]] = {}
    for result in results:
        cells.setdefault((result.cell.variant, result.cell.drop_path), []).append(result)
    scores = {
        cell: {r.cell.seed: r.top1 for r in own if r.top1 is not None}
        for cell, own in cells.items()
    }
    comparisons = compare(scores, rates)
    table = {}
    for rate in rates:
        place = {v: (v, None if v == "plain" else rate) for v in VARIANTS}
        rows = [Row(rate, v, cells[place[v]]) for v in VARIANTS if place[v] in cells]
        usual = next((row.flops for row in rows if row.variant == "droppath"), None)
        for row in rows:
            row.relative = row.flops / usual if row.flops and usual else None
            own = [c for c in comparisons if (c.drop_path, c.variant) == (rate, row.variant)]
            row.comparisons = {c.reference: c for c in own}
        table[rate] = rows
    return table, comparisons
