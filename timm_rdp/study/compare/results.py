"""What the runs of a comparison came to, variant by variant."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm_rdp.study.compare import runs
from timm_rdp.study.compare.grid import flops_of_epochs
from timm_rdp.study.compare.stats import Comparison, compare, mean_of

MEASURED = {"top1": "eval_top1", "eval_loss": "eval_loss", "train_loss": "train_loss"}
NOT_BEGUN = "not begun"


@dataclass
class Result:
    """What a run came to; numbers that it did not come to are None, and plain's rate is 0."""

    variant: str
    drop_path: float
    seed: int
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
    relative: float | None = None  # flops over those of droppath
    comparisons: dict[str, Comparison] = field(default_factory=dict)  # by reference

    def __post_init__(self):
        done = [r for r in self.results if r.status == runs.DONE]
        self.epochs = done[0].epochs if done else None
        self.flops = done[0].flops if done else None
        seconds = [r.seconds for r in done if r.seconds is not None]
        self.seconds = statistics.median(seconds) if seconds else None
        self.scores = {r.seed: r.top1 for r in done if r.top1 is not None}
        self.top1 = mean_of(list(self.scores.values()))
        ended = {s: sum(r.status == s for r in self.results) for s in (runs.DIVERGED, runs.FAILED)}
        unfinished = len(self.results) - len(done) - sum(ended.values())
        self.counts = ended | {"unfinished": unfinished}  # of what is not in the mean

    @property
    def missing(self) -> str:
        """The counts as text; '' where all runs are in the mean."""
        return ", ".join(f"{count} {kind}" for kind, count in self.counts.items() if count)


def read_results(output: Path, grid: dict[str, Any], pick: str) -> list[Result]:
    """What every run in a folder, or asked for, came to by its "last" or its "best" epoch.

    Raises:
        UsageError: what there is of one is damaged.
    """
    return [
        _result(output, cell, grid, pick) for cell in runs.all_cells(output, grid.get("runs", ()))
    ]


def _result(output: Path, cell: runs.Cell, grid: dict[str, Any], pick: str) -> Result:
    folder = output / "runs" / cell.name
    record = runs.read_record(folder)
    measured: dict[str, Any] = dict.fromkeys(MEASURED)
    if record["status"] == runs.DONE:
        rows = runs.summary_rows(folder)
        with runs.damage_named(folder):
            row = max(rows, key=lambda r: float(r["eval_top1"])) if pick == "best" else rows[-1]
            values = [float(row[column]) for column in MEASURED.values()]
            if not all(map(math.isfinite, values)):
                raise ValueError(f"not finite: {row}")
            measured |= zip(MEASURED, values, strict=True)
    flops = flops_of_epochs(grid, cell.variant, cell.drop_path, record["epochs"])
    record["status"] = record["status"] or NOT_BEGUN
    return Result(cell.variant, cell.drop_path or 0.0, cell.seed, **record, **measured, flops=flops)


def tabulate(results: Sequence[Result]) -> tuple[dict[float, list[Row]], list[Comparison]]:
    """The rows of each drop rate, in the order of VARIANTS, and every comparison among them."""
    table = {}
    for rate in sorted({r.drop_path for r in results if r.variant != "plain"}) or [0.0]:
        place = {v: 0.0 if v == "plain" else rate for v in runs.VARIANTS}
        own = {v: [r for r in results if (r.variant, r.drop_path) == (v, place[v])] for v in place}
        table[rate] = [Row(rate, variant, of_it) for variant, of_it in own.items() if of_it]
    scores = {rate: {row.variant: row.scores for row in rows} for rate, rows in table.items()}
    comparisons = compare(scores)
    for rate, rows in table.items():
        usual = next((row.flops for row in rows if row.variant == "droppath"), None)
        for row in rows:
            row.relative = row.flops / usual if row.flops and usual else None
            own = [c for c in comparisons if (c.drop_path, c.variant) == (rate, row.variant)]
            row.comparisons = {c.reference: c for c in own}
    return table, comparisons
