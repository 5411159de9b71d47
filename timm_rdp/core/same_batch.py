"""The complement iteration on the batches of a droppath iteration, after the optimizer's step."""

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from timm_rdp.core.drop_path import Hook

_NO_LOSS = (
    'batch="same" repeats the calls of {model}, and finds no loss in what they return (a scalar, '
    '["loss"] or .loss) that backward() went through: follow() the module that returns it, pass '
    "step() a closure, or write the loop as `for it in rdp.cycle(): with it: ...`"
)
_SHORT_CLOSURE = (
    "step() was passed a closure that does not hold all batches of this iteration (accumulation): "
    'use batch="next", or write the loop as `for it in rdp.cycle(): with it: ...`'
)


@dataclass
class _Call:
    """One call of the training forward, to be repeated."""

    arguments: tuple[tuple, dict]
    contexts: list[AbstractContextManager]  # autocast, and no_sync() of other ranks
    gradient: Tensor | None = None  # of the loss, as the script's own backward gave it


def same_batch(batch: str, clip: Callable[[], Any] | None) -> "SameBatch | None":
    """What runs complement iterations on the same batches, where attach() was asked for that."""
    if batch not in ("next", "same"):
        raise ValueError(f'batch={batch!r} must be "next" or "same"')
    return SameBatch(clip) if batch == "same" else None


class SameBatch:
    """Notes the calls of a droppath iteration, and runs the complement iteration on them.

    Args:
        clip: called before the second step.
    """

    def __init__(self, clip: Callable[[], Any] | None = None):
        self.again: Callable[[], Any] | None = None  # a trainer's forward and backward, once more
        self._clip = clip
        self._calls: list[_Call] = []
        self._repeated = 0  # calls in the complement iteration
        self._module: Any = None

    def watch(self, module: nn.Module, is_noted: Callable[[], bool]) -> Any:
        """Note the calls of the module that returns the loss, while `is_noted()`."""

        def note(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            self._repeated += 1
            if self.again is None and is_noted():
                self._note(args, kwargs, output)

        self._module = module
        return module.register_forward_hook(Hook(note), with_kwargs=True)

    def _note(self, args: tuple, kwargs: dict, output: Any) -> None:
        contexts: list[AbstractContextManager] = []
        for kind in {p.device.type for p in self._module.parameters()}:
            dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
            contexts.append(torch.autocast(kind, dtype=dtype, enabled=enabled))
        if not getattr(self._module, "require_backward_grad_sync", True):
            contexts.append(self._module.no_sync())
        call = _Call((args, kwargs), contexts)
        self._calls.append(call)
        loss = _loss_in(output)
        if loss is not None and loss.requires_grad:
            loss.register_hook(lambda gradient: setattr(call, "gradient", gradient))

    def forget(self) -> None:
        """Let go of the inputs."""
        self._calls = []

    def train(self, optimizer: Optimizer, closure: Callable | None) -> None:
        """Forward, backward and step on the noted calls, or on the closure's."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._repeated = 0
        for parameter in parameters:  # as zero_grad() leaves it
            parameter.grad = None
        with torch.enable_grad():
            if self.again is not None:
                self.again()
            elif closure is not None:
                closure()
                if self._repeated < len(self._calls):
                    raise RuntimeError(_SHORT_CLOSURE)
            else:
                self._repeat()
            if _unscale([p.grad for p in parameters if p.grad is not None]):
                if self._clip is not None:
                    self._clip()
                optimizer.step()
        for parameter in parameters:
            parameter.grad = None

    def _repeat(self) -> None:
        if not self._calls or any(call.gradient is None for call in self._calls):
            raise RuntimeError(_NO_LOSS.format(model=type(self._module).__name__))
        for call in self._calls:
            args, kwargs = call.arguments
            with ExitStack() as contexts:
                for context in call.contexts:
                    contexts.enter_context(context)
                loss = _loss_in(self._module(*args, **kwargs))
                assert loss is not None
                loss.backward(call.gradient)


def _unscale(gradients: list[Tensor]) -> bool:
    """Undo the scale of the GradScaler whose step this is within; whether all are finite."""
    frame: Any = sys._getframe()
    # No other frame is looked into: that would hold on to the script's own variables.
    while frame is not None and frame.f_code is not GradScaler.step.__code__:
        frame = frame.f_back
    if frame is None or not (scaler := frame.f_locals["self"]).is_enabled():
        return True
    torch._foreach_div_(gradients, scaler.get_scale())
    return all(bool(g.isfinite().all()) for g in gradients)


def _loss_in(output: Any) -> Tensor | None:
    """The loss in what a forward returns: a scalar, ["loss"], .loss, or the first of a tuple."""
    if isinstance(output, Mapping):
        output = output.get("loss")
    elif isinstance(output, tuple | list) and not hasattr(output, "loss"):
        output = output[0] if output else None
    output = getattr(output, "loss", output)
    return output if isinstance(output, Tensor) and output.numel() == 1 else None
