"""What a person sees of a run: losses, a bar on a terminal or plain lines elsewhere, curves.png."""

import logging
import math
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from timm import utils
from tqdm import tqdm

from timm_rdp import Iteration, ResidualDropPath
from timm_rdp.core.rdp import COMPLEMENT, DROPPATH
from timm_rdp.errors import TrainingError
from timm_rdp.training.state import RunState

_logger = logging.getLogger(__name__)

_BAR_INTERVAL = 1.0  # seconds


class _Pending(NamedTuple):
    loss: torch.Tensor
    divisor: int
    size: int
    update: int
    phase: str
    first: bool


class Losses:
    """The losses of one epoch, averaged as timm does; fetched only when somebody looks.

    Args:
        device: that the ranks communicate on.
        world_size: number of ranks; 0 where training is not distributed.

    Attributes:
        first: over the first iteration that each batch got; timm's training loss.
        phases: over the droppath and over the complement iterations.
    """

    def __init__(
        self,
        epoch: int,
        rdp: ResidualDropPath | None = None,
        device: torch.device | None = None,
        world_size: int = 0,
    ):
        self.epoch, self._rdp, self._device, self._world_size = epoch, rdp, device, world_size
        self._pending: list[_Pending] = []
        self._dropped = utils.AverageMeter()
        self._trainable = utils.AverageMeter()
        self.first = utils.AverageMeter()
        self.phases = {DROPPATH: utils.AverageMeter(), COMPLEMENT: utils.AverageMeter()}
        if rdp is not None:
            self._numel = {n: p.numel() for n, p in rdp.model.named_parameters()}
            self._total = sum(self._numel.values())

    def add(
        self, loss: torch.Tensor, divisor: int, size: int, update: int, phase: str, first: bool
    ) -> None:
        """Take a micro-batch's detached loss, already divided by `divisor`."""
        self._pending.append(_Pending(loss, divisor, size, update, phase, first))

    def started(self, it: Iteration) -> None:
        """Note how much an iteration drops or trains."""
        if it.phase == DROPPATH:
            self._dropped.update(len(it.dropped))
        else:
            self._trainable.update(sum(self._numel[n] for n in it.trainable) / self._total)

    def fetch(self) -> None:
        """Take what is pending from the device into the averages; every rank must call it.

        Raises:
            TrainingError: naming the first update whose loss is not a finite number.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        values = torch.stack([p.loss for p in pending]).tolist()
        bad = next((i for i, v in enumerate(values) if not math.isfinite(v)), len(values))
        if self._world_size:
            # Every rank must stop, or the others wait for ever.
            where = torch.tensor(bad, device=self._device)
            torch.distributed.all_reduce(where, op=torch.distributed.ReduceOp.MIN)
            bad = int(where)
        if bad < len(values):
            kind = f"{pending[bad].phase or 'plain'} iteration"
            raise TrainingError(
                f"the training loss is {values[bad]} in epoch {self.epoch}, update "
                f"{pending[bad].update} ({kind}): training stops; try a lower --lr, more "
                "--warmup-epochs or --clip-grad 1.0"
            )
        for value, p in zip(values, pending, strict=True):
            if p.first:
                self.first.update(value * p.divisor, p.size)
            if p.phase:
                self.phases[p.phase].update(value * p.divisor, p.size)

    def state_dict(self) -> dict[str, list[float]]:
        """Value, average, sum and count of each average so far; every rank must call it."""
        self.fetch()
        return {name: [m.val, m.avg, m.sum, m.count] for name, m in self._meters().items()}

    def load_state_dicts(self, states: list[dict[str, list[float]]]) -> None:
        """Go on with this process's averages, or with those of several put together."""
        for name, meter in self._meters().items():
            meter.val, meter.avg, meter.sum, meter.count = states[-1][name]
            if len(states) > 1:
                meter.sum = sum(state[name][2] for state in states)
                meter.count = sum(state[name][3] for state in states)
                meter.avg = meter.sum / meter.count if meter.count else 0

    def _meters(self) -> dict[str, Any]:
        named = {"first": self.first, "dropped": self._dropped, "trainable": self._trainable}
        return {**named, **self.phases}

    def latest(self) -> tuple[float, float]:
        """The training loss of the last batch and its average, over all ranks."""
        return self._over_ranks(self.first.val), self._over_ranks(self.first.avg)

    def summary(self) -> tuple[OrderedDict, OrderedDict]:
        """timm's training metrics of the epoch, and those of ResidualDroppath.

        The latter are None where there was nothing, and empty without --rdp.
        """
        self.fetch()
        metrics = OrderedDict(loss=self._over_ranks(self.first.avg))
        if self._rdp is None:
            return metrics, OrderedDict()
        by_phase = {k: self._over_ranks(m.avg) if m.count else None for k, m in self.phases.items()}
        return metrics, OrderedDict(
            train_loss_droppath=by_phase[DROPPATH],
            train_loss_complement=by_phase[COMPLEMENT],
            dropped_paths=self._dropped.avg if self._dropped.count else None,
            trainable_fraction=self._trainable.avg if self._trainable.count else None,
        )

    def _over_ranks(self, value: float) -> float:
        if not self._world_size:
            return value
        mean = torch.tensor([value], device=self._device, dtype=torch.float32)
        return utils.reduce_tensor(mean, self._world_size).item()


def mean_lr(optimizer: torch.optim.Optimizer) -> float:
    """Mean learning rate over the parameter groups."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return sum(rates) / len(rates)


class Display:
    """Shows where a run is, in the primary process.

    With several ranks, which must fetch their losses at the same updates, the bar moves only then.
    """

    def __init__(
        self, num_epochs: int, updates_per_epoch: int, is_primary: bool, is_distributed: bool
    ):
        self._num_epochs, self._updates_per_epoch = num_epochs, updates_per_epoch
        self._is_primary = is_primary
        self.is_bar = is_primary and sys.stderr.isatty()
        self._interval = math.inf if is_distributed else _BAR_INTERVAL
        self._bar: tqdm | None = None
        self._run_start = 0.0
        self._updates_done = 0
        self._shown = 0.0

    def start_epoch(self, state: RunState) -> None:
        """Begin an epoch."""
        now = time.time()
        self._run_start = self._run_start or now
        self._update_start = self._shown = now
        self._update_times = utils.AverageMeter()
        self._data_times = utils.AverageMeter()
        self._samples = 0
        if self.is_bar:
            self._bar = tqdm(
                total=self._updates_per_epoch,
                desc=f"Train: {state.epoch}",
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}",
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

    def show(self, state: RunState, losses: Losses, lr: float, last: bool) -> None:
        """Fetch the losses and show them; every rank must call it."""
        losses.fetch()
        self._shown = time.time()
        latest, mean = losses.latest()
        if self._bar is not None:
            self._draw_bar(state, losses, last)
        elif self._is_primary:
            total, times, data = self._updates_per_epoch, self._update_times, self._data_times
            complement = losses.phases[COMPLEMENT]
            both = f"Complement: {complement.val:#.3g} ({complement.avg:#.3g})  "
            _logger.info(
                f"Train: {state.epoch} [{state.update:>4d}/{total} "
                f"({100.0 * (state.update + 1) / total:>3.0f}%)]  "
                f"Loss: {latest:#.3g} ({mean:#.3g})  {both if complement.count else ''}"
                f"Time: {times.val:.3f}s, {self._samples / max(times.val, 1e-9):>7.2f}/s  "
                f"({times.avg:.3f}s, {self._samples / max(times.avg, 1e-9):>7.2f}/s)  "
                f"LR: {lr:.3e}  Data: {data.val:.3f} ({data.avg:.3f})"
            )

    def _draw_bar(self, state: RunState, losses: Losses, last: bool) -> None:
        assert self._bar is not None
        # From the mean time per update so far, validation included. It comes first, because a
        # narrow terminal cuts what comes last.
        per_update = (time.time() - self._run_start) / max(1, self._updates_done)
        left = (self._num_epochs - state.epoch) * self._updates_per_epoch - state.update - 1
        shown = {"run left": tqdm.format_interval(max(0, left) * per_update)}
        phases = {k: meter for k, meter in losses.phases.items() if meter.count}
        for name, meter in (phases or {"loss": losses.first}).items():
            shown[name] = f"{meter.avg:#.3g}"
        shown["img/s"] = f"{self._samples / max(self._update_times.avg, 1e-9):.0f}"
        self._bar.n = state.update + 1
        self._bar.set_postfix(shown)
        if last:
            self.close()

    def watch(self, loader: Iterable, what: str) -> Iterable:
        """The loader itself, with a bar while it is gone through where there are bars."""
        if not self.is_bar:
            return loader
        return tqdm(loader, desc=what, unit="batch", dynamic_ncols=True, leave=False)

    def show_validation(
        self, suffix: str, index: int, last: int, metrics: Callable[[], Mapping[str, float]]
    ) -> None:
        """Tell of a validation batch and of the metrics so far, of this rank."""
        if self._is_primary and not self.is_bar:
            shown = "  ".join(
                f"{k.capitalize()}: {v:>7.{3 if k == 'loss' else 2}f}" for k, v in metrics().items()
            )
            _logger.info(f"Test{suffix}: [{index:>4d}/{last}]  {shown}")

    def end_epoch(
        self, state: RunState, train: Mapping, rdp: Mapping, validation: Mapping | None
    ) -> None:
        """Leave one line about the epoch where the bar was."""
        if not self.is_bar:
            return
        line = f"Epoch {state.epoch}: loss {train['loss']:#.3g}"
        if rdp.get("train_loss_complement") is not None:
            line += f", complement {rdp['train_loss_complement']:#.3g}"
        if validation is not None:
            line += f"; validation loss {validation['loss']:#.3g}" + "".join(
                f", {name} {value:.2f} %" for name, value in validation.items() if name != "loss"
            )
        _logger.info(line)

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
