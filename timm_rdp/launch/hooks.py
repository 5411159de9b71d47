"""What `timm-rdp launch` hooks into while it runs a script."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import timm
import torch
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import dispatch_clip_grad
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from timm_rdp.launch.launched_run import LaunchedRun

try:
    from timm.task import task as timm_task

    TASKS = timm_task.TrainingTask.__subclasses__()
except ImportError:  # timm before 1.0.23
    TASKS = []


@contextmanager
def hooked(run: LaunchedRun) -> Iterator[None]:
    """Have the factories of timm and torch tell `run` what the script makes."""
    with ExitStack() as stack:

        def hook(owner: Any, name: str, tell: Callable, first: bool = False) -> None:
            """Call tell(result, *args, **kwargs) after each call, or first, with None as result."""
            original = getattr(owner, name)

            @functools.wraps(original)
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                if first:
                    tell(None, *args, **kwargs)
                result = original(*args, **kwargs)
                if not first:
                    tell(result, *args, **kwargs)
                return result

            setattr(owner, name, wrapped)
            stack.callback(setattr, owner, name, original)

        create_model, dispatch = timm.create_model, dispatch_clip_grad

        @functools.wraps(dispatch)
        def clip(parameters: Any, *args: Any, **kwargs: Any) -> None:
            parameters = list(parameters)
            run.clip = functools.partial(dispatch, parameters, *args, **kwargs)
            dispatch(parameters, *args, **kwargs)

        for module in [m for path, m in sys.modules.items() if path.split(".")[0] == "timm"]:
            if vars(module).get("create_model") is create_model:
                hook(module, "create_model", run.on_model)
            if vars(module).get("dispatch_clip_grad") is dispatch:
                setattr(module, "dispatch_clip_grad", clip)  # noqa: B010
                stack.callback(setattr, module, "dispatch_clip_grad", dispatch)
        contains = lambda module, *_: run.containers.update({id(module): module})
        stack.callback(register_module_module_registration_hook(contains).remove)
        hook(torch.optim.Optimizer, "__init__", lambda _, self, *a, **k: run.on_optimizer(self))
        for task in TASKS:
            hook(task, "__init__", lambda _, self, *a, **k: run.on_task(self))
        hook(DistributedDataParallel, "__init__", lambda _, self, *a, **k: run.on_wrapper(self))
        hook(torch, "compile", lambda made, *_, **__: run.on_wrapper(made))
        hook(torch.jit, "script", lambda _, obj, *a, **k: run.on_script(obj), first=True)
        if run.options.rdp_start_epoch:
            hook(Scheduler, "__init__", lambda *_, **__: run.on_epoch(0))
            for scheduler in (Scheduler, PlateauLRScheduler):
                hook(scheduler, "step", lambda _, self, epoch, *a, **k: run.on_epoch(epoch))
            update = lambda _, self, num_updates, *a, **k: run.on_update(num_updates)
            hook(Scheduler, "step_update", update)
        yield
