"""Which paths need not be run when they are dropped, and how they are not run.

A dropped path contributes zeros whatever it computes, so the modules at its entrance can be handed
one sample instead of the batch: everything behind them costs next to nothing, and the DropPath
returns full-size zeros. Whether a path takes that is found by trying it, not from a table of
architectures.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from timm.layers import DropPath
from torch import Tensor, nn

# Trial forwards for one model, at the most: a model whose paths fail one by one is left alone.
_MAX_TRIALS = 32


class OneSample:
    """Forward pre-hook of a module at the entrance of a dropped path: passes on the first sample.

    Args:
        drop_path: the path's DropPath, which finds in `_batch` the zeros that it is to return.
        call: which call of it the path is.
        run: pass on the whole batch nevertheless.
    """

    def __init__(self, drop_path: DropPath | None = None, call: int = 0, run: bool = False):
        self._drop_path = drop_path
        self._call = call
        self._run = run

    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        if self._drop_path is None or not self._drop_path.training or not args:
            return None
        x = args[0]
        # The zeros join the shortcut, so they are laid out like what enters the path.
        last = x.ndim == 4 and not x.is_contiguous() and is_channels_last(x)
        self._drop_path._batch[self._call] = (
            len(x),
            torch.channels_last if last else torch.contiguous_format,
        )
        return None if self._run else (x[:1].detach(), *args[1:])

    def __reduce__(self) -> tuple:
        return (OneSample, ())  # does nothing in a copy of the model


def is_channels_last(x: Tensor) -> bool:
    """Whether the (B, C, H, W) tensor has its channels innermost in memory."""
    return x.is_contiguous(memory_format=torch.channels_last)


def zeros_for_batch(x: Tensor, batch: int, memory_format: torch.memory_format) -> Tensor:
    """Zeros of shape (batch, ...) for a path's output x of shape (N, ...)."""
    memory_format = memory_format if x.ndim == 4 else torch.contiguous_format
    zeros = torch.empty(
        (batch, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=memory_format
    )
    return zeros.zero_()


class Rest:
    """Forward pre-hook that keeps a module in eval mode: BatchNorm then keeps its statistics."""

    def __init__(self, active: bool = True):
        self._active = active

    def __call__(self, module: nn.Module, _: tuple) -> None:
        if self._active:
            module.training = False

    def __reduce__(self) -> tuple:
        return (Rest, (False,))  # does nothing in a copy of the model


class KeptSamples:
    """Forward pre-hook at the entrance of a path: samples timm's mask, passes on what it keeps.

    Args:
        drop_path: the path's patched DropPath, which finds in `_kept` what was sampled.
        call: which call of it the path is.
    """

    def __init__(self, drop_path: DropPath | None = None, call: int = 0):
        self._drop_path = drop_path
        self._call = call

    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        path = self._drop_path
        if path is None or not path.training or path.drop_prob == 0.0 or not args:
            return None
        if torch.compiler.is_compiling():
            return None
        x = args[0]
        sampled = path._kept.get(self._call)
        if sampled is None or module in sampled[2]:  # the first entrance of this forward
            mask = x.new_empty(x.shape[0]).bernoulli_(1 - path.drop_prob)
            index = mask.nonzero().squeeze(1)
            if not len(index):
                index = index.new_zeros(1)  # parameters get a gradient of zero, as with timm
            elif len(index) == len(mask):
                index = None
            sampled = path._kept[self._call] = (mask, index, set())
        sampled[2].add(module)
        index = sampled[1]
        if index is None:
            return None
        return (_in_memory_order(x, lambda x: x.index_select(0, index)), *args[1:])

    def __reduce__(self) -> tuple:
        return (KeptSamples, ())  # does nothing in a copy of the model


def scatter_kept(y: Tensor, mask: Tensor, index: Tensor | None, scale: float) -> Tensor:
    """The path's output for the kept samples, scaled, among zeros for the others.

    Args:
        y: shape (K, ...), the output for K kept samples.
        mask: shape (B,), nonzero where a sample is kept.
        index: shape (K,), the kept samples; None where all are.
        scale: what timm multiplies the kept ones by.
    """
    kept = mask if index is None else mask.index_select(0, index)
    y = y * kept.to(y.dtype).mul(scale).view(-1, *(1,) * (y.ndim - 1))
    if index is None:
        return y
    return _in_memory_order(
        y, lambda y: y.new_zeros((len(mask), *y.shape[1:])).index_copy_(0, index, y)
    )


def _in_memory_order(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function(x), where function works along the batch and would lose a channels-last layout."""
    if x.ndim == 4 and not x.is_contiguous() and is_channels_last(x):
        return function(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return function(x)


class _Mismatch(Exception):
    """The DropPath was handed something else than one sample of the batch."""

    def __init__(self, path: str):
        super().__init__(path)
        self.path = path


class _TrialDropPath(DropPath):
    def forward(self, x: Tensor) -> Tensor:
        call = self._batch.setdefault("call", 0)
        self._batch["call"] += 1
        if call not in self._expected:
            return x
        name, shape, begun = self._expected[call]
        batch, memory_format = self._batch.get(call, (0, torch.contiguous_format))
        if x.shape[0] != 1 or (batch, *x.shape[1:]) != shape:
            raise _Mismatch(name)
        begun.pop(name, None)
        return zeros_for_batch(x, batch, memory_format)


def try_skipping(
    model: nn.Module,
    run: Callable[[], object],
    paths: Mapping[str, tuple[DropPath, int, tuple[int, ...]]],
    entrances: Mapping[str, list[nn.Module]],
    buffered: Callable[[Iterable[str]], list[nn.Module]],
) -> set[str]:
    """Names of the paths that can be dropped without being run.

    All are tried together, and those that turn out not to take it are left out one by one; where a
    second one of a kind does not, the others of its kind are left out with it.

    Args:
        model: a copy of the model that may be changed, in train mode.
        run: runs it on an example of at least two samples.
        paths: per path its DropPath in `model`, which call of it, and the shape that it is handed.
        entrances: per path the modules of `model` that are to be handed one sample.
        buffered: modules with buffers in the dropped part of some paths.
    """
    blocks = {}
    for module in model.modules():
        if isinstance(module, DropPath):
            module.__class__ = _TrialDropPath
            module._batch, module._expected = {}, {}
        for attribute, child in module.named_children():
            if isinstance(child, DropPath):
                blocks[child] = (module, attribute)
    failed_kinds = set()
    trials = 0

    def kind_of(name: str) -> tuple:
        drop_path, call, _ = paths[name]
        block, attribute = blocks[drop_path]
        return attribute, call, tuple((n, type(m)) for n, m in block.named_modules())

    def at_fault(names: list[str]) -> tuple[bool, str | None]:
        """Whether one of the paths cannot be dropped so, and which, as far as that shows."""
        begun: dict[str, None] = {}  # in order
        hooks = []
        resting = [m for m in buffered(names) if m.training]
        for module in resting:
            module.training = False
        for name in names:
            drop_path, call, shape = paths[name]
            drop_path._expected[call] = (name, shape, begun)

            def note(*_: object, name: str = name) -> None:
                begun[name] = None

            for module in entrances[name]:
                hooks.append(module.register_forward_pre_hook(note))
                hooks.append(module.register_forward_pre_hook(OneSample(drop_path, call)))
        try:
            run()
            return False, None
        except _Mismatch as e:
            return True, e.path
        except Exception:  # whatever a model raises on a batch that it cannot take
            return True, next(reversed(begun), None)
        finally:
            for hook in hooks:
                hook.remove()
            for module in resting:
                module.training = True
            for drop_path, _, _ in paths.values():
                drop_path._batch, drop_path._expected = {}, {}

    def search(names: list[str]) -> list[str]:
        nonlocal trials
        while names and trials < _MAX_TRIALS:
            trials += 1
            failed, culprit = at_fault(names)
            if not failed:
                return names
            if culprit is None:
                half = len(names) // 2
                return search(names[:half]) + search(names[half:]) if half else []
            kind = kind_of(culprit)
            names = [
                n
                for n in names
                if n != culprit and not (kind in failed_kinds and kind_of(n) == kind)
            ]
            failed_kinds.add(kind)
        return []

    return set(search([name for name in paths if entrances[name]]))
