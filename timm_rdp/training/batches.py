"""The batches of an epoch: their order, loaded, put on the device, mixed, grouped into updates."""

import argparse
import copy
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from timm import utils
from torch.utils.data import DataLoader, IterableDataset

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

    What loading one draws is drawn within the context `stream()`.
    """
    loader = None
    while True:
        with stream():
            loader = iter(data.train) if loader is None else loader
            loaded = next(loader, None)
            if loaded is None:
                return
            input, target = to_device(args, loaded, device, dtype, data.mixup_fn)
        size = (input["patches"] if isinstance(input, dict) else input).shape[0]
        scale = _loss_scale(args, data.batch_size_reference, size, device)
        state.batches_done += 1
        yield MicroBatch(state.batches_done - 1, input, target, size, scale)


def first_batch(
    args: argparse.Namespace, data: Data, device: torch.device, dtype: torch.dtype | None
) -> tuple[Any, torch.Tensor] | None:
    """One batch of the training data, loaded by this process; None where that would move the data.

    Of an iterable data set, which keeps its own place. The caller restores the random state.
    """
    inner = getattr(data.train, "loader", data.train)
    if args.naflex_loader:
        loaded = next(iter(inner.dataset))
    elif inner.batch_sampler is None or isinstance(inner.dataset, IterableDataset):
        return None
    else:
        loaded = inner.collate_fn([inner.dataset[i] for i in next(iter(inner.batch_sampler))])
    if inner is not data.train:
        prefetcher = copy.copy(data.train)
        prefetcher.loader = [loaded]
        loaded = next(iter(prefetcher))
    return to_device(args, loaded, device, dtype, data.mixup_fn)


def to_device(
    args: argparse.Namespace,
    loaded: tuple[Any, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype | None,
    mixup_fn: Callable | None = None,
) -> tuple[Any, torch.Tensor]:
    """What timm's prefetcher would have done, where it is not in use; then the memory layout."""
    input, target = loaded

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value  # NaFlex's sequence length
        return value.to(device, dtype if value.is_floating_point() else None)

    if not args.prefetcher:
        target = target.to(device=device)
        if isinstance(input, dict):
            input = {name: move(value) for name, value in input.items()}
        elif isinstance(input, list | tuple):  # augmentation splits, one after the other
            target = torch.cat([target] * len(input))
            input = torch.cat([move(split) for split in input])
        else:
            input = move(input)
        if mixup_fn is not None:
            input, target = mixup_fn(input, target)
    if args.channels_last and not isinstance(input, dict):
        input = input.contiguous(memory_format=torch.channels_last)
    return input, target


def _loss_scale(
    args: argparse.Namespace, reference: float, size: int, device: torch.device
) -> float | torch.Tensor | None:
    """How much a batch counts where batch sizes vary; None where they do not."""
    naflex = args.naflex_loader
    if not (naflex or args.train_img_sizes):
        return None
    mode = args.naflex_loss_scale if naflex else args.variable_batch_loss_scale
    scale = {"none": 1.0, "linear": size / reference, "sqrt": (size / reference) ** 0.5}[mode]
    if naflex and args.distributed:
        # Ranks may hold batches of different size: weigh each one by its share of the whole.
        total = torch.tensor(size, device=device, dtype=torch.float32)
        return scale * args.world_size * size / utils.reduce_tensor(total, 1)
    return scale


def update_sizes(num_batches: int, accumulate: int) -> Iterator[tuple[int, int, bool]]:
    """How timm's script groups the batches of an epoch into updates.

    What is left over at the end of the epoch is divided by its own number, and, in timm, also
    updates wherever the batch number is a multiple of that: 7 batches by 4 make updates of
    4, 2 and 1, the last two divided by 3. Kept, because runs are to agree bit for bit.

    A loader that is longer than it says goes on in full groups.

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


@dataclass
class SamplerPass:
    """Where one epoch's pass over a batch sampler stands, or where it is to go on."""

    order: dict | None = None  # random state from which the order was drawn
    yielded: int = 0  # batches
    # Random states before the newest batches were loaded, or before the next ones are.
    states: deque = field(default_factory=partial(deque, maxlen=8))


class ResumableSampler:
    """A batch sampler whose passes can be noted and continued; all else is the original's.

    The order of an epoch is drawn when its first batch is asked for, and a batch's augmentation
    when it is loaded, which may be one batch before it is used (timm's prefetcher). So the random
    state is noted at both moments. A resumed epoch draws the same order, passes over the batches
    that were used without loading them, and loads the others from the same states.

    Args:
        sampler: the original: yields lists of indices.
        in_process: whether this process loads the batches (no workers): only then the random states
            before each of them are known.

    Attributes:
        current: the pass that began last.
        replay: one of another process, with which the next pass goes on.
    """

    def __init__(self, sampler: Any, in_process: bool):
        self._sampler = sampler
        self.in_process = in_process
        self.current = self.replay = SamplerPass()

    def __iter__(self) -> Iterator[list[int]]:
        replay, self.replay = self.replay, SamplerPass()
        if replay.order is not None:
            set_random_state(replay.order)
        current = self.current = SamplerPass(random_state(), replay.yielded)
        for indices in islice(self._sampler, replay.yielded, None):
            if replay.states:
                set_random_state(replay.states.popleft())
            if self.in_process:
                current.states.append(random_state())
            current.yielded += 1
            yield indices
        if replay.states:
            set_random_state(replay.states.pop())

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


def make_resumable(loader: Any) -> ResumableSampler | None:
    """Put a ResumableSampler into a loader of timm's; None where there is no batch sampler."""
    inner = getattr(loader, "loader", loader)
    if not isinstance(inner, DataLoader) or inner.batch_sampler is None:
        return None  # an iterable data set: it alone knows its order
    if hasattr(inner, "iterator"):  # timm's MultiEpochsDataLoader: one pass without an end
        return None
    sampler = ResumableSampler(inner.batch_sampler, inner.num_workers == 0)
    # DataLoader refuses to have it replaced, though nothing but iter() has looked at it so far.
    vars(inner)["batch_sampler"] = sampler
    return sampler


def draw_seed_aside(loader: Any) -> None:
    """Have a loader that keeps its workers draw their seed without moving the random state.

    For a resumed run, whose loader draws what it has drawn before the checkpoint a second time.
    """
    inner = getattr(loader, "loader", loader)
    if getattr(inner, "persistent_workers", False) or hasattr(inner, "iterator"):
        inner.generator = torch.Generator()
        inner.generator.set_state(torch.get_rng_state())
