"""Puts a model into the state that an iteration needs, and back."""

import operator
import weakref
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from timm_rdp.core import regions
from timm_rdp.core.ddp import GradientReducer
from timm_rdp.core.decisions import Decisions
from timm_rdp.core.drop_path import UNTOLD, Hook
from timm_rdp.core.foreign import patch, unpatch
from timm_rdp.core.iteration import COMPLEMENT, Iteration
from timm_rdp.core.paths import Path, PathGraph
from timm_rdp.core.regions import Region


class ModelPatch:
    """Everything that ResidualDropPath changes in a model, and how it is taken back.

    What to train is told by `requires_grad`. A model that is compiled as a whole must not see that
    change, which would be compiled anew: it keeps its flags, and gradients that it should not have
    made are discarded. One compiled by regions has graphs for it (see regions.py).

    Args:
        model: the model, not wrapped.
        graph: what tracing it gave.
        owner: the controller; the patched modules keep a weak reference to it.
    """

    def __init__(self, model: nn.Module, graph: PathGraph, owner: object):
        self.parameters = dict(model.named_parameters())
        self.names = frozenset(self.parameters)
        self.compiled = False  # as a whole
        self._model, self._graph = model, graph
        self._paths = {p.name: p for p in graph.paths}
        self._modules = dict(model.named_modules())
        self.drop_paths = patch(model, graph.drop_paths, graph.calls_per_forward, owner)
        self._called_often = {n: m for n, m in self.drop_paths.items() if m._calls > 1}
        self._reducer: GradientReducer | None = None
        self._decisions = Decisions(self.drop_paths.values(), graph.paths)
        self._regions: dict[str, Region] = {}  # by the names of all modules within them
        self._hooks: list[Any] = []
        self._trainable: frozenset[str] | None = None
        self._remember()
        # What turn_off() sets back.
        self._frozen: list[nn.Parameter] = []
        self._resting: list[nn.Module] = []
        self._saved_buffers: list[tuple[Tensor, Tensor]] = []
        self._iteration_hooks: list[Any] = []
        # What fault() looks at.
        self._called_otherwise: str | None = None
        self._in_train_mode: set[bool] = set()  # of the forwards that dropped something
        self._probes: dict[str, Tensor] | None = None  # {} once the optimizer was found to be fit
        self.follow(model)

    def check_unchanged(self) -> None:
        """Raises RuntimeError where the model has other parameters than when it was patched."""
        if (name := self.changed()) is not None:
            what = f"{name} was added to the model or replaced after patching"
            raise RuntimeError(f"{what}: call follow(model), or patch it complete")

    def compile(self, options: dict[str, Any]) -> None:
        """Compile the model in place, by regions where it has some; ValueError where it is."""
        if self.compiled or self._regions:
            raise ValueError("the model is compiled already")
        regions.compile_regions(self._model, self._graph, options)
        self.follow(self._model)

    def follow(self, wrapper: nn.Module) -> None:
        """From now on the model is run through this wrapper, or modules of it are compiled."""
        if isinstance(wrapper, DistributedDataParallel):
            if self._reducer is not None:
                self._reducer.remove()
            self._reducer = GradientReducer(wrapper, self.parameters)
            self._hook_gradients()
        whole = hasattr(wrapper, "_orig_mod")
        if whole and self._regions:
            raise ValueError("blocks of the model are compiled already: use it as it is")
        if self.compiled:
            return
        found = None if whole else regions.compiled_regions(self._model, self._graph)
        self._regions = {n: r for n in self._modules if (r := regions.region_of(n, found or {}))}
        self._in_regions = [m for n, m in self.drop_paths.items() if n in self._regions]
        if found is None:
            self.compiled = True
            regions.tell_of_regions(self._model, self._graph)
            self._hook_gradients()

    def _hook_gradients(self) -> None:
        if self._hooks:
            return
        for name, parameter in self.parameters.items():
            flag = parameter.requires_grad
            parameter.requires_grad_(True)  # a hook can only be registered then
            hook = partial(self._after_gradient, name)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))
            parameter.requires_grad_(flag)

    def _after_gradient(self, name: str, parameter: nn.Parameter) -> None:
        if self._trainable is None:
            return
        if name not in self._trainable:
            parameter.grad = None
        elif self._reducer is not None:
            self._reducer.ready(parameter)

    def __getstate__(self) -> dict[str, Any]:
        # A copy is of the model inside the wrappers, and no iteration of this one is its own.
        empty = {"_hooks": [], "_iteration_hooks": [], "_saved_buffers": [], "_resting": []}
        alone = {"compiled": False, "_regions": {}, "_reducer": None, "_trainable": None}
        # Views of dicts cannot be copied: `changed` is to look for itself.
        return {**vars(self), **alone, **empty, "_in_regions": [], "_filled": (), "_empty": [...]}

    def own(self, owner: object) -> None:
        """Have the DropPaths of a copied model know their controller, and no iteration be open."""
        self.turn_off()
        for module in self.drop_paths.values():
            module._owner = weakref.ref(owner)

    def trains(self, names: frozenset[str]) -> bool:
        """Whether any of these parameters requires a gradient."""
        return any(self.parameters[n].requires_grad for n in names)

    def frozen(self, names: frozenset[str]) -> set[str]:
        """Those of these parameters that do not require a gradient."""
        return {n for n in names if not self.parameters[n].requires_grad}

    def _remember(self) -> None:
        """What the patch is for: all that `changed` looks at in every iteration."""
        dicts = [d for m in self._model.modules() for d in (m._modules, m._parameters)]
        self._empty = [d for d in dicts if not d]
        self._filled = [d.values() for d in dicts if d]
        self._known = [*chain.from_iterable(self._filled)]
        self._has_scalars = any(p.numel() == 1 for p in self._model.parameters())

    def changed(self) -> str | None:
        """The name of a parameter or module that the model did not have when it was patched."""
        found = [*chain.from_iterable(self._filled)]
        with suppress(RuntimeError):  # of the `==` of tensors: lists ask for identity first, in C
            same = found == self._known and not any(self._empty)
            if same and (not self._has_scalars or all(map(operator.is_, found, self._known))):
                return None
        for module in self._modules.values():
            if hasattr(module, "reshard"):  # FSDP2 leaves whole parameters behind an evaluation
                module.reshard()  # pyright: ignore
        then = {**self._modules, **self.parameters}
        now = dict([*self._model.named_modules(), *self._model.named_parameters()])
        name = next((n for n in [*now, *then] if now.get(n) is not then.get(n)), None)
        if name is None:
            self._remember()
        return name

    def beginning(self) -> list[nn.Module | Region]:
        """Where its first path begins, which forward_features() does not go around."""
        names = [] if self.compiled else self._graph.entrances(self._graph.paths[0].name)
        return [self._regions.get(name, self._modules[name]) for name in names]

    def turn_on(self, it: Iteration) -> None:
        """Set the model for an iteration, or leave it as it was where that fails."""
        try:
            self._turn_on(it)
        except BaseException:
            self.turn_off()
            raise

    def _turn_on(self, it: Iteration) -> None:
        dropped = frozenset() if it.phase == COMPLEMENT else it.dropped
        self._in_train_mode, self._called_otherwise = set(), None
        device = next(iter(self.parameters.values())).device
        self._decisions.tell(it, device, self.compiled, self._in_regions)
        self._keep_buffers(dropped)
        if not self.compiled:
            paths = [self._paths[name] for name in dropped]
            for path in paths:  # what is dropped is handed one sample, where that can be done
                for entrance in {*path.entrances} - self._regions.keys():  # those in no graph
                    module = self.drop_paths[path.name.partition("#")[0]]
                    hook = partial(module.pass_on_one_sample, path.call)
                    self._hook_forward(self._modules[entrance], hook)
            self._hook_forward(self._model, partial(self._begin_forward, paths))
            self._iteration_hooks.append(self._model.register_forward_hook(Hook(self._end_forward)))
        frozen = self.frozen(self.names)
        it._trained = self._trainable = trained = it._part - frozen if frozen else it._part
        others = [p for n, p in self.parameters.items() if n not in trained]
        for parameter in others:
            # A zero gradient would still let weight decay and momentum move the parameter.
            parameter.grad = None
        if not self.compiled:
            self._frozen = [p for p in others if p.requires_grad] if frozen else others
            for parameter in self._frozen[:1]:
                parameter.requires_grad_(False)  # raises within torch.func's transformations
            for parameter in self._frozen[1:]:
                parameter.requires_grad = False
        if self._probes != {}:  # a few parameters that the optimizer is to leave alone
            some = [n for n in self.parameters if n not in trained and it.phase == COMPLEMENT]
            some = some[:: len(some) // 8 + 1]
            self._probes = {n: self.parameters[n].detach().clone() for n in some} or None
        if self._reducer is not None:
            self._reducer.begin(trained, self._graph.reached_parameters(dropped))

    def turn_off(self, aside: bool = False) -> None:
        """Set everything back; with `aside` the backward pass of what was run may yet come."""
        meanwhile = self.frozen(self._trainable or frozenset())
        for parameter in self._frozen:
            if not (meanwhile and self._is_frozen_with(parameter, meanwhile)):
                parameter.requires_grad = True
        for module in self._resting:  # an interrupt may have ended its forward
            module.training = True
        for buffer, value in self._saved_buffers:
            buffer.copy_(value)
        for hook in self._iteration_hooks:
            hook.remove()
        for region in self._regions.values():
            region.resting = []
        self._frozen, self._resting, self._saved_buffers, self._iteration_hooks = [], [], [], []
        for module in self.drop_paths.values():
            vars(module).update(UNTOLD)
            module._batch.clear()
        if not aside:
            self._trainable = None
            if self._reducer is not None:
                self._reducer.end()

    def _is_frozen_with(self, parameter: nn.Parameter, meanwhile: set[str]) -> bool:
        """Whether the user has frozen a module that this parameter, frozen already, belongs to.

        Its own flag does not show it. Those of the parameters do that were trainable until then, in
        the smallest module around it that has one.
        """
        module, near = next(n for n, p in self.parameters.items() if p is parameter), []
        while module and not near:
            module = module.rpartition(".")[0]
            near = [n for n in self._trainable or () if n.startswith(f"{module}." * bool(module))]
        return meanwhile.issuperset(near)

    def fault(self) -> str | None:
        """What went wrong in the iteration that is about to end, in one line."""
        for name, before in (self._probes or {}).items():
            if not before.is_meta and not torch.equal(before, self.parameters[name]):
                return (
                    f"the optimizer moved {name}, which is frozen in this iteration: use one that "
                    "leaves parameters without a gradient alone"
                )
        self._probes = self._probes and {}
        if self._in_train_mode == {False}:
            return (
                "what this iteration drops was not dropped, because the model was in eval mode: "
                "call its train()"
            )
        # The last forward may have been no call of the model, but of its forward_features(), say.
        odd = (n for n, m in self._called_often.items() if m._call % m._calls)
        name = self._called_otherwise or next(odd, None)
        if name is None:
            return None
        calls = self.drop_paths[name]._calls
        return (
            f"{name} was not called {'once' if calls == 1 else f'{calls} times'} per forward, as "
            "when the model was traced: pass an example_input like those that it is trained on"
        )

    def remove(self) -> None:
        """Give the DropPaths their class back and remove every hook."""
        for change in filter(None, [*self._hooks, *self._regions.values(), self._reducer]):
            change.remove()
        unpatch(self.drop_paths)

    def _hook_forward(self, module: nn.Module, function: Any, prepend: bool = False) -> None:
        hook = module.register_forward_pre_hook(Hook(function), prepend=prepend)
        self._iteration_hooks.append(hook)

    def _keep_buffers(self, dropped: frozenset[str]) -> None:
        """Leave the buffers of what is dropped (BatchNorm statistics) as they are."""
        for name in self._graph.dropped_buffers(dropped) if dropped else ():
            module = self._modules[name]
            if name in self._regions:
                self._regions[name].resting.append(module)
            elif self.compiled:
                if module.training:
                    self._saved_buffers += [(b, b.clone()) for b in module.buffers(recurse=False)]
            else:
                # Before the user's hooks, some of which move buffers themselves (spectral_norm).
                self._hook_forward(module, self._rest, prepend=True)
                awake = module.register_forward_hook(Hook(self._wake), always_call=True)
                self._iteration_hooks.append(awake)

    def _rest(self, module: nn.Module, _: Any) -> None:
        if module.training:
            module.training = False
            self._resting.append(module)

    def _wake(self, module: nn.Module, *_: Any) -> None:
        if module in self._resting:
            module.training = True
            self._resting.remove(module)

    def _begin_forward(self, dropped: list[Path], *_: object) -> None:
        for module in self.drop_paths.values():
            vars(module)["_call"] = 0
        if self._reducer is None and DistributedDataParallel._active_ddp_module is not None:
            raise RuntimeError("DistributedDataParallel runs the model: call follow() with it")
        if not torch.is_grad_enabled() or not dropped:
            return
        asleep = [path.name for path in dropped if not path.module.training]
        if asleep and any(m.training for m in self.drop_paths.values()):
            raise RuntimeError(
                f"{asleep[0]} is to be dropped, but is in eval mode, unlike others: call its "
                "train(), or set its drop_prob to 0"
            )
        self._in_train_mode.add(not asleep)

    def _end_forward(self, *_: object) -> None:
        odd = (n for n, m in self.drop_paths.items() if m._call not in (0, m._calls))
        self._called_otherwise = next(odd, self._called_otherwise)
