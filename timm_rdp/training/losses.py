"""The losses of one epoch, fetched from the device only when somebody looks."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import torch
from timm import utils

from timm_rdp.core.rdp import COMPLEMENT, DROPPATH, Iteration
from timm_rdp.errors import TrainingError

if TYPE_CHECKING:
    from timm_rdp.training.loop import Run


class _Pending(NamedTuple):
    loss: torch.Tensor
    divisor: int
    size: int
    update: int
    phase: str
    first: bool


class Losses:
    """Collects detached losses and averages them as timm's script does.

    Attributes:
        first: over the first iteration that each batch got; timm's training loss.
        phases: over the droppath and over the complement iterations.
    """

    def __init__(self, run: Run, epoch: int):
        self._run = run
        self._epoch = epoch
        self._pending: list[_Pending] = []
        self._dropped = utils.AverageMeter()
        self._trainable = utils.AverageMeter()
        self.first = utils.AverageMeter()
        self.phases = {DROPPATH: utils.AverageMeter(), COMPLEMENT: utils.AverageMeter()}
        if run.rdp is not None:
            self._numel = {n: p.numel() for n, p in run.rdp.model.named_parameters()}
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

    def settle(self) -> None:
        """Fetch what is pending into the averages.

        Raises:
            TrainingError: naming the first update whose loss is not a finite number.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        values = torch.stack([p.loss for p in pending]).tolist()
        bad = next((i for i, v in enumerate(values) if not math.isfinite(v)), len(values))
        if self._run.args.distributed:
            # Every rank must stop, or the others wait for ever.
            where = torch.tensor(bad, device=self._run.device)
            torch.distributed.all_reduce(where, op=torch.distributed.ReduceOp.MIN)
            bad = int(where)
        if bad < len(values):
            raise TrainingError(self._complaint(pending[bad], values[bad]))
        for value, p in zip(values, pending, strict=True):
            if p.first:
                self.first.update(value * p.divisor, p.size)
            if p.phase:
                self.phases[p.phase].update(value * p.divisor, p.size)

    def _complaint(self, p: _Pending, value: float) -> str:
        kind = f"{p.phase} iteration" if p.phase else "plain iteration"
        return (
            f"the training loss is {value} in epoch {self._epoch}, update {p.update} ({kind}): "
            "training stops; try a lower --lr, more --warmup-epochs or --clip-grad 1.0"
        )

    def state_dict(self) -> dict[str, list[float]]:
        """Value, average, sum and count of each average so far; every rank must call it."""
        self.settle()
        return {name: [m.val, m.avg, m.sum, m.count] for name, m in self._meters().items()}

    def load_state_dicts(self, states: list[dict[str, list[float]]]) -> None:
        """Go on with this process's averages, or with those of several put together."""
        for name, meter in self._meters().items():
            meter.val, meter.avg, meter.sum, meter.count = states[-1][name]
            if len(states) > 1:
                meter.sum = sum(state[name][2] for state in states)
                meter.count = sum(state[name][3] for state in states)
                meter.avg = meter.sum / meter.count if meter.count else 0

    def _meters(self) -> dict[str, utils.AverageMeter]:
        named = {"first": self.first, "dropped": self._dropped, "trainable": self._trainable}
        return {**named, **self.phases}

    def current(self) -> tuple[float, float]:
        """The training loss of the last batch and its average, over all ranks."""
        return self._over_ranks(self.first.val), self._over_ranks(self.first.avg)

    def of_epoch(self) -> tuple[OrderedDict, OrderedDict]:
        """timm's training metrics, and those of ResidualDroppath; None where there was nothing."""
        self.settle()
        metrics = OrderedDict(loss=self._mean(self.first))
        if self._run.rdp is None:
            return metrics, OrderedDict()
        extra = OrderedDict(
            train_loss_droppath=self._mean(self.phases[DROPPATH]),
            train_loss_complement=self._mean(self.phases[COMPLEMENT]),
            dropped_paths=self._dropped.avg if self._dropped.count else None,
            trainable_fraction=self._trainable.avg if self._trainable.count else None,
        )
        return metrics, extra

    def _mean(self, meter: utils.AverageMeter) -> float | None:
        if not meter.count and meter is not self.first:
            return None
        return self._over_ranks(meter.avg)

    def _over_ranks(self, value: float) -> float:
        if not self._run.args.distributed:
            return value
        mean = torch.tensor([value], device=self._run.device, dtype=torch.float32)
        return utils.reduce_tensor(mean, self._run.args.world_size).item()
