"""Takes over the model that a launched script trains."""

import argparse
import gc
import logging
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import get_model_input_config
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn

from timm_rdp.args import from_args
from timm_rdp.core.rdp import ResidualDropPath
from timm_rdp.errors import UsageError

_logger = logging.getLogger("timm_rdp.launch.main")

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


class Takeover:
    """Finds the model that the script trains, and has its optimizer's steps drive the iterations.

    Args:
        options: the launcher's own, parsed; None where one was not given.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.created: list[Created] = []
        self.trained: list[Created] = []
        self.wrappers: list[weakref.ref] = []
        self.script_seed: int | None = None
        self.taken: Created | None = None
        self.rdp: ResidualDropPath | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.attached = False
        self.stepped = False
        self.resumed = False
        self.scheduler_made = False
        self.epoch_told = False
        self.refusal: UsageError | None = None

    def on_model(self, name: str, model: nn.Module) -> None:
        """The script created a model."""
        self.created.append(Created(len(self.created), name, weakref.ref(model)))

    def on_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """The script created an optimizer: take its model, if that is one to take."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        new = [c for c in self.created if c not in self.trained and _holds_any(held, c.model())]
        self.trained += new
        if self.rdp is not None and _holds_any(held, self.rdp.model):
            raise self.refuse(
                f"the script makes a second optimizer, {type(optimizer).__name__}, for the model "
                f"{self.taken}: an iteration is one step of one optimizer, so put its parameters "
                f"into groups of one; {_RECIPE}"
            )
        what = type(optimizer).__name__
        if len(new) > 1:
            raise self.refuse(
                f"one {what} trains the models {_listed(new)}: its steps cannot be iterations of "
                f"one and train the other as well, so give each an optimizer; {_RECIPE}"
            )
        choice = self.options.rdp_model
        fit = [c for c in self.trained if choice in (None, str(c.index), c.name)]
        if len(fit) > 1:
            raise self.refuse(
                f"the script trains {len(fit)} models: {_listed(fit)}; choose one with "
                + " or ".join(f"--rdp-model {c.index}" for c in fit)
            )
        if fit and fit == new:
            self._take(fit[0], optimizer, held)
        elif new or not any(_holds_any(held, c.model()) for c in self.created):
            trained = f"the model {_listed(new)}" if new else "no model of timm.create_model"
            _logger.info(f"{what} trains {trained}: left as it is")

    def _take(self, created: Created, optimizer: torch.optim.Optimizer, held: set[int]) -> None:
        options, model = self.options, created.model()
        target = _what_is_trained(model, optimizer, held)
        if target is None:
            raise self.refuse(
                f"{type(optimizer).__name__} trains parameters beside those of the model {created} "
                f"and no module holds them all, so they could not be frozen with it; {_RECIPE}"
            )
        example = None
        if target is not model:
            size = get_model_input_config(model)["input_size"]
            example = torch.empty((2, *size), device="meta")
        wrappers = [w for r in self.wrappers if (w := r()) and unwrap_model(w) is target]
        seed, source = options.rdp_seed, "--rdp-seed"
        if seed is None:
            seed, source = self.script_seed, "the script's --seed"
        if seed is None:
            seed, source = 0, "the script has no --seed"
        arguments = argparse.Namespace(
            rdp=options.rdp,
            rdp_every=options.rdp_every or 1,
            rdp_seed=seed,
            skip_dropped=options.skip_dropped,
        )
        try:
            rdp = from_args(wrappers[-1] if wrappers else target, arguments, example)
        except ValueError as error:
            raise self.refuse(f"the script's model {created}: {error}") from None
        outside = "" if target is model else f" within {type(target).__name__}"
        what = f"{type(model).__name__}{outside}, model {created} of the script"
        self.taken = created
        if rdp is None:
            _logger.info(f"{what}: what DropPath drops is not computed")
            return
        self.rdp, self.optimizer = rdp, optimizer
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_state_dict_post_hook(self._save_state)
        optimizer.register_load_state_dict_pre_hook(self._load_state)
        _logger.info(
            f"ResidualDroppath on {what}: {len(rdp.paths)} residual paths, "
            f"{sum(p.drop_prob for p in rdp.paths):.2f} dropped in the mean; each step of "
            f"{type(optimizer).__name__} is one iteration; masks from seed {seed} ({source})"
        )
        if not options.rdp_start_epoch:
            self._attach()

    def _attach(self) -> None:
        self.rdp.attach(self.optimizer)
        self.attached = True

    def on_wrapper(self, wrapper: nn.Module) -> None:
        """The script wrapped a module by torch.compile or DistributedDataParallel."""
        self.wrappers.append(weakref.ref(wrapper))
        if self.rdp is None:
            return
        if unwrap_model(wrapper) is self.rdp.model:
            try:
                self.rdp.follow(wrapper)
            except ValueError as error:
                raise self.refuse(str(error)) from None
        elif any(m is self.rdp.model for m in wrapper.modules()):
            inside = type(unwrap_model(wrapper)).__name__
            raise self.refuse(
                f"the script wraps {inside}, which has the model {self.taken} in it, by "
                f"{type(wrapper).__name__}: wrap the model itself; {_RECIPE}"
            )

    def on_script(self, module: nn.Module) -> None:
        """The script compiles a module by torch.jit.script."""
        inside = {id(m) for m in module.modules()}
        for created in self.created:
            if id(created.model()) in inside:
                raise self.refuse(
                    f"the script compiles the model {created} by torch.jit.script: inside a "
                    "scripted model neither the masks nor what is frozen can be changed; turn "
                    "that off (--torchscript in timm's script)"
                )

    def on_scheduler(self, _: Scheduler) -> None:
        """The script made a timm scheduler, which is told of epochs."""
        self.scheduler_made = True

    def on_epoch(self, epoch: int) -> None:
        """The script told its timm scheduler which epoch comes next."""
        self.epoch_told = True
        if self.rdp is not None and not self.attached and epoch >= self.options.rdp_start_epoch:
            self._attach()
            _logger.info(f"epoch {epoch}: ResidualDroppath begins")

    def on_update(self, num_updates: int) -> None:
        """The script told its timm scheduler how many updates there have been."""
        if num_updates > 0 and not (self.stepped or self.epoch_told):
            raise self.refuse(
                f"--rdp-start-epoch {self.options.rdp_start_epoch}: the script resumes with a "
                "schedule per update, and so does not tell which epoch it is in; leave it out "
                "where that epoch has been reached"
            )

    def _before_step(self, *_: object) -> None:
        if self.stepped:
            return
        if not self.attached and not self.scheduler_made:
            raise self.refuse(
                f"--rdp-start-epoch {self.options.rdp_start_epoch}: the script has no timm "
                "scheduler that it tells the epoch, so the launcher cannot know it; leave it out, "
                f"or {_RECIPE}"
            )
        if self.attached and self.rdp._active is None:
            raise self.refuse(
                f"the script steps its optimizer without having called the model {self.taken} in "
                "train mode, so no iteration ran: it has to call the model itself, not its parts; "
                f"{_RECIPE}"
            )
        self.stepped = True

    def _save_state(self, _: Any, state: dict) -> None:
        state[STATE_KEY] = self.rdp.state_dict()

    def _load_state(self, _: Any, state: dict) -> None:
        self.resumed = True
        saved = state.get(STATE_KEY)
        if saved is None:
            _logger.info("the optimizer's state has none of ResidualDroppath: cycles start at 0")
            return
        seed, every = self.rdp.seed, self.rdp.every
        try:
            self.rdp.load_state_dict(saved)
        except (ValueError, KeyError, TypeError) as error:
            raise self.refuse(f"ResidualDroppath's state in the checkpoint: {error}") from None
        for name, then, now in (
            ("seed", self.rdp.seed, seed),
            ("every", self.rdp.every, every),
        ):
            if then != now:
                _logger.warning(
                    f"the checkpoint was trained with --rdp-{name} {then}, this run goes on with "
                    f"{now}"
                )
        self.rdp.seed, self.rdp.every = seed, every
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
            if choice is not None and self.created:
                there = ", ".join(map(str, self.trained)) or "none"
                raise UsageError(
                    f"--rdp-model {choice}: the script trains no such model but {there}"
                )
            raise UsageError(
                f"nothing was taken over: the script made {len(self.created)} models by "
                f"timm.create_model, and no optimizer for any of them; {_RECIPE}"
            )
        if self.rdp is None:
            return
        if not self.stepped and not self.resumed:
            raise UsageError(
                "--rdp did nothing: the script ended without one training iteration of the model "
                f"{self.taken}"
            )
        if not self.attached:
            _logger.warning(
                f"--rdp-start-epoch {self.options.rdp_start_epoch} was never reached: the script "
                "trained with timm's own DropPath throughout"
            )


def _listed(models: list[Created]) -> str:
    return ", ".join(map(str, models))


def _holds_any(held: set[int], model: nn.Module | None) -> bool:
    return model is not None and any(id(p) in held for p in model.parameters())


def _what_is_trained(
    model: nn.Module, optimizer: torch.optim.Optimizer, held: set[int]
) -> nn.Module | None:
    """The module that the script calls in training: the model, or what it has put it into.

    timm's feature distillation never calls the model, only the module around model and projection;
    a classifier of one's own on a timm model is trained with it.
    """
    modules = [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]
    for task in modules:
        if isinstance(task, TrainingTask):
            trained = unwrap_model(task.get_trainable_module())
            if any(m is model for m in trained.modules()):
                return trained
    if held <= {id(p) for p in model.parameters()}:
        return model
    around = [
        m
        for m in modules
        if m is unwrap_model(m)
        and held <= {id(p) for p in m.parameters()}
        and any(inner is model for inner in m.modules())
    ]
    return min(around, key=lambda m: sum(1 for _ in m.modules()), default=None)
