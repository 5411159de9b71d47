"""The random state of a process, as plain data that a checkpoint can hold."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from timm import utils


def random_state(device: torch.device | None = None) -> dict:
    """The states of torch's, Python's and numpy's generators, and of the device's where given."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict, device: torch.device | None = None) -> None:
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
        outside = random_state(self._device)
        utils.random_seed(seed, rank)
        self.state = random_state(self._device)
        set_random_state(outside, self._device)

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
