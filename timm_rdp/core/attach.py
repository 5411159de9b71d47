"""The iterations of a user's own loop, begun and ended by hooks."""

import logging
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from timm_rdp.core.checks import tell_nothing_to_complement
from timm_rdp.core.drop_path import Hook, MaskedDropPath
from timm_rdp.core.iteration import COMPLEMENT, DROPPATH, Iteration
from timm_rdp.core.model_patch import ModelPatch
from timm_rdp.core.same_batch import SameBatch

_logger = logging.getLogger(__name__)


class AttachedLoop:
    """Begins an iteration with a forward in train mode, and ends it with the optimizer's step.

    One that no step has ended is set aside when validation or the next epoch begins: the model is
    the user's again, and the next forward in train mode goes on with the same iteration.

    Args:
        controller: the ResidualDropPath.
        optimizer: an optimizer, or one of Accelerate's, fastai's, SAM's or Lookahead's around it.
        patch: what was changed in the model.
        same: runs the complement iteration on the same batches, where it is not to get the next.

    Raises:
        ValueError: the optimizer cannot be followed, or holds none of the parameters.
    """

    def __init__(
        self, controller: Any, optimizer: Any, patch: ModelPatch, same: SameBatch | None = None
    ):
        self._same = same
        self._controller = controller
        self._optimizer = stepped(optimizer)
        self._parameters = [*patch.parameters.values()]
        self._drop_paths: list[MaskedDropPath] = []
        self._hooks: list[Any] = []
        self.aside: Any = None  # the iteration that was set aside
        self._versions, self._moves = 0, 0  # of the parameters during an iteration
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        own, kind = {id(p) for p in self._parameters}, type(controller.model).__name__
        outside = sum(p.requires_grad and id(p) not in own for p in held)
        if not any(id(p) in own for p in held):
            raise ValueError(
                f"this {type(optimizer).__name__} holds no parameter of the patched {kind}: pass "
                "the optimizer that trains it"
            )
        if outside:
            _logger.warning(
                f"{outside} parameters outside of the patched {kind} train in both iterations: "
                "patch the module that contains them too where they should not"
            )

    def hook(self, patch: ModelPatch, outermost: nn.Module) -> None:
        """Begin iterations where the model, with its wrappers, is called, or its parts are."""
        self.remove()
        self._parameters = [*patch.parameters.values()]
        self._drop_paths = [*patch.drop_paths.values()]
        for module in self._drop_paths:
            module._loop = self
        for module in (outermost, *patch.beginning()):
            hook = Hook(self._begin)
            self._hooks.append(module.register_forward_pre_hook(hook, prepend=True))
        self._hooks.append(self._optimizer.register_step_post_hook(self._after_step))
        if self._same is not None:
            self._hooks.append(self._same.watch(outermost, self._is_noted))

    def remove(self) -> None:
        """Remove every hook."""
        for hook in self._hooks:
            hook.remove()
        for module in self._drop_paths:
            module._loop = None
        self._hooks, self._drop_paths = [], []

    def _has_gradients(self) -> bool:
        return any(p.grad is not None and bool(p.grad.any()) for p in self._parameters)

    def _is_noted(self) -> bool:
        it = self._controller._active
        return it is not None and not it._entered_by_user and it.phase == DROPPATH

    def set_aside(self) -> None:
        """Give the model back to the user until the next forward in train mode."""
        it = self._controller._active
        if it is not None and not it._entered_by_user:
            self._controller._leave(completed=False, aside=True)
            self.aside = it

    def outside(self) -> None:
        """Note that a DropPath runs in train mode, but no iteration has begun."""
        if self._controller._paused:
            return
        raise RuntimeError(
            "a DropPath was run in training, but none of the modules that begin an iteration: call "
            "the model itself, or write its iterations out, or use pause() where no step follows"
        )

    def _begin(self, module: nn.Module, _: Any) -> None:
        controller = self._controller
        if controller._paused:
            return
        if not any(m.training for m in self._drop_paths):
            self.set_aside()
        elif torch.is_grad_enabled():
            if controller._active is None:
                controller._enter(controller.iteration())
                if self._same and self.aside is not None and not self._has_gradients():
                    self._same.forget()  # what an epoch left over, and zero_grad() discarded
                self.aside, self._moves = None, 0
                self._versions = sum(p._version for p in self._parameters)
            elif not controller._active._entered_by_user:
                self._check_that_steps_end_it()

    def _check_that_steps_end_it(self) -> None:
        versions = sum(p._version for p in self._parameters)
        self._moves += versions != self._versions
        self._versions = versions
        if self._moves > 1:  # SAM moves the parameters once before its step
            raise RuntimeError(
                f"the parameters were moved {self._moves} times by no step() of the attached "
                f"{type(self._optimizer).__name__}: attach the optimizer that moves them"
            )

    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        controller = self._controller
        if controller._paused:
            return
        if controller._active is None and self.aside is not None:
            controller._active, self.aside = self.aside, None
        if controller._active is None:
            if self._has_gradients():
                raise RuntimeError(
                    f"no iteration ran before this step: call the patched "
                    f"{type(controller.model).__name__} in train mode, or use pause()"
                )
        elif not controller._active._entered_by_user:
            # A fused optimizer under GradScaler skips an overflow within its step.
            overflow = getattr(optimizer, "found_inf", None)
            completed = overflow is None or not overflow.item()
            phase = controller._active.phase
            self._check_rates(controller._active)
            controller._leave(completed)
            if self._same is not None and not completed:
                self._same.forget()
            elif self._same is not None and phase == DROPPATH:
                self._complement(optimizer, kwargs.get("closure", (*args, None, None)[1]))

    def _check_rates(self, it: Iteration) -> None:
        """Tell once of a complement iteration whose parameters alone have no learning rate."""
        controller, groups = self._controller, self._optimizer.param_groups
        if it.phase != COMPLEMENT or controller._told or not any(_has_rate(g) for g in groups):
            return
        ids = {id(controller._patch.parameters[name]) for name in it.trainable}
        if not any(_has_rate(g) and any(id(p) in ids for p in g["params"]) for g in groups):
            lack = "has a learning rate in the optimizer"
            controller._told = tell_nothing_to_complement(it.dropped, lack)

    def _complement(self, optimizer: Optimizer, closure: Any) -> None:
        """Run the complement iteration of the droppath iteration that has just ended."""
        controller, same = self._controller, self._same
        assert same is not None
        try:
            if controller.phase == COMPLEMENT:  # something was dropped, and it is its turn
                with controller.iteration() as it:
                    self._check_rates(it)
                    same.train(optimizer, closure)
        finally:
            same.forget()


def _has_rate(group: dict[str, Any]) -> bool:
    rate = group.get("lr", 1)
    return isinstance(rate, torch.Tensor) or rate != 0  # a tensor may be on another device


def stepped(optimizer: Any) -> Optimizer:
    """The optimizer whose own step() moves the parameters; ValueError: it cannot be followed."""
    for name in ("optimizer", "opt", "base_optimizer", "_base_optimizer"):
        if (inside := getattr(optimizer, name, None)) is not None:
            return stepped(inside)
    if not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise ValueError(
            f"a {type(optimizer).__name__} is no optimizer of torch, whose steps could be "
            "followed: pass the one inside it, or write the iterations out (iteration())"
        )
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            "LBFGS moves all parameters along one direction, frozen ones too: use an optimizer "
            "that leaves parameters without a gradient alone"
        )
    return optimizer
