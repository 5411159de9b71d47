"""What the runs of a comparison came to: means with intervals, paired tests, their correction."""

import math
import statistics
from collections import Counter, defaultdict
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

# A run as in runs.csv: numbers that it did not come to are None, and plain's drop_path is 0.
Result = dict[str, Any]


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
        done = [r for r in self.results if r["status"] == runs.DONE]
        self.epochs = done[0]["epochs"] if done else None
        self.flops = done[0]["flops"] if done else None
        seconds = [r["seconds"] for r in done if r["seconds"] is not None]
        self.seconds = statistics.median(seconds) if seconds else None
        self.scores = {r["seed"]: r["top1"] for r in done}
        self.top1 = mean_of(list(self.scores.values()))
        ended = Counter(r["status"] for r in self.results)
        self.counts = {s: ended[s] for s in (runs.DIVERGED, runs.FAILED)}  # not in the mean
        self.counts["unfinished"] = len(self.results) - len(done) - sum(self.counts.values())

    @property
    def missing(self) -> str:
        """The counts as text; '' where all runs are in the mean."""
        return ", ".join(f"{count} {kind}" for kind, count in self.counts.items() if count)


def read_results(output: Path, grid: dict[str, Any], pick: str) -> list[Result]:
    """What every run that was asked for came to by its "last" or its "best" epoch.

    Raises:
        UsageError: what there is of one is damaged.
    """
    results = []
    for cell in runs.cells_of(grid["runs"]):
        folder = output / "runs" / cell.name
        record = runs.read_record(folder)
        measured = dict.fromkeys(MEASURED)
        if record.status == runs.DONE:
            _, rows = runs.read_summary(folder)
            with runs.damage_named(folder):
                best = max(rows, key=lambda row: float(row["eval_top1"]))
                row = best if pick == "best" else rows[-1]
                measured = {name: float(row[column]) for name, column in MEASURED.items()}
                if not all(map(math.isfinite, measured.values())):
                    raise ValueError(f"not finite: {row}")
        place = {"variant": cell.variant, "drop_path": cell.drop_path or 0.0, "seed": cell.seed}
        place |= {"status": record.status, "epochs": record.epochs}
        flops = flops_of_epochs(grid, cell.variant, cell.drop_path, record.epochs)
        cost = {"seconds": record.seconds, "flops": flops, "error": record.error}
        results.append({**place, **measured, **cost})
    return results


def tabulate(results: Sequence[Result]) -> tuple[dict[float, list[Row]], list[Comparison]]:
    """The rows of each drop rate, in the order of VARIANTS, and every comparison among them."""
    table = {}
    cells = defaultdict(list)
    for result in results:
        cells[result["variant"], result["drop_path"]].append(result)
    for rate in sorted({rate for variant, rate in cells if variant != "plain"}) or [0.0]:
        place = {v: (v, 0.0 if v == "plain" else rate) for v in runs.VARIANTS}
        table[rate] = [Row(rate, v, cells[key]) for v, key in place.items() if key in cells]
    comparisons = []
    for rows, (i, reference) in product(table.values(), enumerate(REFERENCES)):
        of_variant = {row.variant: row for row in rows}
        # A reference is not compared with itself, nor is a pair the other way round.
        for row in rows if reference in of_variant else ():
            if row.variant in REFERENCES[: i + 1]:
                continue
            a, b = row.scores, of_variant[reference].scores
            differences = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
            difference, p = mean_of(differences), paired_p(differences)
            comparison = Comparison(row.drop_path, row.variant, reference, difference, p)
            row.comparisons[reference] = comparison
            comparisons.append(comparison)
        usual = of_variant["droppath"].flops if "droppath" in of_variant else None
        for row in rows:
            row.relative = row.flops / usual if row.flops and usual else None
    for comparison, p in zip(comparisons, holm([c.p for c in comparisons]), strict=True):
        comparison.corrected = p
    return table, comparisons


def mean_of(values: Sequence[float]) -> Mean:
    """Mean, standard deviation and 95 % interval (t distribution) of values."""
    n = len(values)
    if n < 2:
        return Mean(n, values[0] if n else None, None, None, None)
    from scipy.stats import t

    mean, sd = statistics.fmean(values), statistics.stdev(values)
    half = float(t.ppf(1 - LEVEL / 2, n - 1)) * sd / n**0.5
    return Mean(n, mean, sd, mean - half, mean + half)


def paired_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of the paired t test, from the differences of the pairs.

    Returns:
        1 where there are no differences; None for fewer than two pairs, and where all pairs differ
        by the same amount, which a t test takes for certainty
    """
    if len(differences) < 2:
        return None
    unequal = {round(difference, 9) for difference in differences}
    if len(unequal) == 1:
        return None if unequal.pop() else 1.0
    from scipy.stats import ttest_1samp

    test: Any = ttest_1samp(differences, 0)
    return float(test.pvalue)


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
    chosen = sorted(about_rdp or comparisons, key=lambda c: (c.drop_path, c.variant))
    return [_sentence(c) for c in chosen]


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
