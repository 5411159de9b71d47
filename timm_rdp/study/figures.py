"""What the study's figures share, and the figures of `timm-rdp features`.

Colours differ in lightness as well as in hue, so that they survive greyscale print and the common
kinds of colour blindness; nothing is told by colour alone.
"""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RED, BLUE, GREY = "#e8705a", "#14386b", "#8a8a8a"
SEQUENTIAL = "cividis"
WIDTH = 8.0  # inches; at DPI this is the width of a README column
DPI = 110
MARKERS = "os^DvPX*<>"
TONES = ("#14386b", "#e8705a", "#5fa8a0", "#b0a030", "#7a4a8c", "#8a8a8a")
TONES += ("#3f8fd0", "#4d8b31", "#d0559b", "#8b5a2b")


def new_figure(height: float, width: float = WIDTH, title: str = "") -> "Figure":
    """An empty figure (inches) that needs no display and no pyplot state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def write_csv(path: Path, header: Iterable[str], rows: Iterable) -> None:
    """Write the numbers behind a figure."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def write_figure(path: Path, figure: "Figure", header: Iterable[str], rows: Iterable) -> None:
    """Write a figure as `path`.png and the numbers behind it as `path`.csv."""
    figure.savefig(path.with_suffix(".png"))
    write_csv(path.with_suffix(".csv"), header, rows)


def heatmap(axes: "Axes", similarity: Tensor, scale: tuple[float, float], first: int) -> None:
    """Draw a (layers, layers) matrix, layer `first` at the lower left; NaN is left grey."""
    edges = (first - 0.5, first + len(similarity) - 0.5)
    axes.set_facecolor("#d9d9d9")
    low, high = scale
    look: dict[str, Any] = {"cmap": SEQUENTIAL, "origin": "lower", "interpolation": "nearest"}
    axes.imshow(similarity.numpy(), vmin=low, vmax=high, extent=(*edges, *edges), **look)
    axes.locator_params(nbins=6, integer=True)


def colour_range(matrices: list[Tensor]) -> tuple[float, float]:
    """One colour scale for all matrices: from the lowest value (0.5 or less) to 1."""
    lowest = min(np.nanmin(matrix.numpy()) for matrix in matrices)
    return min(np.floor(lowest * 10) / 10, 0.5), 1.0


def similarity_grid(
    rows: list[tuple[str, int, list[Tensor]]], columns: list[str], measure: str, title: str
) -> "Figure":
    """Heatmaps side by side on one colour scale: a row a kind of layer, a column a network.

    Rows are (what the layers are, number of the first, one (layers, layers) matrix a column), and
    `measure` is what the colour shows.
    """
    cells = [(kind, first, i, m) for kind, first, row in rows for i, m in enumerate(row)]
    scale = colour_range([m for *_, m in cells])
    several = len(columns) > 1
    # One network alone: its kinds of layer lie side by side instead.
    down, across = (len(rows), len(columns)) if several else (1, len(rows))
    side = min(0.82 * WIDTH / across, 3.4)
    title = title if several else f"{title}: {columns[0]}"
    figure = new_figure(height=down * (side + 0.2) + 0.8, title=title)
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for i, ((kind, first, column, matrix), axes) in enumerate(zip(cells, grid, strict=True)):
        heatmap(axes, matrix, scale, first)
        axes.tick_params(labelsize=7)
        if i < across:
            axes.set_title(columns[column] if several else kind, fontsize=9)
        if i % across == 0:
            axes.set_ylabel("layer number" + f"\n({kind})" * several, fontsize=8)
        if i >= len(cells) - across:
            axes.set_xlabel("layer number", fontsize=8)
    figure.colorbar(grid[0].images[0], ax=list(grid), label=measure, shrink=0.8)
    return figure


def lines_per_layer(
    panels: list[tuple[str, list[list[float]]]], columns: list[str], ylabel: str, title: str
) -> "Figure":
    """A value per layer, a line a network; panels are (what the layers are, each one's values)."""
    figure = new_figure(height=3.2, title=title)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for (kind, values), axes in zip(panels, grid, strict=True):
        for i, (name, value) in enumerate(zip(columns, values, strict=True)):
            look = {"marker": MARKERS[i % len(MARKERS)], "color": TONES[i % len(TONES)]}
            axes.plot(value, **look, markersize=4, linewidth=1, label=name)
        axes.locator_params("x", nbins=8, integer=True)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"layer number ({kind})")
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.3)
    if len(columns) > 1:
        handles = grid[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=3)
    return figure


def path_importance(names: list[str], rises: Tensor, columns: list[str]) -> "Figure":
    """Rise of the validation loss when one path is dropped: (networks, paths), a bar each."""
    rows = len(names) * len(columns)
    figure = new_figure(
        height=min(1.7 + 0.11 * rows + 0.05 * len(names), 14),
        title="What each path is worth at inference: loss when it alone is dropped",
    )
    axes = figure.subplots()
    thickness = 0.8 / len(columns)
    for i, (name, rise) in enumerate(zip(columns, rises, strict=True)):
        y = np.arange(len(names)) + (i - (len(columns) - 1) / 2) * thickness
        look: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.3, "label": name}
        look |= {"color": TONES[i % len(TONES)], "hatch": ("", "///", "...", "xxx")[i % 4]}
        axes.barh(y, rise.numpy(), height=thickness, **look)
    step = max(1, len(names) // 60)
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.axvline(0, color="black", linewidth=0.8)
    usual, scale = rises.abs().median().item(), ""
    if rises.abs().max() > 20 * usual > 0:
        # A few paths (the first, mostly) matter so much that the others would not be seen.
        linear = 10.0 ** np.round(np.log10(usual))
        axes.set_xscale("symlog", linthresh=linear)
        axes.set_xlim(left=min(1.5 * rises.min().item(), -linear / 2))
        scale = f", logarithmic beyond {linear:g}"
    axes.set_xlabel(f"rise of the validation loss without the path (nats{scale})")
    axes.set_ylabel("path, in call order")
    axes.grid(axis="x", alpha=0.3)
    if len(columns) > 1:
        figure.legend(loc="outside lower center", ncols=3)
    return figure
