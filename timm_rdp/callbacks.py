"""What the callbacks for trainers share: a ResidualDropPath for as long as one trains."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from timm_rdp.core.checks import unwrap
from timm_rdp.core.rdp import ResidualDropPath
from timm_rdp.core.same_batch import same_batch


class TrainsWithRDP:
    """A callback that patches a network when training starts, and gives it back at the end.

    Args:
        batch: "same" or "next", see `ResidualDropPath.attach()`.
        model: the network's name in what the trainer trains, "" for that itself.
        seed, every, example_input: those of `ResidualDropPath`.

    Raises:
        ValueError: for other values; when training starts, where the network cannot be trained so.
    """

    def __init__(
        self,
        batch: str = "same",
        model: str | None = None,
        seed: int = 0,
        every: int = 1,
        example_input: Any = None,
    ):
        same_batch(batch, None)
        if model is not None and not isinstance(model, str):
            raise ValueError(f"model= takes the name of a part, not a {type(model).__name__}")
        self.controller: ResidualDropPath | None = None  # while training
        self._batch, self._model = batch, model
        self._options = {"seed": seed, "every": every, "example_input": example_input}
        self._state: dict[str, Any] = {}

    def _attach(
        self, module: nn.Module, wrapper: Any, optimizer: Any, clip: Any, again: Callable[[], Any]
    ) -> ResidualDropPath:
        """Patch the network in a module that the trainer runs as `wrapper`."""
        single = not dist.is_initialized() or dist.get_world_size() == 1
        in_ddp = wrapper is not module and isinstance(wrapper, DistributedDataParallel)
        if unwrap(wrapper) is not unwrap(module) or not (single or in_ddp):
            raise ValueError(
                f"the trainer runs the {type(module).__name__} as a {type(wrapper).__name__}: RDP "
                "supports a single device and DistributedDataParallel there"
            )
        network = module.get_submodule(self._model or "")
        self.controller = rdp = ResidualDropPath(network, **self._options)
        if wrapper is not module:
            rdp.follow(wrapper)
        if self._state:
            rdp.load_state_dict(self._state)
        rdp.attach(optimizer, self._batch, clip)
        if rdp._loop is not None and rdp._loop._same is not None:
            rdp._loop._same.again = again
        return rdp

    def detach(self) -> None:
        """Give the network back, also after an exception that the trainer does not report."""
        if self.controller is not None:
            self._state = self.controller.state_dict()
            self.controller.detach()
            self.controller = None

    def state_dict(self) -> dict[str, Any]:
        """Where the cycles stand, in plain Python values."""
        return self._state if self.controller is None else self.controller.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue there when training starts."""
        self._state = dict(state_dict)
