"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from timm import utils
from tqdm import tqdm

from timm_rdp.core.rdp import COMPLEMENT, DROPPATH
from timm_rdp.training.losses import Losses

if TYPE_CHECKING:
    from timm_rdp.training.loop import Run

_logger = logging.getLogger(__name__)

_BAR_INTERVAL = 1.0  # seconds


class Progress:
    """Shows where a run is.

    Args:
        args: the options.
        is_bar: whether to draw a bar; by default where stderr is a terminal.
    """

    def __init__(self, args, is_bar: bool | None = None):
        primary = utils.is_primary(args)
        self.is_bar = primary and (sys.stderr.isatty() if is_bar is None else is_bar)
        # All ranks fetch losses at the same updates, because they compare them.
        self._interval = float("inf") if args.distributed else _BAR_INTERVAL
        self._bar: tqdm | None = None
        self._run_start = 0.0
        self._updates_done = 0
        self._shown = 0.0

    def start_epoch(self, run: Run) -> None:
        """Begin an epoch."""
        now = time.time()
        self._run_start = self._run_start or now
        self._update_start = self._shown = now
        self._update_times = utils.AverageMeter()
        self._data_times = utils.AverageMeter()
        self._samples = 0
        self._shown_updates = 0
        if self.is_bar:
            self._bar = tqdm(
                total=run.updates_per_epoch,
                desc=f"Epoch {run.epoch + 1}/{run.num_epochs}",
                unit="update",
                dynamic_ncols=True,
                leave=False,
            )

    def updated(self, samples: int, data_time: float) -> None:
        """One update is done: `samples` images, that took `data_time` seconds to come."""
        now = time.time()
        self._update_times.update(now - self._update_start)
        self._data_times.update(data_time)
        self._update_start = now
        self._samples = samples
        self._updates_done += 1

    def is_due(self) -> bool:
        """Whether the bar should be redrawn."""
        return self.is_bar and time.time() - self._shown > self._interval

    def show(self, run: Run, losses: Losses, last: bool) -> None:
        """Fetch the losses and show them."""
        losses.settle()
        self._shown = time.time()
        now, mean = losses.current()
        if not utils.is_primary(run.args):
            return
        if self._bar is not None:
            self._draw_bar(run, losses, last)
        else:
            self._log_line(run, losses, now, mean)

    def _log_line(self, run: Run, losses: Losses, now: float, mean: float) -> None:
        total = run.updates_per_epoch
        times, data = self._update_times, self._data_times
        lr = mean_lr(run)
        both = ""
        if losses.phases[COMPLEMENT].count:
            meter = losses.phases[COMPLEMENT]
            both = f"Complement: {meter.val:#.3g} ({meter.avg:#.3g})  "
        _logger.info(
            f"Train: {run.epoch} [{run.update:>4d}/{total} "
            f"({100.0 * (run.update + 1) / total:>3.0f}%)]  "
            f"Loss: {now:#.3g} ({mean:#.3g})  {both}"
            f"Time: {times.val:.3f}s, {self._samples / max(times.val, 1e-9):>7.2f}/s  "
            f"({times.avg:.3f}s, {self._samples / max(times.avg, 1e-9):>7.2f}/s)  "
            f"LR: {lr:.3e}  Data: {data.val:.3f} ({data.avg:.3f})"
        )

    def _draw_bar(self, run: Run, losses: Losses, last: bool) -> None:
        shown = {}
        for phase in (DROPPATH, COMPLEMENT):
            if losses.phases[phase].count:
                shown[phase] = f"{losses.phases[phase].avg:#.3g}"
        if not shown:
            shown["loss"] = f"{losses.first.avg:#.3g}"
        shown["img/s"] = f"{self._samples / max(self._update_times.avg, 1e-9):.0f}"
        shown["run left"] = tqdm.format_interval(self._seconds_left(run))
        self._bar.n = run.update + 1
        self._bar.set_postfix(shown)
        if last:
            self._bar.close()
            self._bar = None

    def _seconds_left(self, run: Run) -> float:
        """From the mean time per update so far, validation included."""
        left = (run.num_epochs - run.epoch) * run.updates_per_epoch - run.update - 1
        return max(0, left) * (time.time() - self._run_start) / max(1, self._updates_done)

    def watch(self, loader: Iterable, what: str) -> Iterable:
        """The loader itself, with a bar while it is gone through where there are bars."""
        if not self.is_bar:
            return loader
        return tqdm(loader, desc=what, unit="batch", dynamic_ncols=True, leave=False)

    def end_epoch(self, run: Run, train: Mapping, rdp: Mapping, validation: Mapping | None) -> None:
        """Leave one line about the epoch where the bar was."""
        if not self.is_bar:
            return
        line = f"Epoch {run.epoch + 1}/{run.num_epochs}: loss {train['loss']:#.3g}"
        if rdp.get("train_loss_complement") is not None:
            line += f", complement {rdp['train_loss_complement']:#.3g}"
        if validation is not None:
            line += (
                f"; validation loss {validation['loss']:#.3g}, top-1 {validation['top1']:.2f} %, "
                f"top-5 {validation['top5']:.2f} %"
            )
        _logger.info(line)

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def mean_lr(run: Run) -> float:
    """Mean learning rate over the parameter groups."""
    rates = [group["lr"] for group in run.optimizer.param_groups]
    return sum(rates) / len(rates)
