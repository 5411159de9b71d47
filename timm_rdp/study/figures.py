"""What the study's figures share, and the figures of `timm-rdp features`.

Colours differ in lightness as well as in hue, so that they survive greyscale print and the common
kinds of colour blindness; nothing is told by colour alone.
"""

import importlib.util
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from timm_rdp.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RED, BLUE, ORANGE, GREY = "#e8705a", "#14386b", "#e69f00", "#8a8a8a"
SEQUENTIAL = "cividis"
WIDTH = 8.0  # inches; at DPI this is the width of a README column
DPI = 110
MARKERS = "os^DvPX*"
TONES = ("#14386b", "#e8705a", "#5fa8a0", "#b0a030", "#7a4a8c", "#8a8a8a")


def check_matplotlib() -> None:
    """Raises UsageError where matplotlib, which only the demo extra installs, is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            'matplotlib is not installed and the figures need it: pip install "timm-rdp[demo]"'
        )


def new_figure(height: float, width: float = WIDTH) -> "Figure":
    """An empty figure (inches) that needs no display and no pyplot state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def save(figure: "Figure", path: Path | IO[bytes]) -> None:
    """Write a figure as a PNG."""
    Image.fromarray(pixels(figure)).save(path, "PNG", optimize=True)


def pixels(figure: "Figure") -> np.ndarray:
    """Render a figure: (height, width, 3), uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def heatmap(axes: "Axes", similarity: Tensor, low: float, high: float, first: int):
    """Draw a (layers, layers) matrix, layer `first` at the lower left; NaN is left grey."""
    import matplotlib

    colours = matplotlib.colormaps[SEQUENTIAL].with_extremes(bad="#d9d9d9")
    edges = (first - 0.5, first + len(similarity) - 0.5)
    return axes.imshow(
        np.ma.masked_invalid(similarity.numpy()),
        origin="lower",
        extent=(*edges, *edges),
        vmin=low,
        vmax=high,
        cmap=colours,
        interpolation="nearest",
    )


def colour_range(matrices: list[Tensor]) -> tuple[float, float]:
    """One colour scale for all matrices: from the lowest value (0.5 or less) to 1."""
    lowest = min(m[~m.isnan()].min().item() for m in matrices)
    return min(np.floor(lowest * 10) / 10, 0.5), 1.0


def similarity_grid(
    rows: list[tuple[str, int, list[Tensor]]], columns: list[str], measure: str, title: str
) -> "Figure":
    """Heatmaps side by side on one colour scale: a row a kind of layer, a column a network.

    Args:
        rows: (what the layers are, number of the first, one (layers, layers) matrix a column).
        columns: names of the networks.
        measure: what the colour shows.
        title: what is seen.
    """
    low, high = colour_range([m for *_, row in rows for m in row])
    # One network alone: its kinds of layer lie side by side instead.
    shape = (len(rows), len(columns)) if len(columns) > 1 else (1, len(rows))
    side = min(0.82 * WIDTH / shape[1], 3.4)
    figure = new_figure(height=shape[0] * (side + 0.2) + 0.8)
    grid = figure.subplots(*shape, squeeze=False).ravel()
    cells = [
        (kind, first, name, matrix)
        for kind, first, matrices in rows
        for name, matrix in zip(columns, matrices, strict=True)
    ]
    for i, ((kind, first, name, matrix), axes) in enumerate(zip(cells, grid, strict=True)):
        image = heatmap(axes, matrix, low, high, first)
        integer_ticks(axes)
        axes.tick_params(labelsize=7)
        if i < shape[1]:
            axes.set_title(name if len(columns) > 1 else kind, fontsize=9)
        if i % shape[1] == 0:
            axes.set_ylabel(
                f"layer number\n({kind})" if len(columns) > 1 else "layer number", fontsize=8
            )
        if i >= len(cells) - shape[1]:
            axes.set_xlabel("layer number", fontsize=8)
    figure.colorbar(image, ax=list(grid), label=measure, shrink=0.8)
    figure.suptitle(title if len(columns) > 1 else f"{title}: {columns[0]}", fontsize=11)
    return figure


def integer_ticks(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))


def lines_per_layer(
    panels: list[tuple[str, list[Tensor]]], columns: list[str], ylabel: str, title: str
) -> "Figure":
    """A value per layer, a line a network.

    Args:
        panels: (what the layers are, one (layers,) tensor a network).
        columns: names of the networks.
        ylabel: what is plotted, with its unit.
        title: what is seen.
    """
    figure = new_figure(height=3.2)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for (kind, values), axes in zip(panels, grid, strict=True):
        for i, (name, value) in enumerate(zip(columns, values, strict=True)):
            axes.plot(
                range(len(value)),
                value.numpy(),
                marker=MARKERS[i % len(MARKERS)],
                color=TONES[i % len(TONES)],
                markersize=4,
                linewidth=1,
                label=name,
            )
        integer_x(axes)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"layer number ({kind})")
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.3)
    if len(columns) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(title, fontsize=11)
    return figure


def integer_x(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def path_importance(names: list[str], losses: list[Tensor], columns: list[str]) -> "Figure":
    """Rise of the validation loss when one path is dropped, a bar a path and network.

    Args:
        names: the paths, in call order.
        losses: per network (paths,): loss with that path dropped minus loss with none dropped.
        columns: names of the networks.
    """
    rows = len(names) * len(columns)
    figure = new_figure(height=min(1.7 + 0.11 * rows + 0.05 * len(names), 14))
    axes = figure.subplots()
    thickness = 0.8 / len(columns)
    for i, (name, rise) in enumerate(zip(columns, losses, strict=True)):
        axes.barh(
            np.arange(len(names)) + (i - (len(columns) - 1) / 2) * thickness,
            rise.numpy(),
            height=thickness,
            color=TONES[i % len(TONES)],
            hatch=("", "///", "...", "xxx")[i % 4],
            edgecolor="white",
            linewidth=0.3,
            label=name,
        )
    step = max(1, len(names) // 60)
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.axvline(0, color="black", linewidth=0.8)
    sizes = torch.stack(losses).abs().flatten()
    scale = ""
    if sizes.max() > 20 * sizes.median() > 0:
        # A few paths (the first, mostly) matter so much that the others would not be seen.
        linear = 10.0 ** np.round(np.log10(sizes.median().item()))
        axes.set_xscale("symlog", linthresh=linear)
        lowest = min(rise.min().item() for rise in losses)
        axes.set_xlim(left=min(1.5 * lowest, -linear / 2))
        scale = f", logarithmic beyond {linear:g}"
    axes.set_xlabel(f"rise of the validation loss without the path (nats{scale})")
    axes.set_ylabel("path, in call order")
    axes.grid(axis="x", alpha=0.3)
    if len(columns) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(
        "What each path is worth at inference: loss when it alone is dropped", fontsize=11
    )
    return figure
