"""What a controller is made of, checked at the door."""

import logging
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from timm_rdp.core.paths import PathGraph

_logger = logging.getLogger(__name__)


def whole_number(argument: str, value: Any, least: int | None = None) -> int:
    """The value of an argument, as an int; ValueError if it is none, or one below `least`."""
    if not hasattr(value, "__index__"):
        raise ValueError(f"{argument}={value!r} must be a whole number")
    if least is not None and value < least:
        raise ValueError(f"{argument}={value} must be {least} or more")
    return operator.index(value)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile; ValueError for others."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"a {type(model).__name__} is no torch.nn.Module: pass the model itself")
    while True:
        if isinstance(model, torch.nn.DataParallel):
            raise ValueError(
                "the model is wrapped in DataParallel: use DistributedDataParallel, or pass the "
                "module inside, model.module"
            )
        inside = model.module if isinstance(model, DistributedDataParallel) else None
        inside = getattr(model, "_orig_mod", inside)
        if not isinstance(inside, nn.Module):
            return model
        model = inside


def modules_around(model: nn.Module, wrapper: nn.Module) -> list[nn.Module]:
    """The modules around a model, from a wrapper inwards, and itself; ValueError if it has none."""
    around = [m for m in wrapper.modules() if any(inside is model for inside in m.modules())]
    if not around:
        raise ValueError(
            f"this {type(wrapper).__name__} does not wrap the model that was patched: pass what "
            "torch.compile or DistributedDataParallel made of it, or the model itself"
        )
    own = {id(p) for p in model.parameters()}
    for ddp in (m for m in around if isinstance(m, DistributedDataParallel)):
        others = [
            n for n, p in ddp.module.named_parameters() if p.requires_grad and id(p) not in own
        ]
        if others:
            raise ValueError(
                f"DistributedDataParallel also trains {others[0]}, outside of the patched "
                f"{type(model).__name__}, and would not average it: patch the module that it wraps"
            )
    return around


def why_none_is_called(graph: PathGraph) -> str:
    """What to do with a model whose forward calls no DropPath, as the end of an error."""
    why = "no DropPath is called in its forward"
    if graph.drop_paths:
        return f"{why}, though it has {len(graph.drop_paths)}: use another model"
    return f"{why}: create it with drop_path_rate=0.1, or use a model that has stochastic depth"


def check_droppable(model: nn.Module, graph: PathGraph) -> None:
    """Check that there is something to drop, and something to train where it was dropped.

    Raises:
        ValueError: the model has no residual path that can be dropped or none with a parameter.
    """
    paths = [p for p in graph.paths if p.residual]
    if not graph.paths:
        why = why_none_is_called(graph)
    elif not paths:
        why = (
            f"none of its {len(graph.paths)} DropPaths is around a residual (dropping "
            f"{graph.paths[0].name} for a whole batch would silence the network): use another one"
        )
    elif not any(path.drop_prob > 0 for path in paths):
        why = (
            f"all of its {len(paths)} paths have drop_prob 0: create it with drop_path_rate=0.1 "
            "(in torchvision stochastic_depth_prob=0.1)"
        )
    elif not graph.dropped_part(p.name for p in paths):
        why = (
            f"none of its {len(paths)} paths carries a parameter (without {paths[0].name} all "
            "still reach the output), so that no complement iteration would train anything: use "
            "another one"
        )
    else:
        return
    raise ValueError(f"{type(model).__name__} has no residual path that can be dropped: {why}")


def check_state(state: Any, expected: Mapping[str, Any], phases: Iterable[str]) -> None:
    """Check that a controller whose own state is `expected` can load `state`; ValueError if not."""
    if not isinstance(state, Mapping):
        raise ValueError(f"not the state of a ResidualDropPath: a {type(state).__name__}")
    if missing := sorted(set(expected) - set(state)):
        raise ValueError(f"not the state of a ResidualDropPath: it has no {missing[0]!r}")
    own = expected["paths"]
    if list(state["paths"]) != own:
        odd = sorted(set(state["paths"]) ^ set(own)) or own
        raise ValueError(
            f"the state is of a model with {len(state['paths'])} residual paths, this one has "
            f"{len(own)} (the first that differs: {odd[0]}): create the model as it was then"
        )
    if state["phase"] not in phases:
        raise ValueError(
            f"the state's phase is {state['phase']!r}: it must be {' or '.join(phases)}"
        )
    if unknown := sorted(set(state["dropped"]) - set(own)):
        raise ValueError(f"the state drops {unknown[0]!r}, which is no path of this model")


def tell_nothing_to_complement(dropped: frozenset[str], lack: str = "requires a gradient") -> bool:
    """Log what a cycle that dropped these paths cannot train; whether there were some."""
    if dropped:
        _logger.warning(
            f"nothing to complement: no parameter that {', '.join(sorted(dropped))} carried {lack} "
            "(logged once; it may be so for other paths too)"
        )
    return bool(dropped)
