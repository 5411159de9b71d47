"""What a run leaves behind beside its checkpoints: args.yaml, summary.csv, curves.png."""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import logging
import math
import os
import time
from collections import OrderedDict
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from timm import utils
from timm.models import safe_model_name

from timm_rdp.errors import TrainingError, UsageError

_logger = logging.getLogger(__name__)

SUMMARY = "summary.csv"
CURVES = "curves.png"


def experiment_name(args: argparse.Namespace, data_config: Mapping) -> str:
    """`--experiment`, or timm's name for a run: time, model and image size."""
    if args.experiment:
        return args.experiment
    size = str(data_config["input_size"][-1])
    return "-".join([f"{datetime.now():%Y%m%d-%H%M%S}", safe_model_name(args.model), size])


def check_output(folder: str | Path) -> Path:
    """The output folder, which exists or can be made; nothing is made yet.

    Raises:
        UsageError: it has no name or none that can be, is a file, lies below one, or cannot be
            written.
    """
    if not str(folder):
        raise UsageError("--output '': name a folder")
    folder = Path(folder)
    path = folder.absolute()
    try:
        there = next(p for p in (path, *path.parents) if _is_there(p))
        for name in path.relative_to(there).parts:
            _is_there(there / name)
    except (OSError, ValueError) as error:  # too long, no permission, a loop of links, a NUL
        why = getattr(error, "strerror", None) or error
        raise UsageError(
            f"--output {folder}: cannot be written ({why}); name another folder"
        ) from error
    if not there.is_dir():
        raise UsageError(f"--output {folder}: {there} is a file, not a folder; name another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"--output {folder}: {there} cannot be written; name another folder")
    return folder


def _is_there(path: Path) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def create_output(args: argparse.Namespace, experiment: str, args_text: str) -> str:
    """Make the run's folder, write args.yaml into it, and return it.

    Raises:
        UsageError: it cannot be written.
    """
    folder = os.path.join(args.output or "./output/train", experiment)
    try:
        utils.get_outdir(args.output or "./output/train", experiment)
        write_atomically(os.path.join(folder, "args.yaml"), args_text.encode())
    except (OSError, TrainingError) as error:
        raise UsageError(
            f"--output {folder}: cannot be written ({error}); name another one with --output"
        ) from error
    return folder


def write_atomically(path: str, content: bytes) -> None:
    """Write a file so that it is either the old or the new one at any time.

    Raises:
        TrainingError: it cannot be written; the old one is intact.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise TrainingError(
            f"{path} cannot be written: {error.strerror}; make room there"
        ) from error


class Summary:
    """The run's summary.csv: timm's columns in timm's format, then those of ResidualDroppath.

    Args:
        folder: the run's.
        start_epoch: rows of this and later epochs are from before a resume, and are dropped.
        resumed: whether rows of earlier epochs belong to this run; otherwise a run that is started
            afresh in an old folder writes its own header below them, as timm does.
    """

    def __init__(self, folder: str, start_epoch: int = 0, resumed: bool = False):
        self._path = os.path.join(folder, SUMMARY)
        self.rows: list[dict] = []
        self._text = ""
        old = Path(self._path)
        if not old.exists():
            return
        text = old.read_bytes().decode()
        if not resumed:
            self._text = text
            return
        for row in csv.DictReader(io.StringIO(text, newline="")):
            if row["epoch"].isdigit() and int(row["epoch"]) < start_epoch:
                self._append({k: v for k, v in row.items() if k is not None}, parse=True)

    def add(
        self,
        epoch: int,
        train_metrics: Mapping,
        eval_metrics: Mapping | None,
        lr: float,
        rdp_metrics: Mapping,
    ) -> dict:
        """Add an epoch's row to the file, and return it."""
        row = OrderedDict(epoch=epoch)
        row.update((f"train_{k}", v) for k, v in train_metrics.items())
        row.update((f"eval_{k}", v) for k, v in (eval_metrics or {}).items())
        row["lr"] = lr
        row.update(rdp_metrics)
        self._append(row)
        write_atomically(self._path, self._text.encode())
        return row

    def _append(self, row: Mapping, parse: bool = False) -> None:
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, fieldnames=row.keys())
        if not self.rows:
            writer.writeheader()
        writer.writerow(row)
        self._text += out.getvalue()
        self.rows.append({k: float(v) if v else None for k, v in row.items()} if parse else row)


class Curves:
    """The run's curves.png, drawn again once that costs no more than 0.2 % of the time.

    Args:
        folder: the run's.
    """

    SHARE = 1 / 500

    def __init__(self, folder: str):
        self._folder = folder
        self._due = -math.inf

    def update(self, rows: list[dict], last: bool) -> bool:
        """Draw the rows of summary.csv if it is time to, and always the last ones.

        Returns:
            False where matplotlib is missing
        """
        if time.monotonic() < self._due and not last:
            return True
        if not _has_matplotlib():
            return False
        start = time.monotonic()  # matplotlib is imported only once
        draw_curves(self._folder, rows)
        end = time.monotonic()
        self._due = end + (end - start) / self.SHARE
        return True


def _has_matplotlib() -> bool:
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure
        import matplotlib.ticker  # noqa: F401
    except ImportError:
        return False
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells about its font cache
    return True


def draw_curves(folder: str, rows: list[dict]) -> None:
    """Draw losses and accuracy over the epochs into curves.png; needs matplotlib.

    Args:
        folder: the run's.
        rows: those of summary.csv.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

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
    write_atomically(os.path.join(folder, CURVES), image.getvalue())


def start_wandb(args: argparse.Namespace, experiment: str):
    """Begin the wandb run that `--log-wandb` asks for, and return the module.

    Raises:
        UsageError: wandb refuses.
    """
    import wandb

    try:
        wandb.init(
            project=args.wandb_project,
            name=experiment,
            config=vars(args),
            tags=args.wandb_tags,
            resume="must" if args.wandb_resume_id else None,
            id=args.wandb_resume_id or None,
        )
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"--log-wandb: {text}; log in, or set WANDB_MODE=offline to log into a folder"
        ) from error
    return wandb
