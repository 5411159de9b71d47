"""The run's curves.png."""

import io
import logging
import math
import os
import time

from timm_rdp.training.files import write_atomically

_logger = logging.getLogger(__name__)


class Curves:
    """The run's curves.png, drawn at the end of an epoch while that is cheap.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: str):
        self._folder = folder
        self._drawn = -math.inf
        self._took = 0.0
        self._missing = False

    def update(self, rows: list[dict], last: bool) -> None:
        """Draw the rows of summary.csv where the last drawing took less than 1 % of the time since.

        Args:
            last: whether these are the last ones, which are always drawn.
        """
        start = time.monotonic()
        if self._missing or not (last or self._took < 0.01 * (start - self._drawn)):
            return
        try:
            draw_curves(self._folder, rows)
        except ImportError:
            self._missing = True
            _logger.info("No curves.png: matplotlib is not installed (pip install matplotlib).")
        self._drawn = time.monotonic()
        self._took = self._drawn - start


def draw_curves(folder: str, rows: list[dict]) -> None:
    """Draw losses and accuracy over the epochs into curves.png; needs matplotlib.

    Args:
        folder: the run's.
        rows: those of summary.csv.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells about its font cache

    # Okabe and Ito's colours, told apart with any colour vision; markers tell them apart in grey.
    lines = {
        "plain": ("plain iterations", "#56B4E9", "v", ":"),
        "train_loss_droppath": ("droppath iterations", "#0072B2", "o", "-"),
        "train_loss_complement": ("complement iterations", "#D55E00", "s", "-"),
        "eval_loss": ("validation", "#000000", "^", "--"),
    }
    # With --rdp-start-epoch the first epochs are timm's own.
    rows = [
        {**row, "plain": row["train_loss"]} if row.get("train_loss_droppath") is None else row
        for row in rows
    ]
    if all("plain" in row for row in rows):
        lines = {"train_loss": ("training", "#0072B2", "o", "-"), "eval_loss": lines["eval_loss"]}
    scores = {
        "eval_top1": ("top-1", "#009E73", "o", "-"),
        "eval_top5": ("top-5", "#CC79A7", "s", "--"),
    }
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=110)
    for axes, curves, label in zip(
        figure.subplots(1, 2), (lines, scores), ("loss", "validation accuracy (%)"), strict=True
    ):
        for column, (name, colour, marker, style) in curves.items():
            points = [(r["epoch"], r[column]) for r in rows if r.get(column) is not None]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    linestyle=style,
                    marker=marker,
                    markersize=4,
                    markevery=max(1, len(points) // 25),
                    label=name,
                )
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    write_atomically(os.path.join(folder, "curves.png"), image.getvalue())
