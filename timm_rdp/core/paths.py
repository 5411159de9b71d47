"""A model's paths and what each one carries, read off its autograd graph."""

import copy
import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from timm.layers import DropPath
from timm.models import get_model_input_config
from torch import Tensor, nn

from timm_rdp.core.skip import try_skipping


@dataclass(frozen=True)
class Path:
    """One call of a DropPath during a training forward.

    Attributes:
        name: the module's name, plus `#k` in call order where it is called more than once.
        parameters: names of the parameters that no longer reach the output without this path.
        module: the DropPath.
        call: which call of the module within one forward, from 0.
        residual: whether the output stays connected to the input without this path.
        entrances: names of the modules that are handed one sample where the path is dropped; empty
            where a dropped path has to be computed and cut.
    """

    name: str
    parameters: tuple[str, ...]
    module: DropPath = field(repr=False)
    call: int = field(repr=False)
    residual: bool = field(repr=False)
    entrances: tuple[str, ...] = field(default=(), repr=False)

    @property
    def drop_prob(self) -> float:
        """Probability with which the path is dropped, as its module has it now."""
        return float(self.module.drop_prob)


class PathGraph:
    """A model's autograd graph, condensed to one set of bits per path.

    Bit i < P stands for path i; then come the parameters, the modules that own parameters or
    buffers, and the input. `reached[i]` has the bits of everything that the backward pass meets
    behind path i before it meets another path; `reached[-1]` is the same for the output.

    Args:
        model: the model that the modules and names of the paths belong to.
        calls: (module name, call) per path, in call order.
        parameters: names of the model's parameters.
        owners: the modules that own parameters or buffers.
        reached: P + 1 integers, see above.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: list[tuple[str, int]],
        parameters: list[str],
        owners: list["_Owner"],
        reached: list[int],
    ):
        self._reached = reached
        self._count = len(calls)
        self._path_bits = (1 << self._count) - 1
        self._parameters = parameters
        self._owners = owners
        self._everything = self._live(0)

        modules = dict(model.named_modules())
        called = {}
        for name, call in calls:
            called[name] = max(called.get(name, 0), call + 1)
        self.calls_per_forward: dict[str, int] = called
        input_bit = 1 << (self._count + len(parameters) + len(owners))
        self.depends_on_input = bool(self._everything & input_bit)
        self.paths: tuple[Path, ...] = tuple(
            Path(
                name=f"{name}#{call}" if called[name] > 1 else name,
                parameters=tuple(_select(parameters, self._cut(1 << i))),
                module=modules[name],
                call=call,
                residual=bool(self._live(1 << i) & input_bit),
            )
            for i, (name, call) in enumerate(calls)
        )
        self._index = {path.name: i for i, path in enumerate(self.paths)}

    def dropped_part(self, names: Iterable[str]) -> frozenset[str]:
        """Names of the parameters that reach the output, but not without the paths `names`.

        Raises:
            ValueError: a name is not that of a path.
        """
        return frozenset(_select(self._parameters, self._cut(self._bits(names))))

    def reached_parameters(self, names: Iterable[str]) -> frozenset[str]:
        """Names of the parameters that the output reaches when the paths `names` are cut.

        Raises:
            ValueError: a name is not that of a path.
        """
        return frozenset(_select(self._parameters, self._live(self._bits(names)) >> self._count))

    def dropped_buffers(self, names: Iterable[str]) -> frozenset[str]:
        """Names of the modules with buffers whose output reaches the model's only through `names`.

        Raises:
            ValueError: a name is not that of a path.
        """
        return frozenset(o.name for o in self._cut_owners(self._bits(names)) if o.buffered)

    def entrances(self, name: str) -> list[str]:
        """Names of the modules at which a path begins.

        They are those on the path that own parameters, and whose input depends on no parameter that
        the path carries.
        """
        bit = self._bits([name])
        carried = self._cut(bit) & ((1 << len(self._parameters)) - 1)
        found = []
        for owner in self._cut_owners(bit):
            behind = self._closure(owner.behind_input, seen=0) >> self._count
            if owner.calls == 1 and not behind & carried:
                found.append(owner.name)
        return found

    def _cut_owners(self, dropped: int) -> Iterator["_Owner"]:
        return _select(self._owners, self._cut(dropped) >> len(self._parameters))

    def _bits(self, names: Iterable[str]) -> int:
        bits = 0
        for name in names:
            if name not in self._index:
                near = difflib.get_close_matches(name, self._index, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "see ResidualDropPath.paths"
                raise ValueError(f"no path is named {name!r}: {hint}")
            bits |= 1 << self._index[name]
        return bits

    def _live(self, dropped: int) -> int:
        """Bits of everything that the output reaches when the paths `dropped` are cut."""
        return self._closure(self._reached[-1], seen=dropped)

    def _closure(self, live: int, seen: int) -> int:
        while todo := live & self._path_bits & ~seen:
            bit = todo & -todo
            seen |= bit
            live |= self._reached[bit.bit_length() - 1]
        return live

    def _cut(self, dropped: int) -> int:
        """Bits, from that of the first parameter on, of what the output no longer reaches."""
        return (self._everything & ~self._live(dropped)) >> self._count


def _select(items: list, bits: int) -> Iterator[Any]:
    bits &= (1 << len(items)) - 1
    while bits:
        bit = bits & -bits
        bits ^= bit
        yield items[bit.bit_length() - 1]


@dataclass
class _Owner:
    """A module that owns parameters or buffers, as the traced forward called it."""

    name: str
    buffered: bool
    calls: int = 0
    inputs: list = field(default_factory=list)  # graph nodes
    outputs: list = field(default_factory=list)
    behind_input: int = 0  # bits, see PathGraph


def trace_paths(model: nn.Module, example_input: Any = None) -> PathGraph:
    """Run one forward of a copy of the model and read its paths off the autograd graph.

    The copy lives on torch's meta device, where a forward takes no memory and no arithmetic; a
    model that cannot run there is copied to the CPU and run for real. The model itself, its memory
    and every random state stay untouched.

    Args:
        model: any model with timm DropPath modules.
        example_input: a tensor (B, C, H, W), or the tuple / dict that the model's forward takes; by
            default of the size that the model says it takes.

    Raises:
        ValueError: the model cannot be run on the example input, or recomputes in a way that hides
            its graph.
    """
    inputs = [example_input] if example_input is not None else list(_example_inputs(model))
    on_meta = any(p.is_meta for p in model.parameters())  # and so without values to copy
    for device in ("meta",) if on_meta else ("meta", "cpu"):
        failures = []
        for candidate in inputs:
            try:
                return _trace_on(torch.device(device), model, candidate)
            except _HiddenGraphError as e:
                raise ValueError(str(e)) from None
            except Exception as e:  # whatever a model may raise on a device or size it cannot take
                failures.append(f"{type(e).__name__}: {e}".splitlines()[0])
    given = "example_input" if example_input is not None else "an image of its default size"
    raise ValueError(
        f"{type(model).__name__} cannot be traced with {given} ({failures[0]}); "
        "pass example_input, the input that its forward takes"
    ) from None


class _HiddenGraphError(Exception):
    pass


class _TracedDropPath(DropPath):
    """Passes its input on through a graph node of its own, and notes it."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1.0
        self._calls.append((self, y.grad_fn, tuple(x.shape)))
        return y


def _trace_on(device: torch.device, model: nn.Module, example_input: Any) -> PathGraph:
    traced = _copy_to(device, model)
    _drop_hooks(traced)
    traced.train()
    if hasattr(traced, "set_grad_checkpointing"):
        traced.set_grad_checkpointing(False)
    calls: list[tuple[nn.Module, Any, tuple[int, ...]]] = []
    names = {}
    for name, module in traced.named_modules():
        if isinstance(module, DropPath):
            module.__class__ = _TracedDropPath
            module._calls = calls
            names[module] = name
    parameters = dict(traced.named_parameters())
    for parameter in parameters.values():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(True)

    if device.type == "meta":
        _run_one_step_of_recurrences(traced)
    owners, owner_hooks = _watch_owners(traced)
    dtype = next((p.dtype for p in parameters.values() if p.is_floating_point()), torch.float32)
    leaves: list[Tensor] = []

    def run() -> Any:
        with (
            torch.random.fork_rng(devices=[]),
            torch.autocast(device_type="cpu", enabled=False),
            torch.enable_grad(),
            torch.device(device),
            # SyncBatchNorm runs on a GPU only, and between processes.
            mock.patch.object(nn.SyncBatchNorm, "forward", nn.BatchNorm2d.forward),
        ):
            args, kwargs = _arguments(traced, _to_leaves(example_input, device, dtype, leaves))
            return traced(*args, **kwargs)

    output = run()
    for hook in owner_hooks:
        hook.remove()
    roots = [t.grad_fn for t in _tensors(output) if t.grad_fn is not None]

    counts: dict[str, int] = {}
    path_calls = []
    for module, _, _ in calls:
        name = names[module]
        path_calls.append((name, counts.get(name, 0)))
        counts[name] = counts.get(name, 0) + 1
    # The bits of PathGraph: of a leaf by its tensor, of a module by the node of its output.
    bits: dict[Any, int] = {}
    for i, parameter in enumerate(parameters.values(), start=len(calls)):
        bits[id(parameter)] = 1 << i
    for i, owner in enumerate(owners, start=len(calls) + len(parameters)):
        for node in owner.outputs:
            bits[node] = bits.get(node, 0) | 1 << i
    bits.update({id(leaf): 1 << (len(calls) + len(parameters) + len(owners)) for leaf in leaves})
    path_of = {node: i for i, (_, node, _) in enumerate(calls) if node is not None}
    reached, behind = _reach(roots, path_of, len(calls), bits)
    for owner in owners:
        for node in owner.inputs:
            owner.behind_input |= behind.get(node, 0)
    graph = PathGraph(model, path_calls, list(parameters), owners, reached)
    if not graph.depends_on_input:
        raise _HiddenGraphError(
            f"the output of {type(model).__name__} does not depend on a floating-point input: "
            "pass an example_input that it is differentiable in"
        )
    _find_skippable(graph, traced, run, calls)
    return graph


def _watch_owners(model: nn.Module) -> tuple[list[_Owner], list]:
    """Note the graph nodes of the inputs and outputs of the modules that own something."""
    owners, hooks = [], []
    for name, module in model.named_modules():
        buffered = bool([*module.buffers(recurse=False)])
        if not buffered and not [*module.parameters(recurse=False)]:
            continue
        owner = _Owner(name, buffered)

        def before(_: nn.Module, args: tuple, kwargs: dict, owner: _Owner = owner) -> None:
            owner.calls += 1
            owner.inputs += [t.grad_fn for t in _tensors((args, kwargs))]

        def after(_: nn.Module, __: tuple, output: Any, owner: _Owner = owner) -> None:
            owner.outputs += [t.grad_fn for t in _tensors(output)]

        owners.append(owner)
        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after))
    return owners, hooks


def _run_one_step_of_recurrences(model: nn.Module) -> None:
    """Hand LSTMs and their like one step of the sequence, and repeat what they make of it.

    On meta a step costs as much as any layer, and all steps depend on the same parameters.
    """

    def first_step(module: nn.RNNBase, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        module._steps = None
        if not args or not isinstance(args[0], Tensor):
            return None  # a PackedSequence, say
        dim = 1 if module.batch_first and args[0].ndim == 3 else 0
        module._steps = (dim, args[0].shape[dim])
        return (args[0].narrow(dim, 0, 1), *args[1:]), kwargs

    def all_steps(module: nn.RNNBase, _: tuple, result: tuple) -> tuple | None:
        if module._steps is None:
            return None
        output, state = result
        dim, steps = module._steps
        first = output.transpose(0, dim)
        return first.repeat(steps, *(1,) * (output.ndim - 1)).transpose(0, dim), state

    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.register_forward_pre_hook(first_step, with_kwargs=True)
            module.register_forward_hook(all_steps)


def _find_skippable(
    graph: PathGraph, traced: nn.Module, run: Callable[[], Any], calls: list
) -> None:
    modules = dict(traced.named_modules())
    residual = {
        p.name: (module, p.call, shape)
        for p, (module, _, shape) in zip(graph.paths, calls, strict=True)
        if p.residual and shape[0] > 1
    }
    entrances = {name: graph.entrances(name) for name in residual}
    good = try_skipping(
        traced,
        run,
        residual,
        {name: [modules[n] for n in names] for name, names in entrances.items()},
        lambda names: [modules[n] for n in graph.dropped_buffers(names)],
    )
    graph.paths = tuple(
        replace(p, entrances=tuple(entrances[p.name])) if p.name in good else p for p in graph.paths
    )


def _reach(
    roots: list, path_of: dict, count: int, bits: dict[Any, int]
) -> tuple[list[int], dict[Any, int]]:
    """Bits that lie behind each path and, last, the output (see PathGraph); and those per node."""
    reached = [0] * (count + 1)
    seen: dict[Any, int] = {}
    stack = [(root, False) for root in roots]
    while stack:
        node, children_done = stack.pop()
        if node in seen:
            continue
        children = [child for child, _ in node.next_functions if child is not None]
        if not children_done:
            if type(node).__name__ == "CheckpointFunctionBackward":
                raise _HiddenGraphError(
                    "the model checkpoints with use_reentrant=True, which hides its graph: "
                    "use torch.utils.checkpoint with use_reentrant=False"
                )
            stack.append((node, True))
            stack.extend((child, False) for child in children if child not in seen)
            continue
        behind = bits.get(node, 0)
        if hasattr(node, "variable"):
            behind |= bits.get(id(node.variable), 0)
        for child in children:
            behind |= seen[child]
        if node in path_of:
            reached[path_of[node]] = behind
            behind = 1 << path_of[node]
        seen[node] = behind
    for root in roots:
        reached[-1] |= seen[root]
    return reached, seen


def _copy_to(device: torch.device, model: nn.Module) -> nn.Module:
    if device.type != "meta":
        return copy.deepcopy(model).to(device)
    memo: dict[int, Any] = {}
    for module in model.modules():
        # Parameters and buffers are in dicts of their own; other tensors are plain attributes.
        for tensors in (module._parameters, module._buffers, module.__dict__):
            for value in tensors.values():
                if isinstance(value, Tensor) and id(value) not in memo:
                    memo[id(value)] = _meta_like(value)
    return copy.deepcopy(model, memo)


def _meta_like(value: Tensor) -> Tensor:
    meta = torch.empty_like(value, device="meta", requires_grad=False)
    return nn.Parameter(meta, requires_grad=False) if isinstance(value, nn.Parameter) else meta


def _drop_hooks(model: nn.Module) -> None:
    """Keep the hooks that compute weights; a user's own must not see the copy."""
    for module in model.modules():
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        ):
            for key, hook in list(hooks.items()):
                if not type(hook).__module__.startswith("torch.nn.utils"):
                    del hooks[key]


def _example_inputs(model: nn.Module) -> Iterator[Tensor]:
    """Images (2, C, H, W) that the model may take, the likeliest first."""
    first = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    shapes = []
    for module in model.modules():  # the model itself comes first
        size = getattr(module, "img_size", None)
        if isinstance(getattr(module, "pretrained_cfg", None), Mapping):
            channels, *size = get_model_input_config(module)["input_size"]
            shapes += [(channels, *size), (first, *size)]
        elif isinstance(size, int):
            shapes.append((first, size, size))
        elif isinstance(size, tuple | list) and len(size) == 2:
            shapes.append((first, *size))
    shapes += [(3, 224, 224), (first, 224, 224)]
    for shape in dict.fromkeys(shapes):
        yield torch.empty((2, *shape), device="meta")


def _to_leaves(value: Any, device: torch.device, dtype: torch.dtype, leaves: list[Tensor]) -> Any:
    """The example on `device`, its floating-point tensors computed from new leaves."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value.to(device)
        if value.device.type == "meta":
            leaf = torch.zeros(value.shape, dtype=dtype, device=device, requires_grad=True)
        else:
            leaf = value.detach().to(device, dtype, copy=True).requires_grad_()
        leaves.append(leaf)
        return leaf.clone()
    if isinstance(value, Mapping):
        return {k: _to_leaves(v, device, dtype, leaves) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_to_leaves(v, device, dtype, leaves) for v in value)
    return value


def _arguments(model: nn.Module, example_input: Any) -> tuple[tuple, dict]:
    if isinstance(example_input, tuple):
        return example_input, {}
    if isinstance(example_input, dict):
        try:
            inspect.signature(model.forward).bind(**example_input)
            return (), example_input
        except TypeError:
            pass  # a forward that takes the dict itself, as timm's NaFlex models do
    return (example_input,), {}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from _tensors(v)
    elif isinstance(value, tuple | list):
        for v in value:
            yield from _tensors(v)
