"""ResidualDroppath: droppath and complement iterations over any model with DropPaths."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from timm_rdp.core import checks
from timm_rdp.core.attach import AttachedLoop
from timm_rdp.core.ddp import check_same_on_all_ranks
from timm_rdp.core.iteration import COMPLEMENT, DROPPATH, Iteration
from timm_rdp.core.masks import sample_masks
from timm_rdp.core.model_patch import ModelPatch
from timm_rdp.core.paths import Path
from timm_rdp.core.same_batch import same_batch
from timm_rdp.core.trace import trace_paths


class ResidualDropPath:
    """Trains a model with ResidualDroppath: patches it, and hands out the iterations to run.

    In a *droppath iteration* each residual path is dropped for the whole batch with its own
    module's `drop_prob`. The *complement iteration* that follows drops nothing and trains exactly
    the parameters that the dropped paths carried; everything else is frozen. Outside iterations the
    model is bit for bit the unpatched one. Source: Sejik Park, arXiv 2411.09475.

        rdp = ResidualDropPath(model)
        for images, targets in loader:
            for it in rdp.cycle():
                with it:
                    loss_fn(model(images), targets).backward()
                    optimizer.step()
                    optimizer.zero_grad()

    Args:
        model: any module with DropPaths, also in DistributedDataParallel or torch.compile;
            patched in place until `detach()`; see `follow()` where its parameters change later.
        seed: the masks are a pure function of seed and cycle.
        every: a complement iteration follows only every N-th droppath iteration.
        example_input: a tensor (B, C, H, W), or the tuple / dict that the model's forward takes; by
            default an image of the size that the model says it takes.

    Raises:
        ValueError: no residual path of the model can be dropped or carries a parameter, or it
            cannot be traced or is patched already; or an argument is out of its range.

    Attributes:
        masks: {path name: kept?} of the current cycle; {} before the first.
        phase, current_cycle: those of the iteration that is open, or else comes next.
    """

    def __init__(self, model: nn.Module, seed: int = 0, every: int = 1, example_input: Any = None):
        self.seed = checks.whole_number("seed", seed)
        self.every = checks.whole_number("every", every, least=1)
        self.model = checks.unwrap(model)
        self.masks: dict[str, bool] = {}
        self._example_input = example_input
        self.current_cycle, self.phase = 0, DROPPATH
        self._dropped: frozenset[str] = frozenset()
        self._active: Iteration | None = None
        self._loop: AttachedLoop | None = None
        self._outermost = self.model
        self._detached = self._paused = self._told = False
        self._patch_model()
        if model is not self.model:
            self.follow(model)

    def _patch_model(self) -> None:
        self._graph = trace_paths(self.model, self._example_input)
        checks.check_droppable(self.model, self._graph)
        self.paths: tuple[Path, ...] = tuple(p for p in self._graph.paths if p.residual)
        self.non_residual: tuple[Path, ...] = tuple(p for p in self._graph.paths if not p.residual)
        self._patch = ModelPatch(self.model, self._graph, self)

    def __repr__(self) -> str:
        at = "detached" if self._detached else f"cycle {self.current_cycle}, {self.phase} iteration"
        return f"<ResidualDropPath of {len(self.paths)} paths of {type(self.model).__name__}: {at}>"

    def __getstate__(self) -> dict[str, Any]:
        # A copy controls the copied model, in no wrapper and attached to no optimizer.
        own = {"_active": None, "_paused": False, "_loop": None, "_outermost": self.model}
        return {**vars(self), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if not self._detached:
            self._patch.own(self)

    def follow(self, wrapper: nn.Module) -> "ResidualDropPath":
        """Take account of what became of the model after it was patched; returns self.

        Args:
            wrapper: what torch.compile or DistributedDataParallel (or both) made of the model; a
                module that contains that, such as timm's task; or the model itself, after
                parameters or modules of it were added or replaced.

        Raises:
            ValueError: it is not around this model, or ranks differ in what determines the masks;
                or what the constructor raises.
            RuntimeError: called within an iteration.
        """
        self._check_in_use()
        around = checks.modules_around(self.model, wrapper)
        if self._patch.changed():
            self._close("follow")
            with self.pause():
                self._patch.remove()
                self._patch_model()
        self._outermost = wrapper
        for module in around:
            if isinstance(module, DistributedDataParallel):
                check_same_on_all_ranks(module, self.state_dict())
            self._patch.follow(module)
        self._follow_in_loop()
        return self

    def compile(self, **options: Any) -> nn.Module:
        """Compile in place, one by one, the modules that hold a path each; returns the model.

        What is dropped is not in their graphs, and what is frozen has no backward pass. A model
        without such regions is compiled as a whole, which saves neither. Options: torch.compile's.

        Raises:
            ValueError: it is compiled already, or by a mode that records CUDA graphs.
            RuntimeError: called within an iteration.
        """
        self._check_in_use()
        self._close("compile")
        self._patch.compile(options)
        return self._follow_in_loop()

    def dropped_part(self, names: Iterable[str]) -> frozenset[str]:
        """D(names): parameters that reach the output by these paths alone; ValueError if none."""
        return self._graph.dropped_part(names)

    def iteration(self) -> Iteration:
        """The next iteration of the sequence; the same one until it has been completed.

        Raises RuntimeError: detached, or the model has no parameter that requires a gradient.
        """
        self._check_in_use()
        it = self._next()
        while not self._patch.trains(it._part):  # all of this droppath iteration's was frozen
            if not self._patch.trains(self._patch.names):
                raise RuntimeError("no parameter of the model requires a gradient: unfreeze some")
            self._begin(it)
            self._advance(it)
            it = self._next()
        return it

    def _next(self) -> Iteration:
        dropped = self._dropped
        if self.phase == DROPPATH:
            kept = sample_masks(self.seed, self.current_cycle, [p.drop_prob for p in self.paths])
            dropped = frozenset(p.name for p, k in zip(self.paths, kept, strict=True) if not k)
            part = self._patch.names - self.dropped_part(dropped)
        else:
            part = self._second_part(dropped)
        return Iteration(self.phase, self.current_cycle, dropped, part, self)

    def _second_part(self, dropped: frozenset[str]) -> frozenset[str]:
        """What a cycle that dropped these paths trains second; ablations override it."""
        return self.dropped_part(dropped)

    def cycle(self) -> Iterator[Iteration]:
        """The iterations of the next cycle, or what is left of it, one after the other.

        Raises RuntimeError where an iteration was not entered with `with`.
        """
        cycle = self.current_cycle
        while self.current_cycle == cycle and (it := self.iteration()).cycle == cycle:
            yield it
            if not it._entered_by_user:
                raise RuntimeError(f"{it} was not entered: run it within `with it:`")

    def detach(self) -> nn.Module:
        """Give the model its classes back, without hooks; RuntimeError within an iteration."""
        if self._detached:
            return self.model
        self._close("detach")
        if self._loop is not None:
            self._loop.remove()
        self._patch.remove()
        self._detached, self._loop = True, None
        return self.model

    def _close(self, call: str) -> None:
        """End an iteration of attach() without completing it, before a call that needs that."""
        if self._active is not None:
            if self._active._entered_by_user:
                raise RuntimeError(f"{call}() within an iteration: leave its `with` block first")
            self._leave(completed=False)
        if self._loop is not None:
            self._loop.aside = None

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence stands, in plain Python values: loads with weights_only=True."""
        drawn = {"dropped": sorted(self._dropped), "masks": dict(self.masks)}
        at = {"seed": self.seed, "every": self.every, "cycle": self.current_cycle}
        return {**at, "phase": self.phase, **drawn, "paths": [p.name for p in self.paths]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the sequence where the controller that gave `state` stood.

        Raises:
            ValueError: not such a state, or one of a model with other paths.
            RuntimeError: called within an iteration.
        """
        checks.check_state(state, self.state_dict(), (DROPPATH, COMPLEMENT))
        self._close("load_state_dict")
        own = (state[name] for name in ("seed", "every", "cycle", "phase"))
        self.seed, self.every, self.current_cycle, self.phase = own
        self._dropped, self.masks = frozenset(state["dropped"]), dict(state["masks"])

    def attach(
        self,
        optimizer: torch.optim.Optimizer,
        batch: str = "next",
        clip: Callable[[], Any] | None = None,
    ) -> "ResidualDropPath":
        """Run the iterations from hooks, so that the user's loop stays as it is.

        Every forward in train mode until the next `optimizer.step()` belongs to one iteration. What
        the optimizer holds beside the model's parameters is trained in every iteration: patch the
        module that contains all of it where it should not be.

        Args:
            optimizer: what trains the model.
            batch: "next": batches alternate between the two iterations, which was measured to be
                cheaper than plain DropPath and less accurate. "same": as in `cycle()`, by repeating
                the calls of the model, or of the wrapper followed last, within the step; the loss
                in what they return gets the gradient that the loop's backward gave it. Where
                `step()` is passed a closure, that is called again instead.
            clip: called before the second step of "same", to clip as before the first.

        Raises:
            ValueError: already attached, or the optimizer cannot be followed, or another `batch`.
            RuntimeError: in the step, where "same" finds no loss, or not all of it in the closure.
        """
        self._check_in_use()
        if self._loop is not None:
            raise ValueError("already attached to an optimizer: RDP follows one; detach() first")
        self._loop = AttachedLoop(self, optimizer, self._patch, same_batch(batch, clip))
        self._follow_in_loop()
        return self

    def _follow_in_loop(self) -> nn.Module:
        if self._loop is not None:
            self._loop.hook(self._patch, self._outermost)
        return self.model

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within it the model is the unpatched one, whatever iteration is open.

        It is for forwards in train mode that no optimizer step follows, above all in an attached
        loop, where each would begin an iteration; to enter one within it is a RuntimeError.
        """
        it, paused = self._active, self._paused
        self._active, self._paused = None, True
        if it is not None:
            self._patch.turn_off()
        try:
            yield
        finally:
            self._paused = paused
            if it is not None:
                self._patch.turn_on(it)
                self._active = it

    def _check_in_use(self) -> None:
        if self._detached:
            raise RuntimeError("this ResidualDropPath was detached from its model: make a new one")

    def _enter(self, it: Iteration) -> None:
        self._check_in_use()
        if self._paused:
            raise RuntimeError(f"{it} was entered within pause(): leave that first")
        if self._active is not None:
            raise RuntimeError(f"{self._active} is still open: iterations do not nest")
        if (it.cycle, it.phase) != (self.current_cycle, self.phase):
            raise RuntimeError(f"{it} is over: get the next one from iteration() or cycle()")
        self._patch.check_unchanged()
        self._patch.turn_on(it)
        self._active = it
        self._begin(it)

    def _leave(self, completed: bool, aside: bool = False) -> None:
        it, self._active = self._active, None
        assert it is not None
        fault = self._patch.fault() if completed else None
        self._patch.turn_off(aside)
        if fault:
            raise RuntimeError(fault)
        if completed:
            self._advance(it)

    def _begin(self, it: Iteration) -> None:
        if it.phase == DROPPATH:
            self._dropped = it.dropped
            self.masks = {p.name: p.name not in it.dropped for p in self.paths}

    def _advance(self, it: Iteration) -> None:
        if it.phase == DROPPATH and (it.cycle + 1) % self.every == 0:
            if self._patch.trains(self._second_part(it.dropped)):
                self.phase = COMPLEMENT
                return
            self._told = self._told or checks.tell_nothing_to_complement(it.dropped)
        self.current_cycle, self.phase = it.cycle + 1, DROPPATH
