"""Runs a model on stand-ins for its tensors, and takes back whatever that did to it."""

import logging
import random
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def on_stand_ins(model: nn.Module, fake: bool) -> Iterator[None]:
    """Within it the tensors that the model's modules hold are others of the same kind.

    Afterwards every attribute, hook, mode, class and list or dict of the modules is what it was,
    and so is every random state.

    Args:
        model: any model; it is the same object within, as closures and hooks know it.
        fake: make them fake tensors, and every other tensor that is computed within; else copies.
    """
    saved: dict[int, tuple[Any, Any]] = {}  # containers and their contents, by id
    stand_ins: dict[int, Tensor] = {}  # by the id of what they stand for, which may be shared
    classes = {module: type(module) for module in model.modules()}
    device = device_of(model)
    states = random.getstate(), (numpy := sys.modules.get("numpy")) and numpy.random.get_state()
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
    # It logs, with a traceback, what an operator raises on sizes that do not fit.
    log = logging.getLogger(FakeTensorMode.__module__)
    log_was_disabled = log.disabled
    with torch.random.fork_rng([device] if device.type == "cuda" else []), mode:
        try:
            log.disabled = True
            for module in classes:
                _replace(vars(module), fake, saved, stand_ins)
            yield
        finally:
            for container, contents in saved.values():
                container.clear()
                (container.extend if hasattr(container, "extend") else container.update)(contents)
            for module, kind in classes.items():
                if type(module) is not kind:
                    module.__class__ = kind
            log.disabled = log_was_disabled
            random.setstate(states[0])
            if numpy is not None:
                numpy.random.set_state(states[1])


def _replace(container: Any, fake: bool, saved: dict, stand_ins: dict[int, Tensor]) -> None:
    """Put stand-ins for the tensors into a dict or list, and into those within it."""
    if id(container) in saved:
        return
    saved[id(container)] = container, container.copy()
    items = container.items() if isinstance(container, dict) else enumerate(container)
    for key, value in list(items):
        if isinstance(value, dict | list | set | deque):
            _replace(value, fake, saved, stand_ins)
        elif isinstance(value, Tensor) and not isinstance(container, set):
            if id(value) not in stand_ins:
                stand_ins[id(value)] = _stand_in(value, fake)
            container[key] = stand_ins[id(value)]


def device_of(model: nn.Module) -> torch.device:
    """Where the model's stand-ins are: on its own device, or on the CPU for one on meta."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def _stand_in(value: Tensor, fake: bool) -> Tensor:
    if fake:
        device = "cpu" if value.is_meta else value.device
        like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    else:
        like = value.detach().clone()
    if not isinstance(value, nn.Parameter):
        return like
    return nn.Parameter(like, like.is_floating_point() or like.is_complex())
