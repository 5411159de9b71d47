"""What the runs of a comparison came to: means with intervals, paired tests, their correction."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from timm_rdp.study.compare import runs
from timm_rdp.study.compare.grid import flops_of_epochs, metric_of
from timm_rdp.study.compare.measured import NAMES, read_measures

REFERENCES = ("droppath", "droppath-matched")
LEVEL = 0.05
LEFT_OUT = (runs.DIVERGED, runs.FAILED, "unfinished")  # of the mean
# What compares a variant with a reference, over the seeds that are done in both: variant minus
# reference, paired by seed; p_corrected is after Holm's correction over the table.
COMPARED = ("pairs", "difference", "sd", "low", "high", "p", "p_corrected")

# A run as in runs.csv: numbers that it did not come to are None, and plain's drop_path is 0.
Result = dict[str, Any]
# A variant at a drop rate as in table.csv, and "scores": {seed: metric} of the runs that are done;
# plain's drop_path is that of the variants that it is shown with.
Row = dict[str, Any]


def read_results(output: Path, grid: dict[str, Any], pick: str) -> list[Result]:
    """What every run that was asked for came to by its "last" or its "best" epoch."""
    metric = metric_of(grid)
    losses = [name for name in ("eval_loss", "train_loss") if name != f"eval_{metric}"]
    columns = {metric: f"eval_{metric}"} | dict(zip(losses, losses, strict=True))
    results = []
    for cell in runs.cells_of(grid["runs"]):
        folder = output / "runs" / cell.name
        record = runs.read_record(folder)
        measured = dict.fromkeys(columns)
        if record["status"] == runs.DONE:
            epochs, rows = runs.read_summary(folder)
            with runs.damage_named(folder):
                if epochs != record["epochs"]:
                    raise ValueError(f"{epochs} of {record['epochs']} epochs")
                best = max(rows, key=lambda row: merit(float(row[columns[metric]]), metric))
                row = best if pick == "best" else rows[-1]
                measured = {name: float(row[column]) for name, column in columns.items()}
                if not all(map(math.isfinite, measured.values())):
                    raise ValueError(f"not finite: {row}")
        if grid.get("measure"):
            found = read_measures(folder, grid["measure"])
            measured |= {name: found.get(name) for name in NAMES}
        flops = flops_of_epochs(grid, cell.variant, cell.drop_path, record["epochs"])
        place = {"variant": cell.variant, "drop_path": cell.drop_path or 0.0, "seed": cell.seed}
        ends = {"seconds": record["seconds"], "flops": flops, "error": record["error"]}
        begin = {name: record[name] for name in ("status", "epochs")}
        results.append({**place, **begin, **measured, **ends})
    return results


def merit(value: float, metric: str) -> float:
    """A value or difference of a metric, so that more is better."""
    return -value if metric == "loss" else value


def tabulate(results: Sequence[Result], metric: str) -> list[Row]:
    """A row a variant and drop rate, in the order of rates and of VARIANTS."""
    of_cell = defaultdict(list)
    for result in results:
        of_cell[result["variant"], result["drop_path"]].append(result)
    rates = sorted({rate for variant, rate in of_cell if variant != "plain"}) or [0.0]
    rows = {}
    for rate, variant in product(rates, runs.VARIANTS):
        if own := of_cell.get((variant, 0.0 if variant == "plain" else rate)):
            rows[rate, variant] = {"drop_path": rate, "variant": variant, **_summary(own, metric)}
    compared = []
    for (rate, variant), row in rows.items():
        for i, reference in enumerate(REFERENCES):
            values: Sequence = (None,) * len(COMPARED)
            # A reference is not compared with itself, nor is a pair the other way round.
            if variant not in REFERENCES[: i + 1] and (rate, reference) in rows:
                a, b = row["scores"], rows[rate, reference]["scores"]
                differences = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
                values = (*mean_of(differences), paired_p(differences), None)
                compared.append((row, reference))
            row |= {f"{k}_to_{reference}": v for k, v in zip(COMPARED, values, strict=True)}
    corrected = holm([row[f"p_to_{reference}"] for row, reference in compared])
    for (row, reference), p in zip(compared, corrected, strict=True):
        row[f"p_corrected_to_{reference}"] = p
    for (rate, _), row in rows.items():
        row |= {name: row.pop(name) for name in ("seconds", "flops")}  # the last columns
        usual = rows.get((rate, "droppath"), {}).get("flops")
        row["relative_flops"] = row["flops"] / usual if row["flops"] and usual else None
    return list(rows.values())


def _summary(results: Sequence[Result], metric: str) -> dict[str, Any]:
    """The columns of a row that are about its runs alone."""
    done = [r for r in results if r["status"] == runs.DONE]
    scores = {r["seed"]: r[metric] for r in done}
    ended = Counter(r["status"] for r in results)
    counts = {status: ended[status] for status in LEFT_OUT[:2]}
    counts["unfinished"] = len(results) - len(done) - sum(counts.values())
    n, mean, sd, low, high = mean_of(list(scores.values()))

    def over_runs(how: Callable[[list], float], name: str) -> float | None:
        values = [r[name] for r in done if r[name] is not None]
        return how(values) if values else None

    return {
        **{"epochs": done[0]["epochs"] if done else None, "seeds": n, **counts},
        **{"mean": mean, "sd": sd, "low": low, "high": high, "scores": scores},
        "seconds": over_runs(statistics.median, "seconds"),
        "flops": done[0]["flops"] if done else None,
        **{name: over_runs(statistics.fmean, name) for name in NAMES if name in results[0]},
    }


def mean_of(values: Sequence[float]) -> tuple[int, Any, Any, Any, Any]:
    """Number of values, mean, standard deviation (n - 1), both ends of the mean's 95 % interval.

    The interval is that of the t distribution; what the number does not allow is None.
    """
    n = len(values)
    if n < 2:
        return n, values[0] if n else None, None, None, None
    from scipy.stats import t

    mean, sd = statistics.fmean(values), statistics.stdev(values)
    half = float(t.ppf(1 - LEVEL / 2, n - 1)) * sd / n**0.5
    return n, mean, sd, mean - half, mean + half


def paired_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of the paired t test, from the differences of the pairs.

    It is 1 where there are no differences, and None for fewer than two pairs and where all pairs
    differ by the same amount, which a t test takes for certainty.
    """
    unequal = {round(difference, 9) for difference in differences}
    if len(differences) > 1 and unequal == {0}:
        return 1.0
    if len(unequal) < 2:
        return None
    from scipy.stats import ttest_1samp

    test: Any = ttest_1samp(differences, 0)
    return float(test.pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction; None, where there was no test, stays None and does not count."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    scaled = [min(1.0, (len(tested) - rank) * p) for rank, (p, _) in enumerate(tested)]
    corrected = {i: max(scaled[: rank + 1]) for rank, (_, i) in enumerate(tested)}
    return [corrected.get(i) for i in range(len(p_values))]


def sentences(rows: Sequence[Row], metric: str) -> list[str]:
    """What the comparisons of ResidualDroppath support; those of all where there are none of it."""
    compared = [(r, ref) for r in rows for ref in REFERENCES if r[f"pairs_to_{ref}"] is not None]
    about_rdp = [c for c in compared if c[0]["variant"] in runs.RDP_VARIANTS]
    chosen = sorted(about_rdp or compared, key=lambda c: (c[0]["drop_path"], c[0]["variant"]))
    return [_sentence(row, reference, metric) for row, reference in chosen]


def _sentence(row: Row, reference: str, metric: str) -> str:
    n, mean, _, low, high, p, corrected = (row[f"{k}_to_{reference}"] for k in COMPARED)
    start = f"{row['variant']} - {reference} at {row['drop_path']:g}: "
    if mean is None:
        return start + "no seed is done in both, so that nothing can be said."
    unit = "in loss" if metric == "loss" else "points"
    if low is None:
        return start + f"{signed(mean)} {unit}, one seed: no interval or test can be given."
    start += f"{signed(mean)} {unit} [{signed(low)}, {signed(high)}], {n} seeds, "
    if corrected is None:
        return start + "the same difference in every seed: no test can be given."
    start += f"corrected {p_text(corrected)}: "
    if corrected >= LEVEL:
        how = "that holds after correction" if p < LEVEL else "seen"
        return start + f"no difference {how}."
    return start + f"{row['variant']} is {'better' if merit(mean, metric) > 0 else 'worse'}."


def missing(row: Row) -> str:
    """The runs that are not in the mean, as text; '' where there are none."""
    return ", ".join(f"{row[kind]} {kind}" for kind in LEFT_OUT if row[kind])


def signed(value: float) -> str:
    """A difference as text, never -0.00."""
    return f"{round(value, 2) + 0.0:+.2f}"


def p_text(p: float) -> str:
    """A p value as text."""
    return f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"
