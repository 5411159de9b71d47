"""ResidualDroppath: droppath and complement iterations over any model with timm DropPaths.

The method is that of Sejik Park, "ResidualDroppath" (arXiv 2411.09475).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from timm_rdp.core.checks import (
    check_droppable,
    check_state,
    find_drop_paths,
    unwrap,
    whole_number,
)
from timm_rdp.core.ddp import check_same_on_all_ranks
from timm_rdp.core.iteration import COMPLEMENT, DROPPATH, Iteration
from timm_rdp.core.masks import sample_masks
from timm_rdp.core.model_patch import ModelPatch
from timm_rdp.core.paths import Path
from timm_rdp.core.skip import Hook
from timm_rdp.core.trace import trace_paths

__all__ = ["COMPLEMENT", "DROPPATH", "Iteration", "ResidualDropPath"]


class ResidualDropPath:
    """Trains a model with ResidualDroppath: patches it, and hands out the iterations to run.

    In a *droppath iteration* each residual path is dropped for the whole batch with its own
    module's `drop_prob`. The *complement iteration* that follows drops nothing and trains exactly
    the parameters that the dropped paths carried; everything else is frozen. Outside iterations the
    model is bit for bit the unpatched one.

        rdp = ResidualDropPath(model)
        for images, targets in loader:
            for it in rdp.cycle():
                with it:
                    loss_fn(model(images), targets).backward()
                    optimizer.step()
                    optimizer.zero_grad()

    Args:
        model: any module with timm DropPaths, also in DistributedDataParallel or torch.compile;
            patched in place until `detach()`. Its parameters and modules must be final.
        seed: the masks are a pure function of seed and cycle.
        every: a complement iteration follows only every N-th droppath iteration.
        example_input: a tensor (B, C, H, W), or the tuple / dict that the model's forward takes; by
            default an image of the size that the model says it takes.

    Raises:
        ValueError: the model has no residual path that can be dropped or none that carries a
            parameter, cannot be traced or is already patched; or an argument is out of its range.

    Source: arXiv 2411.09475.
    """

    def __init__(self, model: nn.Module, seed: int = 0, every: int = 1, example_input: Any = None):
        self.seed = whole_number("seed", seed)
        self.every = whole_number("every", every)
        if self.every < 1:
            raise ValueError(f"every={every} must be 1 or more")
        self.model = unwrap(model)
        drop_paths = find_drop_paths(self.model)
        self._graph = trace_paths(self.model, example_input)
        check_droppable(self.model, self._graph)
        self.paths: tuple[Path, ...] = tuple(p for p in self._graph.paths if p.residual)
        self.non_residual: tuple[Path, ...] = tuple(p for p in self._graph.paths if not p.residual)

        self.masks: dict[str, bool] = {}
        self._cycle = 0
        self._phase = DROPPATH
        self._dropped: frozenset[str] = frozenset()
        self._active: Iteration | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._hooks: list[Any] = []  # those of attach()
        self._outermost = self.model
        self._patch = ModelPatch(self.model, drop_paths, self._graph, self)
        self._detached = False
        self._parameters = self._patch.parameters
        if any(m._compiled_call_impl is not None for m in self.model.modules()):
            self._patch.follow_compile()
        if model is not self.model:
            self.follow(model)

    def follow(self, wrapper: nn.Module) -> "ResidualDropPath":
        """Take account of a wrapper put around the model after it was patched; returns self.

        Args:
            wrapper: what torch.compile or DistributedDataParallel (or both) made of the model.

        Raises:
            ValueError: it does not wrap the model that was patched, or ranks differ in what
                determines the masks.
        """
        self._check_in_use()
        if unwrap(wrapper) is not self.model:
            raise ValueError(
                f"this {type(wrapper).__name__} does not wrap the model that was patched: pass "
                "what torch.compile or DistributedDataParallel made of it"
            )
        self._outermost = wrapper
        inside: Any = wrapper
        while inside is not self.model:
            if isinstance(inside, DistributedDataParallel):
                check_same_on_all_ranks(inside, self.state_dict())
                self._patch.follow_ddp(inside)
                inside = inside.module
            else:
                self._patch.follow_compile()
                inside = inside._orig_mod
        if self._optimizer is not None:
            self._hook_loop(self._optimizer)
        return self

    def dropped_part(self, names: Iterable[str]) -> frozenset[str]:
        """D(names): names of the parameters that reach the output only through these paths.

        Raises:
            ValueError: a name is not that of a path.
        """
        return self._graph.dropped_part(names)

    def iteration(self) -> Iteration:
        """The next iteration of the sequence; the same one until it has been completed.

        Raises:
            RuntimeError: detached, or the model has no parameter that requires a gradient.
        """
        self._check_in_use()
        it = self._next()
        while not it.trainable:  # all that this droppath iteration would train was frozen
            if not any(p.requires_grad for p in self._parameters.values()):
                raise RuntimeError("no parameter of the model requires a gradient: unfreeze some")
            self._begin(it)
            self._advance(it)
            it = self._next()
        return it

    def _next(self) -> Iteration:
        dropped = self._dropped
        if self._phase == DROPPATH:
            kept = sample_masks(self.seed, self._cycle, [p.drop_prob for p in self.paths])
            dropped = frozenset(p.name for p, k in zip(self.paths, kept, strict=True) if not k)
        complement = self._phase == COMPLEMENT
        part = self._second_part(dropped) if complement else self.dropped_part(dropped)
        trainable = frozenset(
            name
            for name, parameter in self._parameters.items()
            if parameter.requires_grad and (name in part) is complement
        )
        return Iteration(self._enter, self._leave, self._phase, self._cycle, dropped, trainable)

    def _second_part(self, dropped: frozenset[str]) -> frozenset[str]:
        """What a cycle that dropped these paths trains second; ablations override it."""
        return self.dropped_part(dropped)

    def cycle(self) -> Iterator[Iteration]:
        """The iterations of the next cycle, or what is left of it, one after the other.

        Raises:
            RuntimeError: an iteration was not entered with `with`.
        """
        cycle = self._cycle
        while self._cycle == cycle:
            it = self.iteration()
            if it.cycle != cycle:
                return
            yield it
            if not it._entered_by_user:
                raise RuntimeError(f"{it} was not entered: run it within `with it:`")

    def detach(self) -> nn.Module:
        """Give the model its original classes back, remove every hook, and return it.

        Raises:
            RuntimeError: called within an iteration.
        """
        if self._detached:
            return self.model
        if self._active is not None:
            if self._active._entered_by_user:
                raise RuntimeError("detach() within an iteration: leave its `with` block first")
            self._leave(completed=False)
        for hook in self._hooks:
            hook.remove()
        self._patch.remove()
        self._detached, self._hooks, self._optimizer = True, [], None
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence stands, in plain Python values: loads with weights_only=True."""
        return {
            "seed": self.seed,
            "every": self.every,
            "cycle": self._cycle,
            "phase": self._phase,
            "dropped": sorted(self._dropped),
            "masks": dict(self.masks),
            "paths": [p.name for p in self.paths],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the sequence where the controller that gave `state` stood.

        Raises:
            ValueError: not such a state, or one of a model with other paths.
            RuntimeError: called within an iteration.
        """
        if self._active is not None:
            raise RuntimeError(
                "load_state_dict() within an iteration: leave its `with` block first"
            )
        check_state(state, self.state_dict(), (DROPPATH, COMPLEMENT))
        self.seed, self.every = state["seed"], state["every"]
        self._cycle, self._phase = state["cycle"], state["phase"]
        self._dropped = frozenset(state["dropped"])
        self.masks = dict(state["masks"])

    def attach(self, optimizer: torch.optim.Optimizer) -> "ResidualDropPath":
        """Run the iterations from hooks, so that the user's loop stays as it is.

        Every forward in train mode until the next `optimizer.step()` belongs to one iteration. What
        the optimizer holds beside the model's parameters is trained in every iteration: patch the
        module that contains all of it where it should not be.

        Raises:
            ValueError: already attached, or the optimizer holds none of the model's parameters.
        """
        self._check_in_use()
        if self._optimizer is not None:
            raise ValueError("already attached to an optimizer: RDP follows one; detach() first")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in self._parameters.values()):
            raise ValueError(
                f"this {type(optimizer).__name__} holds no parameter of the patched "
                f"{type(self.model).__name__}: pass the optimizer that trains it"
            )
        self._optimizer = optimizer
        self._hook_loop(optimizer)
        return self

    def _hook_loop(self, optimizer: torch.optim.Optimizer) -> None:
        for hook in self._hooks:
            hook.remove()
        # timm's Lookahead, whose step runs no hooks, steps the optimizer that it wraps.
        optimizer = getattr(optimizer, "_base_optimizer", optimizer)
        self._hooks = [
            self._outermost.register_forward_pre_hook(Hook(self._begin_iteration), prepend=True),
            optimizer.register_step_post_hook(self._end_iteration),
        ]

    def _begin_iteration(self, module: nn.Module, _: Any) -> None:
        if self._active is None and module.training and torch.is_grad_enabled():
            self._enter(self.iteration())

    def _end_iteration(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self._active is not None and not self._active._entered_by_user:
            # A fused optimizer under GradScaler skips an overflow within its step.
            overflow = getattr(optimizer, "found_inf", None)
            self._leave(completed=overflow is None or not overflow.item())

    def _check_in_use(self) -> None:
        if self._detached:
            raise RuntimeError("this ResidualDropPath was detached from its model: make a new one")

    def _enter(self, it: Iteration) -> None:
        self._check_in_use()
        if self._active is not None:
            raise RuntimeError(f"{self._active} is still open: iterations do not nest")
        if (it.cycle, it.phase) != (self._cycle, self._phase):
            raise RuntimeError(f"{it} is over: get the next one from iteration() or cycle()")
        # What the user froze since the iteration was asked for does not train either.
        it.trainable = frozenset(n for n in it.trainable if self._parameters[n].requires_grad)
        self._begin(it)
        not_run = it.dropped if it.phase == DROPPATH else frozenset()
        decisions = {(p.module, p.call): it._decision(p) for p in self.paths}
        self._active = it
        self._patch.turn_on(decisions, it.trainable, not_run)

    def _leave(self, completed: bool) -> None:
        it, self._active = self._active, None
        assert it is not None
        not_as_traced = self._patch.not_as_traced() if completed else None
        self._patch.turn_off()
        if not_as_traced:
            raise RuntimeError(
                f"{not_as_traced}, as it was when the model was traced: pass an example_input like "
                "those that it is trained on"
            )
        if completed:
            self._advance(it)

    def _begin(self, it: Iteration) -> None:
        if it.phase == DROPPATH:
            self._dropped = it.dropped
            self.masks = {p.name: p.name not in it.dropped for p in self.paths}

    def _advance(self, it: Iteration) -> None:
        if it.phase == DROPPATH and (it.cycle + 1) % self.every == 0:
            carried = self._second_part(it.dropped)
            if any(self._parameters[name].requires_grad for name in carried):
                self._phase = COMPLEMENT
                return
        self._cycle, self._phase = it.cycle + 1, DROPPATH
