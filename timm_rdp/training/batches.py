"""The batches of an epoch: loaded, put on the device, mixed, counted, grouped into updates."""

import argparse
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from timm import utils

from timm_rdp.training.data import Data
from timm_rdp.training.state import RunState


class MicroBatch(NamedTuple):
    """One batch of the loader, on the device, augmented and mixed."""

    index: int  # within the epoch
    input: Any  # (B, C, H, W), or NaFlex's dict of patches
    target: torch.Tensor
    size: int
    loss_scale: float | torch.Tensor | None


def load_batches(
    args: argparse.Namespace,
    state: RunState,
    data: Data,
    device: torch.device,
    dtype: torch.dtype | None,
    stream: Callable[[], AbstractContextManager],
) -> Iterator[MicroBatch]:
    """The training loader's batches, each loaded when it is asked for, and counted in `state`.

    Args:
        dtype: of the images; None for float32.
        stream: a context that draws what the data draws.
    """
    loader = None
    while True:
        with stream():
            if loader is None:
                loader = iter(data.train)
            try:
                input, target = next(loader)
            except StopIteration:
                return
            input, target = to_device(args, input, target, device, dtype, data.mixup_fn)
        size = (input["patches"] if isinstance(input, dict) else input).shape[0]
        batch = MicroBatch(
            state.batches_done, input, target, size, _loss_scale(args, data, size, device)
        )
        state.batches_done += 1
        yield batch


def to_device(
    args: argparse.Namespace,
    input: Any,
    target: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype | None,
    mixup_fn: Callable | None = None,
) -> tuple[Any, torch.Tensor]:
    """What timm's prefetcher would have done, where it is not in use; then the memory layout."""

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value  # NaFlex's sequence length
        return value.to(device, dtype if value.is_floating_point() else None)

    if not args.prefetcher:
        target = target.to(device=device)
        if isinstance(input, dict):
            input = {name: move(value) for name, value in input.items()}
        elif isinstance(input, list | tuple):  # augmentation splits, one after the other
            target = target.repeat(len(input))
            input = torch.cat([move(split) for split in input])
        else:
            input = move(input)
        if mixup_fn is not None:
            input, target = mixup_fn(input, target)
    if args.channels_last and not isinstance(input, dict):
        input = input.contiguous(memory_format=torch.channels_last)
    return input, target


def _loss_scale(
    args: argparse.Namespace, data: Data, size: int, device: torch.device
) -> float | torch.Tensor | None:
    """How much a batch counts where batch sizes vary; None where they do not."""
    if not (data.naflex or data.scheduled):
        return None
    mode = args.naflex_loss_scale if data.naflex else args.variable_batch_loss_scale
    share = size / data.batch_size_reference
    scale = {"none": 1.0, "linear": share, "sqrt": share**0.5}[mode or "none"]
    if data.naflex and args.distributed:
        # Ranks may hold batches of different size: weigh each one by its share of the whole.
        total = torch.tensor(size, device=device, dtype=torch.float32)
        return scale * args.world_size * size / utils.reduce_tensor(total, 1)
    return scale


def update_sizes(num_batches: int, accumulate: int) -> Iterator[tuple[int, int, bool]]:
    """How timm's script groups the batches of an epoch into updates.

    What is left over at the end of the epoch is divided by its own number, and, in timm, also
    updates wherever the batch number is a multiple of that: 7 batches by 4 make updates of
    4, 2 and 1, the last two divided by 3. Kept, because runs are to agree bit for bit.

    Args:
        num_batches: what the loader says its length is; a longer one goes on in full groups.
        accumulate: batches per update.

    Yields:
        number of batches, divisor of their losses, whether the epoch ends here
    """
    full = num_batches - num_batches % accumulate
    for end in range(accumulate, full + 1, accumulate):
        yield accumulate, accumulate, end == num_batches
    remainder = num_batches - full
    start = full
    for end in range(full + 1, num_batches + 1):
        early = end > full + 1 and end % remainder == 0
        if early or end == num_batches:
            yield end - start, remainder, end == num_batches
            start = end
    while True:
        yield accumulate, accumulate, False


def random_state(device: torch.device | None = None) -> dict[str, Any]:
    """The states of torch's, Python's and numpy's generators as plain data for a checkpoint.

    Args:
        device: whose generator is noted too, where it is a CUDA device.
    """
    numpy_state: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = numpy_state
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Set the generators to what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if device is not None and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class DataStream:
    """A random stream for the data alone, so that what the model draws does not move it.

    Args:
        seed: of the stream.
        rank: of the process; each has a stream of its own, as with timm's `random_seed`.
        device: whose generator the data draws from too (timm erases rectangles there), if any.
    """

    def __init__(self, seed: int, rank: int = 0, device: torch.device | None = None):
        self._device = device
        outside = random_state(device)
        utils.random_seed(seed, rank)
        self.state = random_state(device)
        set_random_state(outside, device)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within this context the process draws from the stream."""
        outside = random_state(self._device)
        set_random_state(self.state, self._device)
        try:
            yield
        finally:
            self.state = random_state(self._device)
            set_random_state(outside, self._device)
