"""timm's DropPath, patched so that it exposes its masks and obeys decisions made elsewhere.

A dropped path contributes zeros whatever it computes, so the modules at its entrance can be handed
one sample instead of the batch: everything behind them costs next to nothing, and the DropPath
returns full-size zeros. A path whose samples are dropped one by one is handed those that it keeps.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

# What one call of a DropPath is told to do within an iteration: None leaves it timm's own
# per-sample behaviour, 0.0 drops the path for the whole batch, any other number keeps it and
# divides its output by that number.
Decision = float | None
# The same as compiled code reads it: what is False or True is constant in its graphs.
Weight = Tensor | bool | None


class Hook:
    """A forward hook that calls `function`, and does nothing in a copy of the model.

    Args:
        function: takes the hook's arguments; None for a hook that does nothing.
    """

    def __init__(self, function: Callable[..., Any] | None = None):
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return None if self.function is None else self.function(*args)

    def __reduce__(self) -> tuple:
        return (Hook, ())


class Kind(NamedTuple):
    """A class of DropPaths, timm's or another, and how its attributes are read.

    Attributes:
        type: the class.
        rate: name of the attribute that is the drop probability.
        scales: what is kept is divided; where there is one, the attribute `scale_by_keep` says it.
        per_sample: the samples of a batch are dropped one by one, not all or none.
    """

    type: type[nn.Module]
    rate: str = "drop_prob"
    scales: bool = True
    per_sample: bool = True


class MaskedDropPath(DropPath):
    """DropPath with `masks`; outside an iteration it computes bit for bit what timm's computes."""

    _kind: ClassVar[Kind] = Kind(DropPath)
    _decisions: Sequence[Decision] | None = None
    _weights: tuple[Weight, ...] | None = None  # the decisions, as compiled code reads them
    _trained: str = ""  # which parameters of the region that it is compiled with require a gradient
    _calls: int = 1  # calls per forward
    _call: int = 0  # calls since the forward began
    _recompute: tuple[int, int] = (-1, 0)  # backward pass that recomputes this module, calls in it
    _record: Sequence[Any] = ()  # per call a mask, or the shape, value and device of one
    _owner: Callable[[], object] | None = None  # weak reference to the controller
    _loop: Any = None  # the AttachedLoop, if there is one
    # What the entrances of its paths passed on, by call. Of a dropped one, the batch size and the
    # memory format of the zeros that it returns; of others the mask (B,), the indices of the kept
    # samples (None: all), what to multiply by, and the entrances that have passed them on.
    _batch: dict[int, tuple[int, torch.memory_format]]
    _kept: dict[int, tuple[Tensor, Tensor | None, float, tuple[int, ...]]]

    @property
    def masks(self) -> tuple[Tensor, ...]:
        """What the last training forward sampled, one bool tensor per call, True = kept.

        Shape () for a whole-batch decision, (B,) for timm's per-sample one.
        """
        # Kept as cheap as it came and made a bool tensor only when somebody looks.
        return tuple(
            e.reshape(e.shape[:1]) != 0
            if isinstance(e, Tensor)
            else torch.full(e[0], e[1], device=e[2])
            for e in self._record
        )

    def forward(self, x: Tensor) -> Tensor:
        """Drop, scale or pass on x of shape (B, ...), as this call was told to."""
        if not self.training:
            return x
        if torch.compiler.is_compiling():
            return self._forward_compiled(x)
        call, first_forward = self._next_call()
        decision = None if self._decisions is None else self._decisions[call]
        if decision is not None:
            entry = ((), decision != 0.0, x.device)
            if decision == 0.0:
                x = self._zeros(x, call)
            elif decision != 1.0:
                x = x / decision
        elif call in self._kept:
            entry, index, scale, _ = self._kept.pop(call)
            x = _scatter_kept(x, entry, index, scale)
        else:
            if self._decisions is None and torch.is_grad_enabled():
                self._check_outside(first_forward)
            x, entry = self._sample(x)
        if first_forward:
            self._record = [entry] if call == 0 else [*self._record, entry]
        return x

    def _forward_compiled(self, x: Tensor) -> Tensor:
        # What it was told is noted by decide().
        call = 0
        if self._trained == "?":  # read, since torch before 2.12 makes no graph anew for a flag
            return x
        if self._calls > 1:
            call = self._call
            self._call = (call + 1) % self._calls
        weight = None if self._weights is None else self._weights[call]
        if isinstance(weight, bool):
            return x if weight else _zeros(x.shape, x, _memory_format_of(x))
        if weight is not None:
            dropped = weight == 0
            return torch.where(dropped, 0.0, x / torch.where(dropped, 1.0, weight)).to(x.dtype)
        if self._weights is None and self._decisions is not None:
            _refuse_unknown_compile()
        if call in self._kept:
            entry, index, scale, _ = self._kept.pop(call)
            x = _scatter_kept(x, entry, index, scale)
        else:
            x, entry = self._sample(x)
        self._record = [entry] if call == 0 else [*self._record, entry]
        return x

    def _sample(self, x: Tensor) -> tuple[Tensor, Any]:
        """timm's stochastic depth with the same use of the random state, and what it sampled."""
        if self.drop_prob == 0.0:
            return x, (x.shape[:1], True, x.device)
        keep_prob = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
        if keep_prob > 0.0 and self.scale_by_keep:
            mask.div_(keep_prob)
        return x * mask, mask

    def _next_call(self) -> tuple[int, bool]:
        """Index of this call within its forward, and whether that is a first forward.

        Gradient checkpointing runs a forward again within the backward pass. It recomputes a block
        as a whole, in the order of the first forward, but possibly not to its end.
        """
        backward = torch._C._current_graph_task_id()
        if backward == -1:
            call = self._call
            self.__dict__["_call"] = call + 1  # nn.Module's own __setattr__ is slow
            return call % self._calls, True
        if self._calls == 1:
            return 0, False
        seen = self._recompute[1] if self._recompute[0] == backward else 0
        self._recompute = (backward, seen + 1)
        return seen % self._calls, False

    def _check_outside(self, first_forward: bool) -> None:
        """Refuse a forward that belongs to an iteration, but is run outside it."""
        if first_forward:
            if self._loop is not None:
                self._loop.outside()
        elif self._record and not isinstance(self._record[0], Tensor) and self._record[0][0] == ():
            raise RuntimeError(
                "gradient checkpointing recomputes a forward of an iteration that is over: call "
                "backward() before leaving it, and before switching to eval mode"
            )

    def train(self, mode: bool = True) -> "MaskedDropPath":
        """Set the mode; a validation or an epoch begins."""
        if self._loop is not None:
            self._loop.set_aside()
        return super().train(mode)

    def _zeros(self, x: Tensor, call: int) -> Tensor:
        """What a dropped path contributes; full-size, because many blocks add to it in place."""
        if call not in self._batch:
            return torch.zeros_like(x)
        batch, layout = self._batch[call]
        return _zeros((batch, *x.shape[1:]), x, layout)

    def pass_on_one_sample(self, call: int, module: nn.Module, args: tuple) -> tuple | None:
        """Forward pre-hook at the entrance of a dropped path, which is this call."""
        if not self.training or not args:
            return None
        x = args[0]
        # The zeros join the shortcut, so they are laid out like what enters the path.
        self._batch[call] = (len(x), _memory_format_of(x))
        return (x[:1].detach(), *args[1:])

    def pass_on_kept_samples(
        self, call: int, entrance: int, fixed: bool, module: nn.Module, args: tuple
    ) -> tuple | None:
        """Forward pre-hook at an entrance of a path: passes on the samples that are kept.

        The first entrance samples which: timm's mask, or as many as it keeps on average.
        """
        if not self.training or self.drop_prob == 0.0 or not args:
            return None
        if torch.compiler.is_compiling() and not fixed:
            return None  # their number would be compiled for
        x = args[0]
        if call not in self._kept or entrance in self._kept[call][3]:
            sample = self._sample_fixed if fixed else self._sample_mask
            self._kept[call] = (*sample(x), ())
        mask, index, scale, passed = self._kept[call]
        self._kept[call] = (mask, index, scale, (*passed, entrance))
        if index is None:
            return None
        return (_in_memory_order(x, lambda x: x.index_select(0, index)), *args[1:])

    def _sample_mask(self, x: Tensor) -> tuple[Tensor, Tensor | None, float]:
        mask = x.new_empty(x.shape[0]).bernoulli_(1 - self.drop_prob)
        index = mask.nonzero().squeeze(1)
        if not len(index):
            index = index.new_zeros(1)  # parameters get a gradient of zero, as with timm
        scaled = self.scale_by_keep and self.drop_prob < 1.0
        scale = 1 / (1 - self.drop_prob) if scaled else 1.0
        return mask, None if len(index) == len(mask) else index, scale

    def _sample_fixed(self, x: Tensor) -> tuple[Tensor, Tensor | None, float]:
        keep_prob = 1 - float(self.drop_prob)
        count = max(1, round(len(x) * keep_prob))
        index = torch.randperm(len(x), device=x.device)[:count]
        # The expectation is timm's, whatever was rounded.
        mean = 1.0 if self.scale_by_keep and keep_prob > 0.0 else keep_prob
        mask = x.new_zeros(len(x)).index_fill_(0, index, 1.0)
        return mask, None if count == len(x) else index, mean * len(x) / count

    def decide(
        self,
        decisions: Sequence[Decision],
        weights: Sequence[Weight] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Set what each call of the coming forwards does, until UNTOLD is.

        Compiled code on `device` reads the same from `weights`, tensors of shape () or constants.
        """
        weights = None if weights is None else tuple(weights)
        vars(self).update(_decisions=decisions, _weights=weights, _call=0)
        self._batch.clear()
        if weights is not None:
            self._record = [((), d != 0.0, device) for d in decisions if d is not None]

    def __prepare_scriptable__(self) -> nn.Module:
        if self._owner is not None and self._owner() is not None:
            raise RuntimeError("a patched model cannot be scripted: detach() it first")
        plain = copy.copy(self)
        setattr(plain, "__class__", self._kind.type)  # noqa: B010
        return plain

    def __getstate__(self) -> dict:
        # A copy (EMA, pickle) stands on its own: it belongs to no controller and to no iteration.
        state = {k: v for k, v in vars(self).items() if k not in ADDED}
        return {**state, "_calls": self._calls, "_batch": {}, "_kept": {}}


ADDED = set(MaskedDropPath.__annotations__)
UNTOLD = {"_decisions": None, "_weights": None, "_call": 0}  # timm's behaviour for all calls


@torch.compiler.disable()
def _refuse_unknown_compile() -> None:
    raise RuntimeError(
        "the model was compiled after it was patched: pass the compiled model to ResidualDropPath, "
        "or to the follow() of the one that it has"
    )


def _scatter_kept(y: Tensor, mask: Tensor, index: Tensor | None, scale: float) -> Tensor:
    """A path's output y (K, ...) times `scale`, among zeros for the samples that are not kept.

    These are 0 in `mask` (B,); `index` (K,) has the others, and is None where all are kept.
    """
    kept = mask if index is None else mask.index_select(0, index)
    y = y * kept.to(y.dtype).mul(scale).view(-1, *(1,) * (y.ndim - 1))
    if index is None:
        return y
    return _in_memory_order(
        y, lambda y: y.new_zeros((len(mask), *y.shape[1:])).index_copy_(0, index, y)
    )


def _zeros(shape: Sequence[int], like: Tensor, layout: torch.memory_format) -> Tensor:
    layout = layout if len(shape) == 4 else torch.contiguous_format
    zeros = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)
    return zeros.zero_()


def _memory_format_of(x: Tensor) -> torch.memory_format:
    """channels_last where x is (B, C, H, W) with its channels innermost, and not contiguous too."""
    channels_last = torch.channels_last
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=channels_last):
        return channels_last
    return torch.contiguous_format


def _in_memory_order(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function(x), where function works along the batch and would lose a channels-last layout."""
    if _memory_format_of(x) == torch.channels_last:
        return function(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return function(x)
