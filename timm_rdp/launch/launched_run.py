"""Finds the model that a launched script trains, and trains it with ResidualDroppath."""

import argparse
import logging
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from timm.models import get_model_input_config
from timm.task import TrainingTask
from timm.utils.model import unwrap_model
from torch import nn

from timm_rdp.args import from_args
from timm_rdp.core.rdp import ResidualDropPath
from timm_rdp.errors import UsageError

_logger = logging.getLogger(__name__)

STATE_KEY = "timm_rdp"  # of the optimizer's state dict
_RECIPE = "docs/your_own_script.md shows the lines to add to the script instead"


@dataclass
class Created:
    """A model that the script made by timm.create_model, in the order of creation."""

    index: int
    name: str
    model: weakref.ref

    def __str__(self) -> str:
        return f"{self.index} ({self.name})"


class LaunchedRun:
    """What a launched script has made so far; each step of its optimizer is one iteration.

    Args:
        options: the launcher's own, parsed.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.created: list[Created] = []
        self.trained: list[Created] = []
        self.containers: dict[int, weakref.ref] = {}  # by id: a script's module may not hash
        self.wrappers: list[weakref.ref] = []
        self.taken: Created | None = None
        self.rdp: ResidualDropPath | None = None
        self.begin: Callable | None = None  # until the start epoch
        self.epoch: int | None = None  # of the script's timm scheduler, once there is one
        self.stepped = False
        self.resumed = False
        self.refusal: UsageError | None = None

    def on_model(self, name: str, model: nn.Module) -> None:
        """The script created a model."""
        self.created.append(Created(len(self.created), name, weakref.ref(model)))

    def on_container(self, module: nn.Module) -> None:
        """The script put something into a module."""
        self.containers[id(module)] = weakref.ref(module)

    def on_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """The script created an optimizer: take its model, if that is one to take."""
        what = type(optimizer).__name__
        held = _ids(p for group in optimizer.param_groups for p in group["params"])
        if self.rdp is not None and held & _ids(self.rdp.model.parameters()):
            raise self.refuse(
                f"the script makes a second optimizer, {what}, for the model {self.taken}: put "
                f"its parameters into groups of one; {_RECIPE}"
            )
        models = [(c, c.model()) for c in self.created]
        new = [(c, m) for c, m in models if m is not None and held & _ids(m.parameters())]
        if len(new) > 1:
            raise self.refuse(
                f"one {what} trains the models {_listed(c for c, _ in new)}, which cannot share "
                f"its steps, so give each an optimizer; {_RECIPE}"
            )
        for created, model in new:
            self.trained += [created] if created not in self.trained else []
            choice = self.options.rdp_model
            fit = [c for c in self.trained if choice in (None, str(c.index), c.name)]
            if len(fit) > 1:
                raise self.refuse(
                    f"the script trains {len(fit)} models: {_listed(fit)}; choose one with "
                    + " or ".join(f"--rdp-model {c.index}" for c in fit)
                )
            if created not in fit:
                _logger.info(f"{what} trains the model {created}: left as it is")
            elif self.taken is None:
                self._take(created, model, optimizer, held)

    def _take(
        self, created: Created, model: nn.Module, optimizer: torch.optim.Optimizer, held: set[int]
    ) -> None:
        name, example = type(optimizer).__name__, None
        target = self._what_is_trained(model, held)
        if target is None:
            raise self.refuse(
                f"{name} trains parameters beside those of the model {created} and no module "
                f"holds them all, so they could not be frozen with it; {_RECIPE}"
            )
        if target is not model:
            size = get_model_input_config(model)["input_size"]
            example = torch.empty((2, *size), device="meta")
        wrappers = [w for r in self.wrappers if (w := r()) is not None]
        wrapped = [target, *(w for w in wrappers if unwrap_model(w) is target)][-1]
        try:
            self.rdp = rdp = from_args(wrapped, self.options, example)
        except ValueError as error:
            raise self.refuse(f"the script's model {created}: {error}") from None
        self.taken = created
        outside = "" if target is model else f" within {type(target).__name__}"
        what = f"{type(model).__name__}{outside}, model {created} of the script"
        if rdp is None:
            _logger.info(f"{what}: what DropPath drops is not computed")
            return
        optimizer.register_step_pre_hook(partial(self._before_step, rdp))
        optimizer.register_state_dict_post_hook(
            lambda _, state: state.update({STATE_KEY: rdp.state_dict()})
        )
        optimizer.register_load_state_dict_pre_hook(partial(self._load_state, rdp))
        if self.options.rdp_start_epoch:
            self.begin = partial(rdp.attach, optimizer)
        else:
            rdp.attach(optimizer)
        _logger.info(
            f"ResidualDroppath on {what}: {len(rdp.paths)} residual paths, "
            f"{sum(p.drop_prob for p in rdp.paths):.2f} dropped on average; each step of {name} "
            f"is one iteration; masks from seed {rdp.seed}"
        )

    def _what_is_trained(self, model: nn.Module, held: set[int]) -> nn.Module | None:
        """The module that the script calls in training: the model, or what it was put into.

        timm's feature distillation never calls the model, only the module around model and
        projection; a classifier of one's own on a timm model is trained with it.
        """
        modules = [m for r in self.containers.values() if (m := r()) is not None]
        around = [m for m in modules if _has(m, model)]
        for task in around:
            if isinstance(task, TrainingTask):
                trained = unwrap_model(task.get_trainable_module())
                if _has(trained, model):
                    return trained
        if held <= _ids(model.parameters()):
            return model
        whole = [m for m in around if m is unwrap_model(m) and held <= _ids(m.parameters())]
        return min(whole, key=lambda m: len(list(m.modules())), default=None)

    def on_wrapper(self, wrapper: nn.Module) -> None:
        """The script wrapped a module by torch.compile or DistributedDataParallel."""
        self.wrappers.append(weakref.ref(wrapper))
        inside = unwrap_model(wrapper)
        if self.rdp is None or not _has(inside, self.rdp.model):
            return
        if inside is not self.rdp.model:
            raise self.refuse(
                f"the script wraps {type(inside).__name__}, which has the model {self.taken} in "
                f"it, by {type(wrapper).__name__}: wrap the model itself; {_RECIPE}"
            )
        try:
            self.rdp.follow(wrapper)
        except ValueError as error:
            raise self.refuse(str(error)) from None

    def on_script(self, module: nn.Module) -> None:
        """The script compiled a module by torch.jit.script."""
        for created in self.created:
            if _has(module, created.model()):
                raise self.refuse(
                    f"the script compiles the model {created} by torch.jit.script, inside which "
                    "nothing can be dropped or frozen; turn that off (timm's --torchscript)"
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

    def _before_step(self, rdp: ResidualDropPath, *_: object) -> None:
        if self.stepped:
            return
        if self.begin is not None and self.epoch is None:
            raise self.refuse(
                f"--rdp-start-epoch {self.options.rdp_start_epoch}: the script has no timm "
                f"scheduler that it tells the epoch; leave it out, or {_RECIPE}"
            )
        if self.begin is None and rdp._active is None:
            raise self.refuse(
                f"no iteration ran before the optimizer's first step: the script has to call the "
                f"model itself ({self.taken}), in train mode; {_RECIPE}"
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
            rdp.load_state_dict(saved)
        except (ValueError, KeyError, TypeError) as error:
            raise self.refuse(f"ResidualDroppath's state in the checkpoint: {error}") from None
        for name, now in given.items():
            if saved[name] != now:
                _logger.warning(
                    f"--rdp-{name}: {saved[name]} in the checkpoint, {now} from here on"
                )
            setattr(rdp, name, now)
        _logger.info(f"ResidualDroppath goes on at cycle {saved['cycle']} ({saved['phase']})")

    def refuse(self, message: str) -> UsageError:
        """An error to raise; kept, so that a script that swallows it cannot hide it."""
        self.refusal = self.refusal or UsageError(message)
        return self.refusal

    def check_at_the_end(self) -> None:
        """See to it, when the script is through, that it was trained with ResidualDroppath.

        Raises:
            UsageError: it was not.
        """
        if self.refusal is not None:
            raise self.refusal
        if self.taken is None:
            choice = self.options.rdp_model
            chosen = "" if choice is None else f" (--rdp-model {choice})"
            raise UsageError(
                f"nothing was taken over{chosen}: the script made {len(self.created)} models by "
                "timm.create_model, and optimizers for "
                f"{_listed(self.trained) or 'none of them'}; {_RECIPE}"
            )
        if self.rdp is not None and not self.stepped and not self.resumed:
            raise UsageError(
                f"--rdp did nothing: the script made no training iteration of model {self.taken}"
            )
        if self.begin is not None:
            _logger.warning(
                f"--rdp-start-epoch {self.options.rdp_start_epoch} was never reached: the script "
                "trained with timm's own DropPath throughout"
            )


def _listed(models: Iterable[Created]) -> str:
    return ", ".join(map(str, models))


def _ids(parameters: Iterable[nn.Parameter]) -> set[int]:
    return {id(p) for p in parameters}


def _has(module: nn.Module, part: nn.Module | None) -> bool:
    return any(m is part for m in module.modules())
