"""What the runs of a comparison came to: means with intervals, paired tests, their correction."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from timm_rdp.study.compare import runs
from timm_rdp.study.compare.grid import flops_of_epochs

MEASURED = {"top1": "eval_top1", "eval_loss": "eval_loss", "train_loss": "train_loss"}
REFERENCES = ("droppath", "droppath-matched")
LEVEL = 0.05


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


class Mean(NamedTuple):
    """Mean of some values, their standard deviation (divisor n - 1) and the mean's 95 % interval.

    What the number of values does not allow is None.
    """

    n: int
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None


@dataclass
class Comparison:
    """A variant against a reference at one drop rate, paired by seed.

    Attributes:
        difference: variant minus reference, over the seeds that are done in both.
        p: of the paired t test, two-sided; None where there can be none.
        corrected: p after Holm's correction over all comparisons of the table.
    """

    drop_path: float
    variant: str
    reference: str
    difference: Mean
    p: float | None
    corrected: float | None = None


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
        self.counts = ended | {"unfinished": unfinished}  # of what is left out of the mean

    @property
    def missing(self) -> str:
        """The counts as text; '' where all runs are in the mean."""
        return ", ".join(f"{count} {kind}" for kind, count in self.counts.items() if count)


def read_results(output: Path, grid: dict[str, Any], pick: str) -> list[Result]:
    """What every run that was asked for came to by its "last" or its "best" epoch.

    Raises:
        UsageError: what there is of one is damaged.
    """
    return [_result(output, cell, grid, pick) for cell in runs.cells_of(grid["runs"])]


def _result(output: Path, cell: runs.Cell, grid: dict[str, Any], pick: str) -> Result:
    folder = output / "runs" / cell.name
    record = runs.read_record(folder)
    measured: dict[str, Any] = dict.fromkeys(MEASURED)
    if record.status == runs.DONE:
        _, rows = runs.read_summary(folder)
        with runs.damage_named(folder):
            row = max(rows, key=lambda r: float(r["eval_top1"])) if pick == "best" else rows[-1]
            measured = {name: float(row[column]) for name, column in MEASURED.items()}
            if not all(map(math.isfinite, measured.values())):
                raise ValueError(f"not finite: {row}")
    flops = flops_of_epochs(grid, cell.variant, cell.drop_path, record.epochs)
    numbers = {**vars(record), **measured, "flops": flops}
    return Result(cell.variant, cell.drop_path or 0.0, cell.seed, **numbers)


def tabulate(results: Sequence[Result]) -> tuple[dict[float, list[Row]], list[Comparison]]:
    """The rows of each drop rate, in the order of VARIANTS, and every comparison among them."""
    table = {}
    for rate in sorted({r.drop_path for r in results if r.variant != "plain"}) or [0.0]:
        place = {v: 0.0 if v == "plain" else rate for v in runs.VARIANTS}
        own = {v: [r for r in results if (r.variant, r.drop_path) == (v, place[v])] for v in place}
        table[rate] = [Row(rate, variant, of_it) for variant, of_it in own.items() if of_it]
    comparisons = []
    for rows, (i, reference) in product(table.values(), enumerate(REFERENCES)):
        of_variant = {row.variant: row for row in rows}
        # A reference is not compared with itself, nor is a pair the other way round.
        for row in rows if reference in of_variant else ():
            if row.variant not in REFERENCES[: i + 1]:
                row.comparisons[reference] = _compare(row, of_variant[reference])
                comparisons.append(row.comparisons[reference])
        usual = of_variant["droppath"].flops if "droppath" in of_variant else None
        for row in rows:
            row.relative = row.flops / usual if row.flops and usual else None
    for comparison, p in zip(comparisons, holm([c.p for c in comparisons]), strict=True):
        comparison.corrected = p
    return table, comparisons


def _compare(row: Row, reference: Row) -> Comparison:
    seeds = sorted(row.scores.keys() & reference.scores.keys())
    a, b = [row.scores[s] for s in seeds], [reference.scores[s] for s in seeds]
    difference = mean_of([x - y for x, y in zip(a, b, strict=True)])
    return Comparison(row.drop_path, row.variant, reference.variant, difference, paired_p(a, b))


def mean_of(values: Sequence[float]) -> Mean:
    """Mean, standard deviation and 95 % interval (t distribution) of values."""
    n = len(values)
    if n < 2:
        return Mean(n, values[0] if n else None, None, None, None)
    from scipy.stats import t

    mean, sd = statistics.fmean(values), statistics.stdev(values)
    half = float(t.ppf(1 - LEVEL / 2, n - 1)) * sd / n**0.5
    return Mean(n, mean, sd, mean - half, mean + half)


def paired_p(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Two-sided p of the paired t test of a against b, (n,) each.

    Returns:
        1 where they are equal; None for fewer than two pairs, and where all pairs differ by the
        same amount, which a t test takes for certainty
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    if len(differences) < 2:
        return None
    rounding = 1e-9 * max(1.0, *map(abs, (*a, *b)))
    if max(differences) - min(differences) <= rounding:
        return 1.0 if abs(differences[0]) <= rounding else None
    from scipy.stats import ttest_rel

    return float(ttest_rel(a, b).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction; None, where there was no test, stays None and does not count."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        corrected[i] = largest
    return corrected


def sentences(comparisons: Sequence[Comparison]) -> list[str]:
    """What the comparisons of ResidualDroppath support; those of all where there are none of it."""
    about_rdp = [c for c in comparisons if c.variant in runs.RDP_VARIANTS]
    return [
        _sentence(c)
        for c in sorted(about_rdp or comparisons, key=lambda c: (c.drop_path, c.variant))
    ]


def _sentence(c: Comparison) -> str:
    start = f"{c.variant} - {c.reference} at {c.drop_path:g}: "
    n, mean, _, low, high = c.difference
    if mean is None:
        return start + "no seed is done in both, so that nothing can be said."
    if low is None or high is None:
        return start + f"{signed(mean)} points, one seed: no interval or test can be given."
    start += f"{signed(mean)} points [{signed(low)}, {signed(high)}], {n} seeds, "
    if c.corrected is None:
        return start + "the same difference in every seed: no test can be given."
    start += f"corrected {p_text(c.corrected)}: "
    if c.corrected >= LEVEL:
        alone = c.p is not None and c.p < LEVEL
        return start + f"no difference {'that holds after correction' if alone else 'seen'}."
    return start + f"{c.variant} is {'better' if mean > 0 else 'worse'}."


def signed(value: float) -> str:
    """A difference as text, never -0.00."""
    return f"{round(value, 2) + 0.0:+.2f}"


def p_text(p: float) -> str:
    """A p value as text."""
    return f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"
