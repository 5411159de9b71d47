"""Writing so that no interruption loses what was there: checkpoints, other files, curves.png."""

import contextlib
import io
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from timm import utils
from timm.task import TrainingTask

from timm_rdp.errors import TrainingError

_logger = logging.getLogger("timm_rdp.training")


@contextlib.contextmanager
def _written(what: str, path: str, name: str | None = None) -> Iterator[IO[bytes]]:
    """A file to write within this context, on the disk at its end, then renamed to `name`.

    Raises:
        TrainingError: `what` cannot be written; there is no new file.
    """
    try:
        with open(path, "wb", 1 << 20) as file:  # torch writes in small pieces
            yield file
            file.flush()
            os.fsync(file.fileno())
        if name is not None:
            os.replace(path, name)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            os.unlink(path)
        cause: BaseException = error  # torch reports that a write failed, but not why
        while not isinstance(cause, OSError) and cause.__context__ is not None:
            cause = cause.__context__
        reason = getattr(cause, "strerror", None) or str(cause).partition("\n")[0]
        raise TrainingError(
            f"{what} cannot be written: {reason}; what was there is intact: make room and --resume"
        ) from error


class Saver(utils.CheckpointSaver):
    """timm's CheckpointSaver, writing so that no interruption loses what was there.

    Args:
        task: the task to save.
        run_state: called at every save; its entries go into the checkpoint beside timm's.
        kwargs: as timm's.
    """

    def __init__(self, *, task: TrainingTask, run_state: Callable[[], dict], **kwargs: Any):
        def state(ema: bool = False, **kwargs: Any) -> dict:
            of_task = task.get_checkpoint_state(ema=ema, **kwargs)
            return of_task if ema else {**of_task, **run_state()}

        super().__init__(task=SimpleNamespace(get_checkpoint_state=state), **kwargs)
        if not self.decreasing:  # in percent
            logging.getLogger(utils.CheckpointSaver.__module__).addFilter(_with_two_decimals)
        self.last_is_written = False  # and `save_checkpoint` does only what follows that

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        if self.last_is_written:
            return
        # The paths that arrive here are temporary; timm's _replace gives them their name.
        with _written(f"the checkpoint of epoch {epoch} ({save_path})", save_path) as file:
            super()._save(file, epoch, metric)

    def _replace(self, src: str, dst: str) -> None:
        if self.last_is_written:
            return
        os.replace(src, dst)  # timm unlinks first: a moment without any checkpoint

    def _duplicate(self, src: str, dst: str) -> None:
        temporary = f"{dst}.tmp"
        Path(temporary).unlink(missing_ok=True)
        try:
            os.link(src, temporary)
        except OSError:
            shutil.copy2(src, temporary)
        os.replace(temporary, dst)
        Path(temporary).unlink(missing_ok=True)  # still there where dst was the same file already


def _with_two_decimals(record: logging.LogRecord) -> bool:
    record.msg = re.sub(r"\d+\.\d+(?=\)\n)", lambda found: f"{float(found[0]):.2f}", record.msg)
    return True


def restore_history(saver: Saver, checkpoint: dict, path: str) -> None:
    """Go on ranking the checkpoints of the folder that the run is resumed into."""
    state = checkpoint.get("saver")
    folder, name = os.path.split(os.path.realpath(path))
    if not state or folder != os.path.realpath(saver.checkpoint_dir):
        return
    epoch, metric = state.get("pending", (None, None))
    if metric is None or name == "last.pth.tar":  # a recovery is not ranked
        state = {**state, "pending": (None, None)}
    saver.load_state_dict(state)
    if metric is not None and name == "last.pth.tar":
        # What followed the writing of `last` may have been cut short: it is done again.
        saver.last_is_written = True
        saver.save_checkpoint(epoch, metric)
        saver.last_is_written = False
    recoveries = Path(folder).glob("recovery-*.pth.tar")
    files = sorted(recoveries, key=lambda p: p.stat().st_mtime_ns)
    *old, saver.prev_recovery_file, saver.curr_recovery_file = ["", "", *map(str, files)]
    for file in filter(None, old):
        os.unlink(file)


def write_atomically(path: str, content: bytes) -> None:
    """Write a file so that it is either the old or the new one at any time.

    Raises:
        TrainingError: it cannot be written; the old one is intact.
    """
    with _written(path, f"{path}.tmp", path) as file:
        file.write(content)


class Curves:
    """The run's curves.png, drawn at the end of an epoch while that is cheap."""

    def __init__(self, folder: str, title: str = ""):
        self._folder, self._title = folder, title
        self._drawn, self._took = -math.inf, 0.0
        self._missing = False

    def update(self, rows: list[dict], last: bool) -> None:
        """Draw the rows of summary.csv where the last drawing took less than 1 % of the time since.

        The `last` ones are always drawn.
        """
        start = time.monotonic()
        if self._missing or not (last or self._took < 0.01 * (start - self._drawn)):
            return
        try:
            draw_curves(self._folder, rows, self._title)
        except ImportError:
            self._missing = True
            _logger.info("No curves.png: matplotlib is not installed (pip install matplotlib).")
        self._drawn = time.monotonic()
        self._took = self._drawn - start


def draw_curves(folder: str, rows: list[dict], title: str = "") -> None:
    """Draw losses and accuracy over the epochs into curves.png; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells about its font cache

    # With --rdp-start-epoch the first epochs are timm's own.
    plain = [
        r | {"plain": r["train_loss"]} if not r.get("train_loss_droppath") else r for r in rows
    ]
    with_rdp = any("plain" not in row for row in plain)
    # Okabe and Ito's colours, told apart with any colour vision; markers tell them apart in grey.
    losses = {
        "plain": ("plain iterations", "#56B4E9", "v", ":"),
        "train_loss_droppath": ("droppath iterations", "#0072B2", "o", "-"),
        "train_loss_complement": ("complement iterations", "#D55E00", "s", "-"),
        "eval_loss": ("validation", "#000000", "^", "--"),
    }
    if not with_rdp:
        losses["plain"] = ("training", "#0072B2", "o", "-")
    scores = {
        "eval_top1": ("top-1", "#009E73", "o", "-"),
        "eval_top5": ("top-5", "#CC79A7", "s", "--"),
        "eval_map": ("mAP", "#009E73", "o", "-"),
        "eval_micro_f1": ("micro F1", "#CC79A7", "s", "--"),
    }
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=110)
    figure.suptitle(title, fontsize="medium")
    labels = ("loss", "validation score (%)")
    for axes, lines, label in zip(figure.subplots(1, 2), (losses, scores), labels, strict=True):
        for column, (name, colour, marker, style) in lines.items():
            points = [(r["epoch"], r[column]) for r in plain if r.get(column) is not None]
            if points:
                look = dict(color=colour, linestyle=style, marker=marker, markersize=4)
                every = max(1, len(points) // 25)
                axes.plot(*zip(*points, strict=True), markevery=every, label=name, **look)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    write_atomically(os.path.join(folder, "curves.png"), image.getvalue())
