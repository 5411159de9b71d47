"""timm's DropPath, patched so that it exposes its masks and obeys decisions made elsewhere."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.layers.drop import DropPath
from torch import Tensor

from timm_rdp.core.skip import SkippingDropPath, scatter_kept, zeros_for_batch

# What one call of a DropPath is told to do within an iteration: None leaves it timm's own
# per-sample behaviour, 0.0 drops the path for the whole batch, any other number keeps it and
# divides its output by that number.
Decision = float | None


class MaskedDropPath(SkippingDropPath):
    """DropPath with `masks`; outside an iteration it computes bit for bit what timm's computes."""

    _decisions: tuple[Decision, ...] | None = None
    _weights: tuple[Tensor | None, ...] | None = None  # the decisions, as compiled code reads them
    _calls: int = 1  # calls per forward
    _call: int = 0  # calls since the forward began
    _recompute: tuple[int, int] = (-1, 0)  # backward pass that recomputes this module, calls in it
    _record: Sequence[Any] = ()  # per call, see _as_mask
    _owner: Callable[[], object] | None = None  # weak reference to the controller

    @property
    def masks(self) -> tuple[Tensor, ...]:
        """What the last training forward sampled, one bool tensor per call, True = kept.

        Shape () for a whole-batch decision, (B,) for timm's per-sample one.
        """
        return tuple(_as_mask(entry) for entry in self._record)

    def forward(self, x: Tensor) -> Tensor:
        """Drop, scale or pass on x of shape (B, ...), as this call was told to."""
        if not self.training:
            return x
        if torch.compiler.is_compiling():
            return self._forward_compiled(x)
        call, first_forward = self._next_call()
        decision = None if self._decisions is None else self._decisions[call]
        if decision is not None:
            entry = (decision != 0.0, x.device)
            x = self._obey(x, decision, call)
        elif call in self._kept:
            entry, index, _ = self._kept.pop(call)
            scaled = self.scale_by_keep and self.drop_prob < 1.0
            x = scatter_kept(x, entry, index, 1 / (1 - self.drop_prob) if scaled else 1.0)
        else:
            x, entry = _per_sample(x, self.drop_prob, self.scale_by_keep)
        if first_forward:
            self._note(call, entry)
        return x

    def _forward_compiled(self, x: Tensor) -> Tensor:
        # Compiled code must depend on the decisions through tensors alone, or it would be compiled
        # anew for each mask. What it was told is noted by decide().
        call = 0
        if self._calls > 1:
            call = self._call
            self._call = (call + 1) % self._calls
        weight = None if self._weights is None else self._weights[call]
        if weight is not None:
            dropped = weight == 0
            return torch.where(dropped, 0.0, x / torch.where(dropped, 1.0, weight)).to(x.dtype)
        if self._weights is None and self._decisions is not None:
            _refuse_unknown_compile()
        x, entry = _per_sample(x, self.drop_prob, self.scale_by_keep)
        self._note(call, entry)
        return x

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

    def _obey(self, x: Tensor, decision: float, call: int) -> Tensor:
        if decision != 0.0:
            return x if decision == 1.0 else x / decision
        # Full-size, because many blocks add the shortcut to it in place.
        if call in self._batch:
            return zeros_for_batch(x, *self._batch[call])
        return torch.zeros_like(x)

    def _note(self, call: int, entry: Any) -> None:
        self._record = [entry] if call == 0 else [*self._record, entry]

    def decide(
        self,
        decisions: Sequence[Decision] | None,
        weights: Sequence[Tensor | None] | None = None,
    ) -> None:
        """Set what each call of the coming forwards does; None is timm's behaviour for all.

        Compiled models are handed the same as tensors of shape (), `weights`.
        """
        # nn.Module's own __setattr__ would be most of what an iteration costs.
        vars(self).update(
            _decisions=None if decisions is None else tuple(decisions),
            _weights=None if weights is None else tuple(weights),
            _call=0,
            _batch={},
        )
        if decisions is not None and weights is not None:
            told = zip(decisions, weights, strict=True)
            self._record = [(d != 0.0, w.device) for d, w in told if w is not None]

    def __getstate__(self) -> dict:
        # A copy (EMA, pickle) stands on its own: it belongs to no controller and to no iteration.
        state = {k: v for k, v in vars(self).items() if k not in _ADDED}
        return {**state, "_calls": self._calls, "_batch": {}, "_kept": {}}


_ADDED = {*SkippingDropPath.__annotations__, *MaskedDropPath.__annotations__}


@torch.compiler.disable()
def _refuse_unknown_compile() -> None:
    raise RuntimeError(
        "the model was compiled after it was patched: pass the compiled model to ResidualDropPath, "
        "or to the follow() of the one that it has"
    )


def _per_sample(x: Tensor, drop_prob: float, scale_by_keep: bool) -> tuple[Tensor, Any]:
    """timm's stochastic depth with the same use of the random state, and what it sampled."""
    if drop_prob == 0.0:
        return x, (x.shape[0], x.device)
    keep_prob = 1 - drop_prob
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
    if keep_prob > 0.0 and scale_by_keep:
        mask.div_(keep_prob)
    return x * mask, mask


def _as_mask(entry: Any) -> Tensor:
    # Kept as cheap as it came and made a bool tensor only when somebody looks.
    if isinstance(entry, Tensor):
        return entry.flatten() != 0
    value, device = entry
    if isinstance(value, bool):
        return torch.tensor(value, device=device)
    return torch.ones(value, dtype=torch.bool, device=device)


def patch(
    modules: Mapping[str, DropPath], calls_per_forward: Mapping[str, int], owner: object
) -> dict[str, MaskedDropPath]:
    """Turn DropPaths, in place, into MaskedDropPaths of this controller."""
    patched = {}
    for name, module in modules.items():
        module.__class__ = MaskedDropPath
        assert isinstance(module, MaskedDropPath)
        module._calls = calls_per_forward.get(name, 1)
        module._owner = weakref.ref(owner)
        module._batch, module._kept = {}, {}
        patched[name] = module
    return patched


def unpatch(modules: Mapping[str, MaskedDropPath]) -> None:
    """Give patched modules their class back and remove everything that patching added."""
    for module in modules.values():
        setattr(module, "__class__", DropPath)  # noqa: B010
        for name in _ADDED:
            vars(module).pop(name, None)
