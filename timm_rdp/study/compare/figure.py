"""The figure of a comparison: accuracy against compute."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from timm_rdp.study.compare.results import Row
from timm_rdp.study.compare.runs import VARIANTS
from timm_rdp.study.figures import MARKERS, TONES, WIDTH, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TONES = (5, 1, 2, 3, 0, 4)  # of VARIANTS


def draw(table: Mapping[float, Sequence[Row]], model: str, pick: str) -> "Figure":
    """Accuracy against compute: a dot a seed, the mean with its interval, a panel a drop rate."""
    columns = min(len(table), 2)
    lines = -(-len(table) // columns)
    figure = new_figure(height=3.3 * lines + 0.9, width=WIDTH if columns > 1 else 6.4)
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    shown = {rate: [row for row in rows if row.top1.n] for rate, rows in table.items()}
    measure, label = _cost([row for rows in shown.values() for row in rows])
    handles: dict[str, Any] = {}
    for (rate, rows), axes in zip(table.items(), panels, strict=False):
        places = _side_by_side([getattr(row, measure) for row in shown[rate]])
        for row, place in zip(shown[rate], places, strict=True):
            handles[row.variant] = _draw_variant(axes, row, place)
        missing = "\n".join(f"{row.variant}: {row.missing}" for row in rows if row.missing)
        axes.text(0.02, 0.02, missing, transform=axes.transAxes, fontsize=7)
        axes.set_title(f"drop path {rate:g}", fontsize=9)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.margins(x=0.08)
    for axes in panels[len(table) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel(f"top-1, {pick} epoch (%)")
    cut = _limit_height(panels[0], [row for rows in shown.values() for row in rows])
    if handles:
        names = sorted(handles, key=VARIANTS.index)
        shapes = [handles[name] for name in names]
        figure.legend(shapes, names, loc="outside lower center", ncols=3, fontsize=8)
    how = ", cut off at the frame" if cut else ""
    figure.suptitle(f"{model}: a dot a seed; the mean and its 95 % interval{how}", fontsize=11)
    return figure


def _cost(rows: Sequence[Row]) -> tuple[str, str]:
    """What stands for compute, as far as it is known of all rows, and what to call it."""
    if all(row.relative is not None for row in rows):
        return "relative", "FLOPs of the run, droppath = 1"
    if all(row.flops is not None for row in rows):
        return "flops", "FLOPs of the run"
    return "epochs", "epochs"


def _draw_variant(axes: "Axes", row: Row, place: float) -> Any:
    from matplotlib.transforms import ScaledTranslation

    index = VARIANTS.index(row.variant)
    style: dict[str, Any] = dict(color=TONES[_TONES[index]], marker=MARKERS[index])
    scores = list(row.scores.values())
    dots: dict[str, Any] = dict(linestyle="", alpha=0.5, markersize=4.5, markeredgewidth=0)
    axes.plot([place] * len(scores), scores, **dots, **style)
    _, mean, _, _, high = row.top1
    half = None if mean is None or high is None else high - mean
    # The mean stands beside its dots, a few points to the right.
    beside = axes.transData + ScaledTranslation(7 / 72, 0, axes.figure.dpi_scale_trans)
    style |= dict(markersize=7, capsize=3, linewidth=1.2, transform=beside)
    return axes.errorbar(place, mean or 0.0, half, **style)


def _limit_height(axes: "Axes", rows: Sequence[Row]) -> bool:
    """Let the dots decide where intervals dwarf them; returns whether one is cut off."""
    scores = [score for row in rows for score in row.scores.values()]
    if not scores:
        return False
    edges = [edge for row in rows for edge in row.top1[3:] if edge is not None]
    span = max(scores) - min(scores) or 1.0
    low = max(min(scores + edges), min(scores) - 1.5 * span)
    high = min(max(scores + edges), max(scores) + 1.5 * span)
    margin = 0.06 * (high - low or 1.0)
    axes.set_ylim(low - margin, high + margin)
    return any(not low <= edge <= high for edge in edges)


def _side_by_side(places: Sequence[float]) -> list[float]:
    """Move places that would lie on each other apart, to the right."""
    near = 0.05 * (max(places, default=0.0) - min(places, default=0.0) or 1.0)
    moved, last = list(places), -math.inf
    for i in sorted(range(len(places)), key=places.__getitem__):
        last = moved[i] = max(places[i], last + near)
    return moved
