"""One forward of a model without arithmetic, from whose autograd graph its paths are read."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from timm_rdp.core.drop_path import Kind, MaskedDropPath
from timm_rdp.core.foreign import find_drop_paths, patch
from timm_rdp.core.paths import Owner, PathGraph
from timm_rdp.core.stand_ins import device_of, on_stand_ins
from timm_rdp.core.trials import find_skippable
from timm_rdp.core.versions import input_size, not_compiled


def trace_paths(model: nn.Module, example_input: Any = None) -> PathGraph:
    """Run one forward of the model on stand-ins and read its paths off the autograd graph.

    The stand-ins are fake tensors, with which a forward takes no memory and no arithmetic; a model
    that needs values is run for real on copies of its tensors. It is the model itself that runs, so
    that closures, caches and the user's hooks do what they do in training. Afterwards it is what it
    was, and so is every random state.

    Args:
        model: any model with DropPath modules.
        example_input: a tensor (B, C, H, W), or the tuple / dict that the model's forward takes; by
            default of the size that the model says it takes.

    Raises:
        ValueError: the model cannot be run on the example input, or recomputes in a way that hides
            its graph; or what `find_drop_paths` refuses.
    """
    drop_paths = find_drop_paths(model)
    inputs = [example_input] if example_input is not None else list(_example_inputs(model))
    on_meta = any(p.is_meta for p in model.parameters())  # and so without values to copy
    failures: list[str] = []
    for fake in (True,) if on_meta else (True, False):
        failures.clear()
        for candidate in inputs:
            try:
                return _trace(model, drop_paths, candidate, fake)
            except _HiddenGraphError:
                raise
            except Exception as e:  # whatever a model may raise on an input that it cannot take
                failures.append(f"{type(e).__name__}: {e}".splitlines()[0])
    given = "example_input" if example_input is not None else "an image of its default size"
    raise ValueError(
        f"{type(model).__name__} cannot be traced with {given} ({failures[0]}); "
        "pass example_input, the input that its forward takes"
    )


class _HiddenGraphError(ValueError):
    pass


def _trace(
    model: nn.Module, drop_paths: dict[str, Kind], example_input: Any, fake: bool
) -> PathGraph:
    parameters = dict(model.named_parameters())
    device = device_of(model)
    dtype = next((p.dtype for p in parameters.values() if p.is_floating_point()), torch.float32)
    leaves: list[Tensor] = []

    def run() -> Any:
        to_leaf = partial(_to_leaf, device=device, dtype=dtype, leaves=leaves)
        args, kwargs = _arguments(model, tree_map(to_leaf, example_input))
        return model(*args, **kwargs)

    with (
        on_stand_ins(model, fake),
        not_compiled(),
        torch.autocast(device.type, enabled=False),
        torch.enable_grad(),
    ):
        _prepare(model)
        # They hand on what they get: some would cut the graph at random.
        for module in patch(model, drop_paths, {}, owner=model).values():
            module.decide([1.0])
        calls, nodes, hooks = _watch(model)
        output = run()
        for hook in hooks:
            hook.remove()
        graph = _condense(model, drop_paths, parameters, output, calls, nodes, leaves)
        del output  # the largest part of what a real forward holds
        if not graph.depends_on_input:
            raise _HiddenGraphError(
                f"the output of {type(model).__name__} does not depend on a floating-point input: "
                "pass an example_input that it is differentiable in"
            )
        entrances = find_skippable(graph, model, run, [shape for _, _, shape in calls])
    graph.paths = tuple(replace(p, entrances=entrances.get(p.name, ())) for p in graph.paths)
    return graph


def _prepare(model: nn.Module) -> None:
    """Make the model ready to be traced: in train mode, eager and by itself."""
    model.train()
    for module in model.modules():
        # What wraps the inputs of backward hooks would join graphs that have nothing in common.
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if str(getattr(hook, "__module__", "")).startswith("torch.distributed"):
                    del hooks[key]  # it would communicate
        vars(module)["_compiled_call_impl"] = None
        if isinstance(module, nn.SyncBatchNorm):
            vars(module)["training"] = False  # else it runs on a GPU only, and between processes
        elif isinstance(module, nn.RNNBase):
            vars(module)["forward"] = partial(_one_step, module, module.forward)


def _one_step(module: nn.RNNBase, forward: Callable[..., tuple], *args: Any, **kwargs: Any) -> Any:
    """What an LSTM or its like makes of the first step of a sequence, for every step.

    A step without arithmetic costs as much as any layer, and all depend on the same parameters.
    """
    if not args or not isinstance(args[0], Tensor):
        return forward(*args, **kwargs)  # a PackedSequence, say
    sequence, *more = args
    dim = 1 if module.batch_first and sequence.ndim == 3 else 0
    output, state = forward(sequence.narrow(dim, 0, 1), *more, **kwargs)
    return output.repeat_interleave(sequence.shape[dim], dim), state


def _watch(model: nn.Module) -> tuple[list[tuple], dict[Owner, tuple[list, list]], list]:
    """What the coming forward writes to, and the hooks by which it does.

    These are the DropPaths' calls, with the node and the shape of what each returned; and the
    modules that own something, with the nodes of their inputs and of their outputs. An input that
    is a parameter (of a parametrization) has no node, and is there as its id.
    """
    calls: list[tuple] = []
    nodes: dict[Owner, tuple[list, list]] = {}
    hooks = []
    for name, module in model.named_modules():
        owner = Owner(name, buffered=bool([*module.buffers(recurse=False)]))

        def note(_: nn.Module, __: tuple, output: Tensor, name: str = name) -> Tensor:
            output = output * 1.0  # a node of its own
            calls.append((name, output.grad_fn, tuple(output.shape)))
            return output

        def before(_: nn.Module, args: tuple, kwargs: dict, owner: Owner = owner) -> None:
            owner.calls += 1
            nodes[owner][0].extend(t.grad_fn or id(t) for t in _tensors((args, kwargs)))

        def after(_: nn.Module, __: tuple, output: Any, owner: Owner = owner) -> None:
            nodes[owner][1].extend(t.grad_fn for t in _tensors(output))

        if isinstance(module, MaskedDropPath):
            hooks.append(module.register_forward_hook(note, prepend=True))
        elif owner.buffered or [*module.parameters(recurse=False)]:
            nodes[owner] = [], []
            hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.append(module.register_forward_hook(after, prepend=True))
    return calls, nodes, hooks


def _condense(
    model: nn.Module,
    drop_paths: dict[str, Kind],
    parameters: dict[str, nn.Parameter],
    output: Any,
    calls: list[tuple],
    nodes: dict[Owner, tuple[list, list]],
    leaves: list[Tensor],
) -> PathGraph:
    # What a bit stands for is known by its node in the graph, or by its id if it is a leaf. Of a
    # parameter there may be two, as a closure may have kept the one that another stands in for.
    known: list[list] = [[id(p), id(parameters[name])] for name, p in model.named_parameters()]
    known += [*(outputs for _, outputs in nodes.values()), *([id(leaf)] for leaf in leaves)]
    bits: dict[Any, int] = {}
    for bit, keys in enumerate(known, start=len(calls)):
        for key in keys:
            bits[key] = bits.get(key, 0) | 1 << bit
    path_of = {node: i for i, (_, node, _) in enumerate(calls) if node is not None}
    roots = [t.grad_fn for t in _tensors(output) if t.grad_fn is not None]
    reached, behind = _reach(roots, path_of, len(calls), bits)
    for owner, (inputs, _) in nodes.items():
        for node in inputs:
            owner.behind_input |= behind.get(node, bits.get(node, 0))
    called = [name for name, _, _ in calls]
    return PathGraph(model, drop_paths, called, list(parameters), [*nodes], reached)


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
                    "the model checkpoints with use_reentrant=True, which hides its graph: call "
                    "timm.layers.set_reentrant_ckpt(False), or use torch.utils.checkpoint with "
                    "use_reentrant=False"
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


def _example_inputs(model: nn.Module) -> Iterator[Tensor]:
    """Images (2, C, H, W) that the model may take, the likeliest first."""
    first = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    shapes = []
    for module in model.modules():  # the model itself comes first
        config = getattr(module, "config", None)  # Hugging Face's
        size = getattr(module, "img_size", getattr(config, "image_size", None))
        if isinstance(getattr(module, "pretrained_cfg", None), Mapping):
            channels, *size = input_size(module)
            shapes += [(channels, *size), (first, *size)]
        elif isinstance(size, int):
            shapes.append((first, size, size))
        elif isinstance(size, tuple | list) and len(size) == 2:
            shapes.append((first, *size))
    shapes += [(3, 224, 224), (first, 224, 224)]
    for shape in dict.fromkeys(shapes):
        yield torch.empty((2, *shape), device="meta")


def _to_leaf(value: Any, device: torch.device, dtype: torch.dtype, leaves: list[Tensor]) -> Any:
    """A part of the example input on `device`; computed from a new leaf if it is of floats."""
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        return value.to(device, copy=True)
    if value.is_meta:
        leaf = torch.zeros(value.shape, dtype=dtype, device=device)
    else:
        leaf = value.detach().to(device, dtype, copy=True)
    leaves.append(leaf.requires_grad_())
    return leaf.clone()


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


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
