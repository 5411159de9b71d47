"""Finds the model that a launched script trains, and trains it with ResidualDroppath."""

import argparse
import logging
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from timm.utils.model import unwrap_model
from torch import nn
from torch.optim import Optimizer

from timm_rdp.args import from_args
from timm_rdp.core.attach import stepped
from timm_rdp.core.rdp import ResidualDropPath
from timm_rdp.core.versions import input_size
from timm_rdp.errors import UsageError

_logger = logging.getLogger(__name__)

STATE_KEY = "timm_rdp"  # of the optimizer's state dict
_RECIPE = "docs/your_own_script.md shows the lines to add to the script instead"


class LaunchedRun:
    """What a launched script has made so far; each step of its optimizer is one iteration."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        # By the name that messages give a model, "INDEX (NAME)", in the order of creation.
        self.created: dict[str, weakref.ref] = {}
        self.trained: dict[str, None] = {}
        # Every module with others in it, by id.
        self.containers = weakref.WeakValueDictionary[int, nn.Module]()
        self.wrappers: list[weakref.ref] = []
        self.taken: str | None = None
        self.rdp: ResidualDropPath | None = None
        self.task: nn.Module | None = None  # that returns the loss, for `same` batches
        self.clip: Callable[[], object] = lambda: None  # clips as the script did last
        self.begin: Callable | None = None  # until the start epoch
        self.epoch: int | None = None  # of the script's timm scheduler, once there is one
        self.stepped = False
        self.resumed = False
        self.refusal: UsageError | None = None

    def on_model(self, model: nn.Module, model_name: str, *_: object, **__: object) -> None:
        """The script created a model by timm.create_model(model_name, ...)."""
        self.created[f"{len(self.created)} ({model_name})"] = weakref.ref(model)

    def on_optimizer(self, optimizer: Optimizer) -> None:
        """The script created an optimizer: take its model, if that is one to take."""
        what = type(optimizer).__name__
        held = _ids(p for group in optimizer.param_groups for p in group["params"])
        if self.rdp is not None and held & _ids(self.rdp.model.parameters()):
            raise self.refuse(
                f"the script makes a second optimizer, {what}, for the model {self.taken}: put its "
                "parameters into groups of one"
            )
        models = {name: ref() for name, ref in self.created.items()}
        new = {n: m for n, m in models.items() if m is not None and held & _ids(m.parameters())}
        if len(new) > 1:
            raise self.refuse(
                f"one {what} trains the models {', '.join(new)}: give each an optimizer of its own"
            )
        for created, model in new.items():
            self.trained[created] = None
            choice = self.options.rdp_model
            fit = [c for c in self.trained if choice in (None, *c.rstrip(")").split(" ("))]
            if len(fit) > 1:
                raise self.refuse(
                    f"the script trains {len(fit)} models: {', '.join(fit)}; choose one with "
                    + " or ".join(f"--rdp-model {c.split()[0]}" for c in fit)
                )
            if created not in fit:
                _logger.info(f"{what} trains the model {created}: left as it is")
            elif self.taken is None:
                self._take(created, model, optimizer, held)

    def _take(self, created: str, model: nn.Module, optimizer: Optimizer, held: set[int]) -> None:
        example = None
        target = self._what_is_trained(model, held)
        if target is None:
            raise self.refuse(
                f"{type(optimizer).__name__} trains parameters beside those of the model {created} "
                f"and no module holds them all, to be frozen together; {_RECIPE}"
            )
        if target is not model:
            example = torch.empty((2, *input_size(model)), device="meta")
        alive = [w for r in self.wrappers if (w := r()) is not None]
        wrappers = [w for w in alive if unwrap_model(w) is target]
        try:
            if self.options.rdp:
                stepped(optimizer)  # raises where its steps cannot be followed
            self.rdp = rdp = from_args([target, *wrappers][-1], self.options, example)
        except ValueError as error:
            raise self.refuse(f"the script's model {created}: {error}") from None
        self.taken = created
        outside = "" if target is model else f" within {type(target).__name__}"
        what = f"{type(model).__name__}{outside}, model {created} of the script"
        if rdp is None:
            _logger.info(f"{what}: what DropPath drops is not computed")
            return
        optimizer.register_step_post_hook(partial(self._after_step, rdp))
        save = lambda _, state: state.update({STATE_KEY: rdp.state_dict()})
        optimizer.register_state_dict_post_hook(save)
        optimizer.register_load_state_dict_pre_hook(partial(self._load_state, rdp))
        _logger.info(
            f"ResidualDroppath on {what}: {len(rdp.paths)} residual paths, "
            f"{sum(p.drop_prob for p in rdp.paths):.2f} dropped on average; masks from seed "
            f"{rdp.seed}"
        )
        self.begin = partial(self._attach, rdp, optimizer)
        for module in list(self.containers.values()):
            if hasattr(module, "get_trainable_module"):
                self.on_task(module)
        if not self.options.rdp_start_epoch:
            self.begin()
            self.begin = None

    def on_task(self, task: nn.Module) -> None:
        """The script made a task of timm's, whose loss `same` finds."""
        if self.task or self.rdp is None or not _has(task, self.rdp.model):
            return
        if self.options.rdp_batch != "next":
            self.task = task
            self.rdp.follow(task)
            if self.begin is None and self.rdp._loop is not None:  # made after the optimizer
                optimizer = self.rdp._loop._optimizer
                self.rdp._loop.remove()
                self.rdp._loop = None
                self._attach(self.rdp, optimizer)

    def _attach(self, rdp: ResidualDropPath, optimizer: Optimizer) -> None:
        batch = "same" if self.task else self.options.rdp_batch or "next"
        rdp.attach(optimizer, batch, lambda: self.clip())
        each = "a cycle (same)" if batch == "same" else "one iteration (next)"
        _logger.info(f"each step of {type(optimizer).__name__} is {each}")

    def _what_is_trained(self, model: nn.Module, held: set[int]) -> nn.Module | None:
        """The module that the script calls in training: the model, or what it was put into.

        timm's feature distillation never calls the model, only the module around model and
        projection; a classifier of one's own on a timm model is trained with it.
        """
        around: list[Any] = [m for m in list(self.containers.values()) if _has(m, model)]
        around.sort(key=lambda m: len([*m.modules()]))
        tasks = [m.get_trainable_module() for m in around if hasattr(m, "get_trainable_module")]
        for module in [*map(unwrap_model, tasks), model, *around]:
            if module is unwrap_model(module) and held <= _ids(module.parameters()):
                return module
        return None

    def on_wrapper(self, wrapper: object) -> None:
        """The script wrapped a module by torch.compile or DistributedDataParallel."""
        if not isinstance(wrapper, nn.Module):
            return
        self.wrappers.append(weakref.ref(wrapper))
        inside = unwrap_model(wrapper)
        if self.rdp is None or not _has(inside, self.rdp.model):
            return
        if inside is not self.rdp.model:
            raise self.refuse(
                f"{type(wrapper).__name__} wraps {type(inside).__name__}, which contains the model "
                f"{self.taken}: wrap the model itself; {_RECIPE}"
            )
        self.rdp.follow(wrapper)
        if self.task is not None:  # which stays what is repeated
            self.rdp.follow(self.task)

    def on_script(self, scripted: object) -> None:
        """The script compiles something by torch.jit.script."""
        for created, model in self.created.items():
            if isinstance(scripted, nn.Module) and _has(scripted, model()):
                raise self.refuse(
                    f"model {created}: nothing can be dropped in what torch.jit.script makes; turn "
                    "it off (--torchscript in timm's script)"
                )

    def on_epoch(self, epoch: int) -> None:
        """The script's timm scheduler begins at an epoch (0 when it is made)."""
        self.epoch = epoch
        if self.begin is not None and epoch >= self.options.rdp_start_epoch:
            self.begin()
            self.begin = None
            _logger.info(f"epoch {epoch}: ResidualDroppath begins")

    def on_update(self, num_updates: int) -> None:
        """The script told its timm scheduler how many updates there have been."""
        if num_updates > 0 and not self.stepped and not self.epoch:
            raise self.refuse(
                f"--rdp-start-epoch {self.options.rdp_start_epoch}: the script resumes with a "
                "schedule per update, which tells no epoch; leave it out where that is reached"
            )

    def _after_step(self, rdp: ResidualDropPath, _: object, args: tuple, kwargs: dict) -> None:
        if self.stepped:
            return
        closure = kwargs.get("closure", (*args, None)[1])  # the first one is the optimizer
        if self.options.rdp_batch == "same" and self.task is None and closure is None:
            raise self.refuse(
                "--rdp-batch same: the script uses no task of timm.task and passes step() no "
                f"closure, in which its loss could be found; leave it out, or {_RECIPE}"
            )
        if self.begin is not None and self.epoch is None:
            raise self.refuse(
                f"--rdp-start-epoch {self.options.rdp_start_epoch}: the script has no timm "
                f"scheduler that it tells the epoch; leave it out, or {_RECIPE}"
            )
        if self.begin is None and not rdp.masks:
            raise self.refuse(
                f"no iteration ran before the optimizer's first step: the script has to call the "
                f"model ({self.taken}) in train mode; {_RECIPE}"
            )
        self.stepped = True

    def _load_state(self, rdp: ResidualDropPath, _: object, state: dict) -> None:
        self.resumed = True
        saved = state.get(STATE_KEY)
        if saved is None:
            _logger.info("the optimizer's state has none of ResidualDroppath: cycles start at 0")
            return
        given = {"seed": rdp.seed, "every": rdp.every}
        try:
            rdp.load_state_dict({**saved, **given})
        except (ValueError, TypeError) as error:
            raise self.refuse(f"ResidualDroppath's state in the checkpoint: {error}") from None
        if (then := {name: saved.get(name) for name in given}) != given:
            _logger.warning(f"the checkpoint is from {then}, this run goes on with {given}")
        if saved["masks"]:
            _logger.info(f"ResidualDroppath goes on at cycle {saved['cycle']} ({saved['phase']})")

    def refuse(self, message: str) -> UsageError:
        """An error to raise; kept, so that a script that swallows it cannot hide it."""
        self.refusal = self.refusal or UsageError(message)
        return self.refusal

    def check_at_the_end(self) -> None:
        """Raise a UsageError if the script that ended was not trained with ResidualDroppath."""
        if self.refusal is not None:
            raise self.refusal
        if self.taken is None:
            choice = self.options.rdp_model
            chosen = "" if choice is None else f" (--rdp-model {choice})"
            trained = ", ".join(self.trained) or "none of them"
            raise UsageError(
                f"nothing was taken over{chosen}: the script made {len(self.created)} models by "
                f"timm.create_model, and optimizers for {trained}; {_RECIPE}"
            )
        if self.rdp is not None and not self.stepped and not self.resumed:
            raise UsageError(f"--rdp: the script made no training iteration of model {self.taken}")
        if self.begin is not None:
            _logger.warning(
                f"--rdp-start-epoch {self.options.rdp_start_epoch} was never reached: the script "
                "trained with timm's own DropPath throughout"
            )


def _ids(parameters: Iterable[nn.Parameter]) -> set[int]:
    return {id(p) for p in parameters}


def _has(module: nn.Module, part: nn.Module | None) -> bool:
    return any(m is part for m in module.modules())
