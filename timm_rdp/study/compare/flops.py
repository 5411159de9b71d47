"""Counting the floating-point operations of real passes, also on the meta device."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count


def convolution_backward_flops(
    grad_out_shape: list[int], x_shape: list[int], w_shape: list[int], *rest: Any, **_kwargs: Any
) -> int:
    """FLOPs of a convolution's backward: each of its two gradients takes as many as the forward.

    Torch's own formula (2.15) counts the gradient of the weight `groups` times over, which makes a
    depthwise model's backward look several times as large as it is.

    Args:
        grad_out_shape: (B, C_out, ...).
        x_shape: (B, C_in, ...).
        w_shape: (C_out, C_in / groups, ...), transposed (C_in, C_out / groups, ...).
        rest: bias, stride, padding, dilation, transposed, output_padding, groups, and whether the
            gradients of input, weight and bias are asked for; that of the bias counts as nothing.
    """
    *_, transposed, _, _, output_mask = rest
    forward = conv_flop_count(x_shape, w_shape, grad_out_shape, transposed=transposed)
    return sum(output_mask[:2]) * forward


class FlopCounter(TorchDispatchMode):
    """Adds up in `flops` what torch's FlopCounterMode would, without its search for modules.

    That takes as long again as the passes themselves. Matrix products, attention and convolutions
    count, 2 for a multiplication and its addition; elementwise operations, normalisation and
    pooling count as nothing.
    """

    _formulas = FlopCounterMode(
        display=False,
        custom_mapping={torch.ops.aten.convolution_backward: convolution_backward_flops},
    ).flop_registry

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = self._formulas.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        return out
