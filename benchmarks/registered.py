"""The tests that registered.md names, over what registered.sh left behind.

    python benchmarks/registered.py --runs output/registered --output benchmarks/results/registered

Reads runs.csv of every experiment that is there and writes registered.md: the primary measures with
their tests, then the secondary comparisons without any; and registered.png, which shows most of
them. Area and top-1 are in their own units (area from 0 to 1, top-1 in points).
"""

import argparse
import csv
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

LEVEL = 0.05
BOUNDS = {"area_drawn": 0.005, "top1": 0.5}
HOLD = {"e1": "area_drawn", "e4": "area_drawn", "e5": "top1"}  # rdp minus droppath-matched
PRIMARIES, SEEDS = 6, 8
DOT = dict(color="#e8705a", alpha=0.6, markersize=4, markeredgewidth=0)
DAMAGES = ("noise", "blur", "contrast", "shift")
SECONDARY = ("top1", "nll", "ece", "ece_scaled", "area_even", "area_drawn", "damaged")

Scores = dict[tuple[str, float, int], dict[str, float]]  # by variant, rate and seed


@dataclass
class Pairs:
    """Differences by seed, and what a test says of them.

    Attributes:
        differences: (seeds,), in `unit`.
        bound: half the width of what counts as no effect; None where there is no such test.
    """

    question: str
    differences: np.ndarray
    bound: float | None

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the mean, by Student's t."""
        error = stats.sem(self.differences)
        if not error:
            return self.differences.mean(), self.differences.mean()
        return stats.t.interval(0.95, len(self.differences) - 1, self.differences.mean(), error)

    def p_values(self) -> tuple[float, float]:
        """Two-sided p of the paired t test and of the Wilcoxon signed-rank test."""
        return (
            float(stats.ttest_1samp(self.differences, 0.0).pvalue),
            float(stats.wilcoxon(self.differences, method="exact").pvalue),
        )

    def equivalence(self) -> float:
        """p of two one-sided t tests that the mean lies within the bounds; nan without bounds."""
        if self.bound is None:
            return math.nan
        return max(
            float(stats.ttest_1samp(self.differences, -self.bound, alternative="greater").pvalue),
            float(stats.ttest_1samp(self.differences, self.bound, alternative="less").pvalue),
        )


def holm(values: Sequence[float]) -> list[float]:
    """p values after Holm's correction, in their order; primaries that were not run count as 1."""
    corrected, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (PRIMARIES - rank) * values[index]))
        corrected[index] = largest
    return corrected


def read(table: Path) -> Scores:
    """The runs of a comparison that are done, of what has ended for all seeds."""
    scores: Scores = {}
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] in ("done", "diverged")]
    ended = Counter((row["variant"], row["drop_path"]) for row in rows)
    for row in rows:
        if row["status"] == "done" and ended[row["variant"], row["drop_path"]] == SEEDS:
            damaged = [float(v) for n, v in row.items() if n.startswith(DAMAGES) and v]
            numbers = {n: float(row[n]) for n in SECONDARY if row.get(n)}
            if damaged:  # top-1 under all damages, on average
                numbers["damaged"] = sum(damaged) / len(damaged)
            scores[row["variant"], float(row["drop_path"]), int(row["seed"])] = numbers
    return scores


def minus(scores: Scores, one: str, other: str, rate: float, measure: str) -> np.ndarray:
    """One variant minus another, by seed; nothing where one of them was not measured."""
    plain = lambda variant: 0.0 if variant == "plain" else rate
    own = {s: v.get(measure) for (n, r, s), v in scores.items() if (n, r) == (one, plain(one))}
    its = {s: v.get(measure) for (n, r, s), v in scores.items() if (n, r) == (other, plain(other))}
    if None in {*own.values(), *its.values()}:
        return np.array([])
    return np.array([own[s] - its[s] for s in sorted(own.keys() & its.keys())])


def rates(scores: Scores) -> list[float]:
    return sorted({rate for variant, rate, _ in scores if variant != "plain"})


def slopes(scores: Scores) -> np.ndarray:
    """Least-squares slope of top-1, rdp minus droppath, over the rate, by seed."""
    by_seed = defaultdict(dict)
    for (variant, rate, seed), measured in scores.items():
        by_seed[seed][variant, rate] = measured["top1"]
    found = []
    for seed in sorted(by_seed):
        own = by_seed[seed]
        if len(own) == 2 * len(rates(scores)):
            gains = [own["rdp", r] - own["droppath", r] for r in rates(scores)]
            found.append(np.polyfit(rates(scores), gains, 1)[0])
    return np.array(found)


def read_nested(folder: Path) -> dict[tuple[str, str], dict[int, dict[str, str]]]:
    """The rows of E3 by variant and network, then by seed."""
    found = defaultdict(dict)
    for table in sorted(folder.glob("*/runs.csv")):
        with table.open(newline="") as file:
            for row in csv.DictReader(file):
                found[row["variant"], row["network"]][int(row["seed"])] = row
    return found


def nested_minus(folder: Path, other: tuple[str, str], measure: str = "top1") -> np.ndarray:
    """E3: the whole nested network minus another, by seed."""
    rows = read_nested(folder)
    own, its = rows["nested", "whole"], rows[other]
    both = sorted(own.keys() & its.keys())
    return np.array([float(own[s][measure]) - float(its[s][measure]) for s in both])


def primaries(runs: Path) -> Iterator[Pairs]:
    for name, measure in HOLD.items():
        if (table := runs / name / "runs.csv").exists():
            scores = read(table)
            for rate in rates(scores):
                differences = minus(scores, "rdp", "droppath-matched", rate, measure)
                question = f"{name.upper()}: {measure}, rdp - droppath-matched at {rate:g}"
                yield Pairs(question, differences, BOUNDS[measure])
    if (table := runs / "e2" / "runs.csv").exists():
        question = "E2: slope of top-1 (rdp - droppath) over the rate, points per 1.0"
        yield Pairs(question, slopes(read(table)), None)
    if (runs / "e3").exists():
        question = "E3: top-1, nested whole - alone"
        yield Pairs(question, nested_minus(runs / "e3", ("alone", "inner")), BOUNDS["top1"])


def secondaries(runs: Path) -> Iterator[Pairs]:
    for name in ("e1", "e2", "e4", "e5"):
        if not (table := runs / name / "runs.csv").exists():
            continue
        scores = read(table)
        for rate in rates(scores):
            others = {variant for variant, own, _ in scores if own in (rate, 0.0)} - {"rdp"}
            for other in sorted(others):
                for measure in SECONDARY:
                    found = minus(scores, "rdp", other, rate, measure)
                    if len(found) > 1:
                        yield Pairs(
                            f"{name.upper()} at {rate:g}: {measure}, rdp - {other}", found, None
                        )
    if (runs / "e3").exists():
        for other in (("full", "whole"), ("full-matched", "whole"), ("nested", "inner")):
            for measure in ("top1", "nll"):
                question = f"E3: {measure}, nested whole - {' '.join(other)}"
                yield Pairs(question, nested_minus(runs / "e3", other, measure), None)


def verdict(pairs: Pairs, corrected: tuple[float, float]) -> str:
    if max(corrected) < LEVEL:
        return "above 0" if pairs.differences.mean() > 0 else "below 0"
    if min(corrected) < LEVEL:
        return "the tests disagree"
    return "no effect" if pairs.equivalence() < LEVEL else "undecided"


def write(runs: Path) -> str:
    """The tables, as Markdown."""
    found = [pairs for pairs in primaries(runs) if len(pairs.differences) > 1]
    p_values = list(zip(*(pairs.p_values() for pairs in found), strict=True))
    corrected = list(zip(*map(holm, p_values), strict=True))
    lines = [
        "# Primary measures",
        "",
        "| measure | pairs | mean | 95 % interval | p (t) | p (Wilcoxon) | corrected, both | "
        "within the bounds, p | verdict |",
        "| --- " * 9 + "|",
    ]
    for i, pairs in enumerate(found):
        low, high = pairs.interval
        own, both = pairs.p_values(), corrected[i]
        equivalence = "" if pairs.bound is None else f"{pairs.equivalence():.4f}"
        lines.append(
            f"| {pairs.question} | {len(pairs.differences)} | {pairs.differences.mean():+.4f} "
            f"| {low:+.4f} to {high:+.4f} | {own[0]:.4f} | {own[1]:.4f} "
            f"| {both[0]:.4f}, {both[1]:.4f} | {equivalence} | {verdict(pairs, both)} |"
        )
    lines += ["", "# Secondary, without a claim", ""]
    lines += ["| difference | pairs | mean | 95 % interval |", "| --- | --- | --- | --- |"]
    for pairs in secondaries(runs):
        low, high = pairs.interval
        lines.append(
            f"| {pairs.question} | {len(pairs.differences)} | {pairs.differences.mean():+.4f} "
            f"| {low:+.4f} to {high:+.4f} |"
        )
    if (runs / "e3").exists():
        inner = read_nested(runs / "e3")["nested", "inner"]
        same = sum(row["inner_equals_alone"] == "True" for row in inner.values())
        lines += ["", f"E3: the inner network has the bits of the one trained alone in {same} of "]
        lines[-1] += f"{len(inner)} seeds."
    return "\n".join(lines) + "\n"


def shown(runs: Path) -> Iterator[tuple[str, str, float | None, list[Pairs]]]:
    """The panels of the picture: title, unit, bound of what counts as no effect, differences."""
    for name, measure in HOLD.items():
        if (table := runs / name / "runs.csv").exists():
            scores, unit = read(table), "points" if measure == "top1" else measure
            for rate in rates(scores):
                variants = {variant for variant, own, _ in scores if own in (rate, 0.0)} - {"rdp"}
                pairs = [
                    Pairs(f"- {other}", minus(scores, "rdp", other, rate, measure), None)
                    for other in sorted(variants)
                ]
                yield f"{name.upper()}: rdp at {rate:g}", unit, BOUNDS[measure], pairs
    if (table := runs / "e2" / "runs.csv").exists():
        scores = read(table)
        pairs = [
            Pairs(f"at {rate:g}", minus(scores, "rdp", "droppath", rate, "top1"), None)
            for rate in rates(scores)
        ]
        yield "E2: rdp - droppath", "points", BOUNDS["top1"], pairs
    if (runs / "e3").exists():
        pairs = [
            Pairs(f"- {' '.join(other)}", nested_minus(runs / "e3", other), None)
            for other in (("alone", "inner"), ("full", "whole"), ("full-matched", "whole"))
        ]
        yield "E3: nested whole", "points", BOUNDS["top1"], pairs


def draw(runs: Path) -> Figure:
    """Mean differences with their 95 % intervals, a panel an experiment, a dot a seed."""
    panels = sorted(shown(runs), key=lambda panel: panel[0])
    lines = -(-len(panels) // 2)
    figure = Figure(figsize=(8.0, 2.1 * lines), dpi=110, layout="constrained")
    all_axes = figure.subplots(lines, 2, squeeze=False).ravel()
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, unit, bound, differences) in zip(all_axes, panels, strict=False):
        axes.axvspan(-bound, bound, color="#d9d9d9")
        axes.axvline(0, color="#8a8a8a", linewidth=1)
        differences = [pairs for pairs in differences if len(pairs.differences) > 1]
        for line, pairs in enumerate(differences):
            axes.plot(pairs.differences, [line] * len(pairs.differences), "o", **DOT)
            low, high = pairs.interval
            axes.plot([low, high], [line, line], color="#14386b", linewidth=2)
            axes.plot(pairs.differences.mean(), line, "s", color="#14386b", markersize=6)
        axes.set_yticks(range(len(differences)), [pairs.question for pairs in differences])
        axes.set_ylim(len(differences) - 0.5, -0.5)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(unit, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", nbins=5)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="what registered.sh wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder for registered.md")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    text = write(args.runs)
    (args.output / "registered.md").write_text(text)
    draw(args.runs).savefig(args.output / "registered.png")
    print(text)


if __name__ == "__main__":
    main()
