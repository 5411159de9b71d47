"""One forward of a copy of the model, from whose autograd graph its paths are read."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.models import get_model_input_config
from torch import Tensor, nn

from timm_rdp.core.paths import Owner, PathGraph
from timm_rdp.core.trials import find_skippable


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
    failures: list[str] = []
    for device in ("meta",) if on_meta else ("meta", "cpu"):
        failures.clear()
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

    _noted: list[tuple[DropPath, Any, tuple[int, ...]]]  # module, node, and shape, in call order

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1.0
        self._noted.append((self, y.grad_fn, tuple(x.shape)))
        return y


def _trace_on(device: torch.device, model: nn.Module, example_input: Any) -> PathGraph:
    traced = _copy_to(device, model)
    calls = _prepare(traced, device)
    owners, hooks = _watch_owners(traced)
    floats = (p.dtype for p in traced.parameters() if p.is_floating_point())
    dtype = next(floats, torch.float32)
    leaves: list[Tensor] = []

    def run() -> Any:
        with (
            torch.random.fork_rng(devices=[]),
            torch.autocast(device_type="cpu", enabled=False),
            torch.enable_grad(),
            torch.device(device),
        ):
            args, kwargs = _arguments(traced, _to_leaves(example_input, device, dtype, leaves))
            return traced(*args, **kwargs)

    output = run()
    for hook in hooks:
        hook.remove()
    graph = _condense(model, traced, output, calls, owners, leaves)
    if not graph.depends_on_input:
        raise _HiddenGraphError(
            f"the output of {type(model).__name__} does not depend on a floating-point input: "
            "pass an example_input that it is differentiable in"
        )
    entrances = find_skippable(graph, traced, run, [(module, shape) for module, _, shape in calls])
    graph.paths = tuple(replace(p, entrances=entrances.get(p.name, ())) for p in graph.paths)
    return graph


def _prepare(
    traced: nn.Module, device: torch.device
) -> list[tuple[DropPath, Any, tuple[int, ...]]]:
    """Make the copy of a model ready to be traced; the list that its DropPaths write to."""
    traced.train()
    getattr(traced, "set_grad_checkpointing", lambda enable: None)(False)
    calls: list[tuple[DropPath, Any, tuple[int, ...]]] = []
    for module in traced.modules():
        _drop_hooks(module)
        if isinstance(module, DropPath):
            module.__class__ = _TracedDropPath
            vars(module)["_noted"] = calls
        elif isinstance(module, nn.SyncBatchNorm):
            module.training = False  # in train mode it runs on a GPU only, and between processes
        elif isinstance(module, nn.RNNBase) and device.type == "meta":
            module.forward = partial(_one_step, module, module.forward)
    for parameter in traced.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(True)
    return calls


def _condense(
    model: nn.Module,
    traced: nn.Module,
    output: Any,
    calls: list[tuple[DropPath, Any, tuple[int, ...]]],
    owners: list[Owner],
    leaves: list[Tensor],
) -> PathGraph:
    parameters = dict(traced.named_parameters())
    # The bits of PathGraph: of a leaf by its tensor, of a module by the node of its output.
    bits: dict[Any, int] = {}
    for i, parameter in enumerate(parameters.values(), start=len(calls)):
        bits[id(parameter)] = 1 << i
    for i, owner in enumerate(owners, start=len(calls) + len(parameters)):
        for node in owner.outputs:
            bits[node] = bits.get(node, 0) | 1 << i
    bits.update({id(leaf): 1 << (len(calls) + len(parameters) + len(owners)) for leaf in leaves})
    path_of = {node: i for i, (_, node, _) in enumerate(calls) if node is not None}
    roots = [t.grad_fn for t in _tensors(output) if t.grad_fn is not None]
    reached, behind = _reach(roots, path_of, len(calls), bits)
    for owner in owners:
        for node in owner.inputs:
            owner.behind_input |= behind.get(node, 0)
    names = {module: name for name, module in traced.named_modules()}
    called = [names[module] for module, _, _ in calls]
    return PathGraph(model, called, list(parameters), owners, reached)


def _watch_owners(model: nn.Module) -> tuple[list[Owner], list]:
    """Note the graph nodes of the inputs and outputs of the modules that own something."""
    owners, hooks = [], []
    for name, module in model.named_modules():
        buffered = bool([*module.buffers(recurse=False)])
        if not buffered and not [*module.parameters(recurse=False)]:
            continue
        owner = Owner(name, buffered)

        def before(_: nn.Module, args: tuple, kwargs: dict, owner: Owner = owner) -> None:
            owner.calls += 1
            owner.inputs += [t.grad_fn for t in _tensors((args, kwargs))]

        def after(_: nn.Module, __: tuple, output: Any, owner: Owner = owner) -> None:
            owner.outputs += [t.grad_fn for t in _tensors(output)]

        owners.append(owner)
        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after))
    return owners, hooks


def _one_step(module: nn.RNNBase, forward: Callable[..., tuple], *args: Any, **kwargs: Any) -> Any:
    """What an LSTM or its like makes of the first step of a sequence, for every step.

    On meta a step costs as much as any layer, and all steps depend on the same parameters.
    """
    if not args or not isinstance(args[0], Tensor):
        return forward(*args, **kwargs)  # a PackedSequence, say
    sequence, *more = args
    dim = 1 if module.batch_first and sequence.ndim == 3 else 0
    output, state = forward(sequence.narrow(dim, 0, 1), *more, **kwargs)
    return output.repeat_interleave(sequence.shape[dim], dim), state


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


def _drop_hooks(module: nn.Module) -> None:
    """Keep the hooks that compute weights; a user's own must not see the copy."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for hooks in (getattr(module, kind) for kind in kinds):
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
