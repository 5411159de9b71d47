"""What `timm-rdp launch` hooks into while it runs a script."""

import argparse
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import timm
import torch
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from timm_rdp.launch.takeover import Takeover


@contextmanager
def hooked(takeover: Takeover) -> Iterator[None]:
    """Have the factories of timm and torch tell `takeover` what a script makes."""
    with ExitStack() as stack:

        def replace(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
            original = getattr(owner, name)
            setattr(owner, name, functools.wraps(original)(make(original)))
            stack.callback(setattr, owner, name, original)

        for module in _modules_with(timm.create_model):
            replace(module, "create_model", lambda f: _creating(takeover, f))
        replace(torch.optim.Optimizer, "__init__", lambda f: _after(f, takeover.on_optimizer))
        replace(DistributedDataParallel, "__init__", lambda f: _after(f, takeover.on_wrapper))
        replace(torch, "compile", lambda f: _compiling(takeover, f))
        replace(torch.jit, "script", lambda f: _scripting(takeover, f))
        replace(argparse.ArgumentParser, "parse_known_args", lambda f: _parsing(takeover, f))
        if takeover.options.rdp_start_epoch:
            for scheduler in (Scheduler, PlateauLRScheduler):
                replace(scheduler, "step", lambda f: _stepping(takeover.on_epoch, "epoch", f))
            on_update = takeover.on_update
            replace(Scheduler, "step_update", lambda f: _stepping(on_update, "num_updates", f))
            replace(Scheduler, "__init__", lambda f: _after(f, takeover.on_scheduler))
        yield


def _modules_with(function: Callable) -> Iterable[Any]:
    """timm's modules that have the function under its own name."""
    name = function.__name__
    return [
        module
        for path, module in list(sys.modules.items())
        if path.partition(".")[0] == "timm" and vars(module).get(name) is function
    ]


def _creating(takeover: Takeover, create_model: Callable) -> Callable:
    def create(model_name: str, *args: Any, **kwargs: Any) -> nn.Module:
        model = create_model(model_name, *args, **kwargs)
        takeover.on_model(model_name, model)
        return model

    return create


def _after(init: Callable, tell: Callable) -> Callable:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        tell(self)

    return wrapped


def _compiling(takeover: Takeover, compile_: Callable) -> Callable:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        compiled = compile_(*args, **kwargs)
        if isinstance(compiled, nn.Module):
            takeover.on_wrapper(compiled)
        return compiled

    return wrapped


def _scripting(takeover: Takeover, script: Callable) -> Callable:
    def wrapped(obj: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(obj, nn.Module):
            takeover.on_script(obj)
        return script(obj, *args, **kwargs)

    return wrapped


def _parsing(takeover: Takeover, parse_known_args: Callable) -> Callable:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        parsed = parse_known_args(self, *args, **kwargs)
        seed = getattr(parsed[0], "seed", None)
        if isinstance(seed, int):
            takeover.script_seed = seed
        return parsed

    return wrapped


def _stepping(tell: Callable, name: str, step: Callable) -> Callable:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(self, *args, **kwargs)
        tell(args[0] if args else kwargs[name])
        return result

    return wrapped
