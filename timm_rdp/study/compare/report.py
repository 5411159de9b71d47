"""What a comparison leaves behind: runs.csv, table.csv, table.md, comparison.png."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from timm_rdp.errors import UsageError
from timm_rdp.study import figures
from timm_rdp.study.compare import results
from timm_rdp.study.compare.grid import OUTPUTS, metric_of, read_grid
from timm_rdp.study.compare.measured import AREAS, read_measures
from timm_rdp.study.compare.results import COMPARED, REFERENCES, Row, missing, signed
from timm_rdp.study.compare.runs import MATCHED, VARIANTS, cells_of
from timm_rdp.study.measures import CALIBRATION, COLUMNS, DAMAGES, STRENGTHS
from timm_rdp.training.model import EVALUATORS
from timm_rdp.training.saver import write_atomically

MEASURED = (
    "Measures are means over the runs, from the checkpoint of the last epoch, on {} validation "
    "images or all that there are. NLL (nats) and the expected calibration error (15 bins), raw "
    "and after temperature scaling, are of four fifths of them; the temperature is fitted on the "
    "others. Area: under the curve of the score (0 to 1) over the share of paths removed, evenly "
    "spaced or drawn (four subsets, the same for all variants; removal.csv, removal.png). Under "
    "noise, blur, contrast and shift: the score in per cent, mean of three strengths."
)
COMPUTE = {
    "relative_flops": "FLOPs of the run, droppath = 1",
    **{"flops": "FLOPs of the run", "epochs": "epochs"},
}
_TONES = (5, 1, 2, 3, 0, 4, 6, 7, 8, 9)
LOOKS: dict[str, dict[str, Any]] = {
    variant: {"color": figures.TONES[tone], "marker": marker}
    for variant, tone, marker in zip(VARIANTS, _TONES, figures.MARKERS, strict=True)
}


def write_report(output: Path, pick: str = "last") -> str:
    """Write the four outputs from what a folder holds, finished or not, and return what it says."""
    grid = read_grid(output)
    if grid is None:
        raise UsageError(f"--report {output}: holds no comparison (no grid.json); check the folder")
    of_runs, metric = results.read_results(output, grid, pick), metric_of(grid)
    rows = results.tabulate(of_runs, metric)
    nothing = ["There are no runs of droppath to compare with: add droppath to --variants."]
    said = results.sentences(rows, metric) or nothing
    left_out = {}  # plain is in the rows of every rate
    for row in filter(missing, rows):
        at = "" if row["variant"] == "plain" else f" at {row['drop_path']:g}"
        left_out[f"{row['variant']}{at}: {missing(row)}"] = None
    if left_out:
        said.append(f"Runs left out of the means: {'; '.join(left_out)}.")
    said = [f"- {line}" for line in said]
    image = io.BytesIO()
    draw(rows, grid["options"]["model"], metric, pick).savefig(image)
    text = [*_table_md(rows, grid), *said, "", *_notes(rows, grid, pick)]
    contents = (_csv(of_runs), _csv(rows), ("\n".join(text) + "\n").encode(), image.getvalue())
    for name, content in zip(OUTPUTS, contents, strict=True):
        write_atomically(str(output / name), content)
    if grid.get("measure"):
        write_removal(output, grid)
    return "\n".join([*said, f"{', '.join(OUTPUTS)} are in {output}"])


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    columns = [name for name in rows[0] if name != "scores"]
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        cells = {k: _text(v, ".10g") if isinstance(v, float) else v for k, v in row.items()}
        writer.writerow(cells | {"drop_path": str(row["drop_path"])})
    return text.getvalue().encode()


def _table_md(rows: Sequence[Row], grid: dict[str, Any]) -> list[str]:
    options = grid["options"]
    folder = Path(options["data_dir"] or "").name
    data = options["dataset"] or folder or "the demo (handwritten digits)"
    lines = [f"# {options['model']} on {data}"]
    against = [r for r in REFERENCES if any(row[f"pairs_to_{r}"] is not None for row in rows)]
    name, unit = titled(metric_of(grid))
    heading = ["variant", "epochs", "seeds", f"{name}{unit and ', %'}", "sd", "95 % interval"]
    for reference in against:
        heading += [f"minus {reference}", "p", "corrected"]
    heading += ["median time, s", "FLOPs", "relative"]
    for rate, of_rate in groupby(rows, itemgetter("drop_path")):
        table = [heading]
        for row in of_rate:
            seeds = ", ".join(filter(None, (str(row["seeds"]), missing(row))))
            cells = [row["variant"], _text(row["epochs"], "d"), seeds]
            cells += [_text(row["mean"], ".2f"), _text(row["sd"], ".2f")]
            cells += [_interval(row["seeds"], row["low"], row["high"], "{:.2f}".format)]
            for reference in against:
                n, mean, _, low, high, *p = (row[f"{k}_to_{reference}"] for k in COMPARED)
                paired = "" if n in (None, row["seeds"]) else f" ({n} pairs)"
                difference = "" if mean is None else signed(mean)
                cells += [f"{difference} {_interval(n, low, high, signed)}{paired}".strip()]
                cells += ["" if x is None else results.p_text(x)[2:].strip("= ") for x in p]
            ends = (("seconds", ".1f"), ("flops", ".3g"), ("relative_flops", ".2f"))
            table.append([*cells, *(_text(row[name], form) for name, form in ends)])
        lines += _section(f"Drop path {rate:g}", table)
    if measured := [row for row in rows if row.get("area_even") is not None]:
        kinds = {kind: [n for n, (own, _) in STRENGTHS.items() if own == kind] for kind in DAMAGES}
        heading = ["drop path", "variant", "NLL", "ECE", "ECE scaled", "area, even", "area, drawn"]
        table = [[*heading, *(f"under {kind}" for kind in kinds)]]
        for row in measured:
            cells = [_text(row[name], ".4f") for name in (*CALIBRATION[:3], *AREAS)]
            cells += [f"{100 * fmean(row[name] for name in own):.2f}" for own in kinds.values()]
            table.append([f"{row['drop_path']:g}", row["variant"], *cells])
        lines += _section("Measures", table)
    return [*lines, ""]


def _section(title: str, table: list[list[str]]) -> list[str]:
    """A heading and a table, whose first row is its head."""
    head, *rows = (f"| {' | '.join(cells)} |" for cells in table)
    return ["", f"## {title}", "", head, f"|{' --- |' * len(table[0])}", *rows]


def write_removal(output: Path, grid: dict[str, Any]) -> None:
    """removal.csv and removal.png: the score with paths removed, a line a variant."""
    flops, rows, curves = grid.get("inference"), [], {}
    for cell in cells_of(grid["runs"]):
        rate, found = (
            cell.drop_path or 0.0,
            read_measures(output / "runs" / cell.name, grid["measure"]),
        )
        for k, scores in found.get("removed", {}).items():
            costs = flops[str(k)] if flops else ()
            cost = fmean(costs[1:] if k else costs[:1]) if flops else k
            of_cell = curves.setdefault((rate, cell.variant), {})
            of_cell.setdefault(cost, []).append(fmean(scores[1:]))
            rows.append((cell.variant, rate, cell.seed, k, *costs, *scores))
    header = ("variant", "drop_path", "seed", "paths_removed")
    header = (*header, *(f"flops_{c}" for c in COLUMNS if flops), *COLUMNS)
    rates = sorted({rate for rate, _ in curves if rate}) or [0.0]
    figure = figures.new_figure(height=4.0)
    panels = figure.subplots(1, len(rates), squeeze=False, sharey=True)[0]
    handles: dict[str, Any] = {}
    for rate, axes in zip(rates, panels, strict=True):
        for (own, variant), curve in curves.items():
            if own in (rate, 0.0):
                means = [(x, 100 * fmean(scores)) for x, scores in sorted(curve.items())]
                look = dict(markersize=4, **LOOKS[variant])
                handles[variant] = axes.plot(*zip(*means, strict=True), **look)[0]
        axes.set_title(f"drop path {rate:g}", fontsize=9)
        axes.set_xlabel("FLOPs of an image's inference" if flops else "paths removed")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("{}{}".format(*titled(EVALUATORS[grid["options"]["task"]].default_metric)))
    figure.legend([*handles.values()], [*handles], loc="outside lower center", ncols=4, fontsize=8)
    title = f"{grid['options']['model']} with paths removed: mean over seeds and drawn subsets"
    figure.suptitle(title, fontsize=11)
    figures.write_figure(output / "removal", figure, header, rows)


def titled(metric: str) -> tuple[str, str]:
    """A metric's name in text, and " (%)" where it is a percentage."""
    return {"top1": "top-1", "top5": "top-5"}.get(metric, metric), " (%)" * (metric != "loss")


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _interval(n: int | None, low: float | None, high: float | None, text: Callable) -> str:
    if n == 1:
        return "(one seed: none)"
    return "" if low is None else f"[{text(low)}, {text(high)}]"


def _notes(rows: Sequence[Row], grid: dict[str, Any], pick: str) -> list[str]:
    tests = sum(row[f"p_to_{reference}"] is not None for row in rows for reference in REFERENCES)
    epoch = {
        "last": "after the last epoch, so that nothing is picked on it",
        "best": "in the best epoch of each run: picked on that very set, and so flattering to all",
    }
    name, unit = titled(metric_of(grid))
    notes = [
        f"{name[0].upper()}{name[1:]} is {unit and 'in per cent '}on the validation set, "
        f"{epoch[pick]}. Differences are {unit and 'in points, '}"
        "paired by seed: the same initial weights and the same order of the data.",
        "Intervals are 95 %, from the t distribution, not corrected for their number. p is that of "
        "the two-sided paired t test (scipy.stats.ttest_rel); corrected p is after Holm's "
        f"correction over the {tests} {'test' if tests == 1 else 'tests'} of this table, and below "
        "0.05 counts as a difference.",
        "FLOPs are those of forward and backward passes, counted operation by operation and "
        "averaged over drop masks, for all epochs; relative is to droppath. Dropped paths are not "
        "run by rdp and droppath-batch, but are by timm's droppath. Time is the median run's, "
        "training and validation without the start of the process.",
    ]
    if any(row.get("area_even") is not None for row in rows):
        notes.append(MEASURED.format(grid["measure"]))
    if any(costs["update"] is None for costs in grid["costs"].values()):
        notes.append("The FLOPs of this model could not be counted without data.")
    if any(row["variant"] == MATCHED for row in rows):
        notes.append(
            "droppath-matched is droppath with the number of --epochs whose cost comes nearest to "
            "that of rdp, by counted FLOPs, and never with fewer than the others."
        )
    return "\n\n".join(notes).splitlines()


def draw(rows: Sequence[Row], model: str, metric: str, pick: str) -> "figures.Figure":
    """The metric against compute: a dot a seed, the mean with its interval, a panel a drop rate."""
    from matplotlib.transforms import ScaledTranslation

    table = {rate: [*own] for rate, own in groupby(rows, itemgetter("drop_path"))}
    columns = min(len(table), 2)
    lines = -(-len(table) // columns)
    width = figures.WIDTH if columns > 1 else 6.4
    figure = figures.new_figure(height=3.3 * lines + 0.9, width=width)
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    drawn = [row for row in rows if row["seeds"]]
    # What stands for compute, as far as it is known of all.
    measure = next(name for name in COMPUTE if all(row[name] is not None for row in drawn))
    handles: dict[str, Any] = {}
    for (rate, of_rate), axes in zip(table.items(), panels, strict=False):
        # The mean stands beside its dots, a few points to the right.
        beside = axes.transData + ScaledTranslation(7 / 72, 0, figure.dpi_scale_trans)
        shown = [row for row in of_rate if row["seeds"]]
        places = [row[measure] for row in shown]
        near = 0.05 * (max(places, default=0.0) - min(places, default=0.0) or 1.0)
        for i, row in enumerate(shown):
            while any(abs(places[i] - other) < 0.99 * near for other in places[:i]):
                places[i] += near  # side by side where variants cost the same
            style = LOOKS[row["variant"]]
            dots: dict[str, Any] = dict(linestyle="", alpha=0.5, markersize=4.5, markeredgewidth=0)
            scores = list(row["scores"].values())
            axes.plot([places[i]] * len(scores), scores, **dots, **style)
            half = None if row["high"] is None else row["high"] - row["mean"]
            look = dict(markersize=7, capsize=3, linewidth=1.2, transform=beside, **style)
            handles[row["variant"]] = axes.errorbar(places[i], row["mean"], half, **look)
        text = "\n".join(f"{row['variant']}: {missing(row)}" for row in of_rate if missing(row))
        axes.text(0.02, 0.02, text, transform=axes.transAxes, fontsize=7)
        axes.set_title(f"drop path {rate:g}", fontsize=9)
        axes.set_xlabel(COMPUTE[measure])
        axes.grid(alpha=0.3)
        axes.margins(x=0.08)
    for axes in panels[len(table) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel("{0}, {pick} epoch{1}".format(*titled(metric), pick=pick))
    cut = _limit_height(panels[0], drawn)
    if handles:
        names = sorted(handles, key=VARIANTS.index)
        shapes = [handles[name] for name in names]
        figure.legend(shapes, names, loc="outside lower center", ncols=3, fontsize=8)
    how = ", cut off at the frame" if cut else ""
    figure.suptitle(f"{model}: a dot a seed; the mean and its 95 % interval{how}", fontsize=11)
    return figure


def _limit_height(axes: "figures.Axes", rows: Sequence[Row]) -> bool:
    """Let the dots decide where intervals dwarf them; returns whether one is cut off."""
    scores = [score for row in rows for score in row["scores"].values()]
    if not scores:
        return False
    edges = scores + [row[e] for row in rows for e in ("low", "high") if row[e] is not None]
    span = 1.5 * (max(scores) - min(scores) or 1.0)
    low, high = max(min(edges), min(scores) - span), min(max(edges), max(scores) + span)
    margin = 0.06 * (high - low or 1.0)
    axes.set_ylim(low - margin, high + margin)
    return min(edges) < low or max(edges) > high
