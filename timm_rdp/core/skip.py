"""What hooks need that run a path for fewer samples than the batch has.

A dropped path contributes zeros whatever it computes, so the modules at its entrance can be handed
one sample instead of the batch: everything behind them costs next to nothing, and the DropPath
returns full-size zeros. A path whose samples are dropped one by one is handed those that it keeps.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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


def memory_format_of(x: Tensor) -> torch.memory_format:
    """channels_last where x is (B, C, H, W) with its channels innermost, and not contiguous too."""
    channels_last = torch.channels_last
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=channels_last):
        return channels_last
    return torch.contiguous_format


def in_memory_order(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function(x), where function works along the batch and would lose a channels-last layout."""
    if memory_format_of(x) == torch.channels_last:
        return function(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return function(x)
