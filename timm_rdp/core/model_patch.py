"""Puts a model into the state that an iteration needs, and back."""

import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from timm_rdp.core.ddp import GradientReducer
from timm_rdp.core.drop_path import Decision, Hook, MaskedDropPath, patch, unpatch
from timm_rdp.core.paths import PathGraph


class ModelPatch:
    """Everything that ResidualDropPath changes in a model, and how it is taken back.

    An eager model is told what to drop by plain numbers and what to train by `requires_grad`. A
    compiled one must see neither change, since each would be compiled anew: it reads the decisions
    from tensors, keeps its flags, and the gradients that it should not have made are discarded.

    Args:
        model: the model, not wrapped.
        drop_paths: its DropPaths by name.
        graph: what tracing it gave.
        owner: the controller, to which the patched modules keep a weak reference.
    """

    def __init__(
        self, model: nn.Module, drop_paths: dict[str, DropPath], graph: PathGraph, owner: object
    ):
        self.parameters = dict(model.named_parameters())
        self.compiled = False
        self._model = model
        self._graph = graph
        self._paths = {p.name: p for p in graph.paths}
        self._modules = dict(model.named_modules())
        self._drop_paths = patch(drop_paths, graph.calls_per_forward, owner)
        self._reducer: GradientReducer | None = None
        self._weights = torch.ones(0)  # the decisions, as compiled code reads them
        self._hooks: list[Any] = []
        self._trainable: frozenset[str] | None = None
        # What turn_off() sets back.
        self._frozen: list[nn.Parameter] = []
        self._resting: list[nn.Module] = []
        self._saved_buffers: list[tuple[Tensor, Tensor]] = []
        self._iteration_hooks: list[Any] = []
        self._called_otherwise: str | None = None  # see not_as_traced()

    def follow_compile(self) -> None:
        """From now on the model is run through torch.compile."""
        self.compiled = True
        self._hook_gradients()

    def follow_ddp(self, ddp: DistributedDataParallel) -> None:
        """From now on the model is run through DistributedDataParallel."""
        self._reducer = GradientReducer(ddp, self.parameters)
        self._hook_gradients()

    def _hook_gradients(self) -> None:
        if self._hooks:
            return
        for name, parameter in self.parameters.items():
            flag = parameter.requires_grad
            parameter.requires_grad_(True)  # a hook can only be registered then

            def after_gradient(p: nn.Parameter, name: str = name) -> None:
                if self._trainable is None:
                    return
                if name not in self._trainable:
                    p.grad = None
                elif self._reducer is not None:
                    self._reducer.ready(p)

            self._hooks.append(parameter.register_post_accumulate_grad_hook(after_gradient))
            parameter.requires_grad_(flag)

    def __getstate__(self) -> dict[str, Any]:
        # A copy is of the model inside the wrappers, and no iteration of this one is its own.
        empty = {"_hooks": [], "_iteration_hooks": [], "_saved_buffers": [], "_resting": []}
        return {**vars(self), "compiled": False, "_reducer": None, "_trainable": None, **empty}

    def own(self, owner: object) -> None:
        """Have the DropPaths of a copied model know their controller, and no iteration be open."""
        self.turn_off()
        for module in self._drop_paths.values():
            module._owner = weakref.ref(owner)

    def turn_on(
        self,
        decisions: Mapping[tuple[DropPath, int], float],
        trainable: frozenset[str],
        dropped: frozenset[str],
    ) -> None:
        """Set the model for an iteration.

        Args:
            decisions: what each call of a DropPath does; timm's own behaviour for the others.
            trainable: names of the parameters to train.
            dropped: names of the paths that are dropped.
        """
        self._decide(decisions)
        self._keep_buffers(dropped)
        if not self.compiled:
            self._skip(dropped)
            self._called_otherwise = None
            self._hook_forward(self._model, self._begin_forward)
            end = self._model.register_forward_hook(Hook(self._end_forward))
            self._iteration_hooks.append(end)
        self._trainable = trainable
        for name, parameter in self.parameters.items():
            if name not in trainable:
                # A zero gradient would still let weight decay and momentum move the parameter.
                parameter.grad = None
                if parameter.requires_grad and not self.compiled:
                    parameter.requires_grad_(False)
                    self._frozen.append(parameter)
        if self._reducer is not None:
            self._reducer.begin(trainable & self._graph.reached_parameters(dropped))

    def turn_off(self) -> None:
        """Set everything back, whatever happened since `turn_on`."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        for module in self._resting:  # an interrupt may have ended its forward
            module.training = True
        for buffer, value in self._saved_buffers:
            buffer.copy_(value)
        for hook in self._iteration_hooks:
            hook.remove()
        self._frozen, self._resting = [], []
        self._saved_buffers, self._iteration_hooks = [], []
        self._trainable = None
        for module in self._drop_paths.values():
            module.decide(None)
        if self._reducer is not None:
            self._reducer.end()

    def not_as_traced(self) -> str | None:
        """Says which DropPath was not called as often per forward as when the model was traced."""
        # The last forward may have been no call of the model, but of its forward_features(), say.
        odd = (n for n, m in self._drop_paths.items() if m._call % m._calls)
        name = self._called_otherwise or next(odd, None)
        if name is None:
            return None
        calls = self._drop_paths[name]._calls
        return f"{name} was not called {'once' if calls == 1 else f'{calls} times'} per forward"

    def remove(self) -> None:
        """Give the DropPaths their class back and remove every hook."""
        for hook in self._hooks:
            hook.remove()
        if self._reducer is not None:
            self._reducer.remove()
        unpatch(self._drop_paths)

    def _hook_forward(self, module: nn.Module, function: Any, prepend: bool = False) -> None:
        hook = module.register_forward_pre_hook(Hook(function), prepend=prepend)
        self._iteration_hooks.append(hook)

    def _decide(self, decisions: Mapping[tuple[DropPath, int], float]) -> None:
        weights: dict[tuple[DropPath, int], Tensor] | None = None
        if self.compiled:
            device = next(iter(self.parameters.values())).device
            if len(self._weights) != len(decisions) or self._weights.device != device:
                self._weights = torch.ones(len(decisions), device=device)
                self._views = self._weights.unbind()
            self._weights.copy_(torch.tensor([*decisions.values()]), non_blocking=True)
            weights = dict(zip(decisions, self._views, strict=True))
        for module in self._drop_paths.values():
            keys = [(module, call) for call in range(module._calls)]
            told: list[Decision] = [decisions.get(key) for key in keys]
            module.decide(told, None if weights is None else [weights.get(key) for key in keys])

    def _skip(self, dropped: frozenset[str]) -> None:
        """Hand one sample to what is dropped, where that can be done."""
        for name in dropped:
            path = self._paths[name]
            assert isinstance(path.module, MaskedDropPath)
            hook = partial(path.module.pass_on_one_sample, path.call)
            for entrance in path.entrances:
                self._hook_forward(self._modules[entrance], hook)

    def _keep_buffers(self, dropped: frozenset[str]) -> None:
        """Leave the buffers of what is dropped (BatchNorm statistics) as they are."""
        for name in self._graph.dropped_buffers(dropped):
            module = self._modules[name]
            if self.compiled:
                if module.training:
                    self._saved_buffers += [(b, b.clone()) for b in module.buffers(recurse=False)]
                continue
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

    def _begin_forward(self, *_: object) -> None:
        for module in self._drop_paths.values():
            vars(module)["_call"] = 0

    def _end_forward(self, *_: object) -> None:
        for name, module in self._drop_paths.items():
            if module._call not in (0, module._calls):
                self._called_otherwise = name
                return
