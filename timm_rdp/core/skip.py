"""How a path is run for fewer samples than the batch has.

A dropped path contributes zeros whatever it computes, so the modules at its entrance can be handed
one sample instead of the batch: everything behind them costs next to nothing, and the DropPath
returns full-size zeros. A path whose samples are dropped one by one is handed those that it keeps.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn


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


class SkippingDropPath(DropPath):
    """A DropPath that the hooks at the entrance of its paths tell what they passed on.

    Both dicts have the call of the DropPath as key:
        _batch: batch size and memory format of the zeros that a dropped path returns.
        _kept: the mask (B,), the indices of the kept samples (None: all), and the entrances that
            have passed them on.
    """

    _batch: dict[int, tuple[int, torch.memory_format]]
    _kept: dict[int, tuple[Tensor, Tensor | None, set[nn.Module]]]


def pass_on_one_sample(
    drop_path: SkippingDropPath, call: int, module: nn.Module, args: tuple
) -> tuple | None:
    """Forward pre-hook at the entrance of a dropped path, which is this call of `drop_path`."""
    if not drop_path.training or not args:
        return None
    x = args[0]
    # The zeros join the shortcut, so they are laid out like what enters the path.
    memory_format = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    drop_path._batch[call] = (len(x), memory_format)
    return (x[:1].detach(), *args[1:])


def zeros_for_batch(x: Tensor, batch: int, memory_format: torch.memory_format) -> Tensor:
    """Zeros of shape (batch, ...) for a path's output x of shape (N, ...)."""
    memory_format = memory_format if x.ndim == 4 else torch.contiguous_format
    zeros = torch.empty(
        (batch, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=memory_format
    )
    return zeros.zero_()


def pass_on_kept_samples(
    drop_path: SkippingDropPath, call: int, module: nn.Module, args: tuple
) -> tuple | None:
    """Forward pre-hook at the entrance of a path: samples timm's mask, passes on what it keeps."""
    if not drop_path.training or drop_path.drop_prob == 0.0 or not args:
        return None
    if torch.compiler.is_compiling():
        return None
    x = args[0]
    sampled = drop_path._kept.get(call)
    if sampled is None or module in sampled[2]:  # the first entrance of this forward
        mask = x.new_empty(x.shape[0]).bernoulli_(1 - drop_path.drop_prob)
        index = mask.nonzero().squeeze(1)
        if not len(index):
            index = index.new_zeros(1)  # parameters get a gradient of zero, as with timm
        elif len(index) == len(mask):
            index = None
        sampled = drop_path._kept[call] = (mask, index, set())
    _, index, passed = sampled
    passed.add(module)
    if index is None:
        return None
    return (_in_memory_order(x, lambda x: x.index_select(0, index)), *args[1:])


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
    if _is_channels_last(x):
        return function(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return function(x)


def _is_channels_last(x: Tensor) -> bool:
    """Whether x is (B, C, H, W) with its channels innermost in memory, and not contiguous too."""
    channels_last = torch.channels_last
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=channels_last)
