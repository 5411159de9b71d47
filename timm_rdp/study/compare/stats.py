"""What a comparison over seeds supports: intervals, paired tests, their correction."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from timm_rdp.study.compare.runs import RDP_VARIANTS

REFERENCES = ("droppath", "droppath-matched")
LEVEL = 0.05


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


def compare(scores: Mapping[float, Mapping[str, Mapping[int, float]]]) -> list[Comparison]:
    """Every variant against every reference, at every drop rate.

    Args:
        scores: by drop rate and variant, the score of each seed that is done.
    """
    comparisons = []
    for (rate, of_rate), (i, reference) in product(scores.items(), enumerate(REFERENCES)):
        # A reference is not compared with itself, nor is a pair the other way round.
        others = [variant for variant in of_rate if variant not in REFERENCES[: i + 1]]
        for variant in others if reference in of_rate else ():
            own, other = of_rate[variant], of_rate[reference]
            seeds = sorted(own.keys() & other.keys())
            a, b = [own[s] for s in seeds], [other[s] for s in seeds]
            difference = mean_of([x - y for x, y in zip(a, b, strict=True)])
            comparisons.append(Comparison(rate, variant, reference, difference, paired_p(a, b)))
    for comparison, p in zip(comparisons, holm([c.p for c in comparisons]), strict=True):
        comparison.corrected = p
    return comparisons


def sentence(c: Comparison) -> str:
    """What one comparison supports, in plain words."""
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


def sentences(comparisons: Sequence[Comparison]) -> list[str]:
    """The sentences about ResidualDroppath; about all variants where it is not among them."""
    about_rdp = [c for c in comparisons if c.variant in RDP_VARIANTS]
    chosen = sorted(about_rdp or comparisons, key=lambda c: (c.drop_path, c.variant))
    return [sentence(c) for c in chosen]


def signed(value: float) -> str:
    """A difference as text, never -0.00."""
    return f"{round(value, 2) + 0.0:+.2f}"


def p_text(p: float) -> str:
    """A p value as text."""
    return f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"
