"""Puts a model into the state that an iteration needs, and back."""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from timm_rdp.core.ddp import GradientReducer
from timm_rdp.core.drop_path import Decision, DropPath, patch, unpatch
from timm_rdp.core.paths import PathGraph
from timm_rdp.core.skip import OneSample, Rest


class Switch:
    """Everything that ResidualDropPath changes in a model, and how it is taken back.

    An eager model is told what to drop by plain numbers and what to train by `requires_grad`. A
    compiled one must see neither change, since each would be compiled anew: it reads the decisions
    from tensors, keeps its flags, and the gradients that it should not have made are discarded.

    Args:
        model: the model, not wrapped.
        modules: its DropPaths by name.
        graph: what tracing it gave.
        owner: the controller, to which the patched modules keep a weak reference.
    """

    def __init__(
        self, model: nn.Module, modules: dict[str, DropPath], graph: PathGraph, owner: object
    ):
        self.parameters = dict(model.named_parameters())
        self.compiled = False
        self._model = model
        self._drop_paths = modules
        self._graph = graph
        self._modules = dict(model.named_modules())
        self._calls = {m: graph.calls_per_forward.get(n, 1) for n, m in modules.items()}
        self._reducer: GradientReducer | None = None
        self._weights: Tensor | None = None
        self._hooks: list[Any] = []
        self._trainable: frozenset[str] | None = None
        self._frozen: list[nn.Parameter] = []
        self._resting: list[nn.Module] = []
        self._saved: list[tuple[Tensor, Tensor]] = []
        self._added: list[Any] = []  # hooks of this iteration
        self._paths = {p.name: p for p in graph.paths}
        self._count = _CountCalls(modules)
        self.skip = True  # whether dropped paths are not run, where that can be done
        for module, calls in self._calls.items():
            patch(module, calls, weakref.ref(owner))

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

    def turn_on(
        self,
        decisions: Mapping[tuple[DropPath, int], Decision],
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
        self._rest(dropped)
        if not self.compiled:
            for name in dropped:
                path = self._paths[name]
                hook = OneSample(path.module, path.call, run=not self.skip)
                for entrance in path.entrances:
                    self._added.append(self._modules[entrance].register_forward_pre_hook(hook))
            self._count.odd = None
            self._added.append(self._model.register_forward_pre_hook(self._count.begin))
            self._added.append(self._model.register_forward_hook(self._count.end))
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
        for module in self._resting:
            module.training = self._model.training  # whatever mode the model is in by now
        for buffer, value in self._saved:
            buffer.copy_(value)
        for hook in self._added:
            hook.remove()
        self._frozen, self._resting, self._saved, self._added = [], [], [], []
        self._trainable = None
        for module in self._calls:
            module.decide(None)
        if self._reducer is not None:
            self._reducer.end()

    def miscalled(self) -> str | None:
        """A DropPath that was not called as often per forward as when the model was traced."""
        # The last forward may have been no call of the model, but of its forward_features(), say.
        odd = (n for n, m in self._drop_paths.items() if m._call % m._calls)
        name = self._count.odd or next(odd, None)
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
        for module in self._drop_paths.values():
            unpatch(module)

    def _decide(self, decisions: Mapping[tuple[DropPath, int], Decision]) -> None:
        weights: list[Tensor] | None = None
        if self.compiled:
            values = [1.0 if d is None else d for d in decisions.values()]
            device = next(iter(self.parameters.values())).device
            if self._weights is None or self._weights.device != device:
                self._weights = torch.ones(len(values), device=device)
                self._views = self._weights.unbind()
            self._weights.copy_(torch.tensor(values), non_blocking=True)
            weights = dict(zip(decisions, self._views, strict=True))
        for module, calls in self._calls.items():
            keys = [(module, call) for call in range(calls)]
            module.decide(
                [decisions.get(key) for key in keys],
                None if weights is None else [weights.get(key) for key in keys],
            )

    def _rest(self, dropped: frozenset[str]) -> None:
        """Leave the buffers of what is dropped (BatchNorm statistics) as they are."""
        for name in self._graph.dropped_buffers(dropped):
            module = self._modules[name]
            if not module.training:
                continue
            if self.compiled:
                self._saved += [(b, b.clone()) for b in module.buffers(recurse=False)]
            else:
                self._resting.append(module)
                self._added.append(module.register_forward_pre_hook(Rest()))


class _CountCalls:
    """Hooks that compare how often a forward calls each DropPath with what was traced.

    Args:
        drop_paths: by name; none in a copy of the model, where the hooks do nothing.
    """

    def __init__(self, drop_paths: Mapping[str, DropPath] | None = None):
        self._drop_paths = drop_paths or {}
        self.odd: str | None = None  # name of one that was called more often, or fewer but some

    def begin(self, *_: object) -> None:
        for module in self._drop_paths.values():
            module.__dict__["_call"] = 0

    def end(self, *_: object) -> None:
        for name, module in self._drop_paths.items():
            if module._call not in (0, module._calls):
                self.odd = name
                return

    def __reduce__(self) -> tuple:
        return (_CountCalls, ())
