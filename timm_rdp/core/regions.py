"""Compiling a model by regions: one by one, the smallest modules that hold its paths.

What a region's DropPaths do is constant in its graphs: what is dropped is not in them, what is
frozen has no backward pass, and regions of one kind share them. However many masks come, a kind has
no more graphs than its own few paths have states.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from timm_rdp.core.drop_path import MaskedDropPath
from timm_rdp.core.paths import Path, PathGraph
from timm_rdp.core.versions import allow_graphs, blocks_share_graphs, guards_on_freezing

_logger = logging.getLogger(__name__)

_MOST_PATHS = 4  # in one region, whose graphs their states multiply
_GRAPHS = 128  # that dynamo may make of one function before it runs it as it was written


class Region:
    """The compiled call of a module, within which BatchNorms of what is dropped rest.

    Attributes:
        resting: modules to be in eval mode whenever the region runs.
    """

    def __init__(self, module: nn.Module, compiled: Callable[..., Any]):
        self.module = module
        self.resting: list[nn.Module] = []
        self._compiled = compiled
        self._hooks: OrderedDict[int, Callable] = OrderedDict()
        self._parameters = [*module.parameters()]
        self._drop_paths = [m for m in module.modules() if isinstance(m, MaskedDropPath)]
        module._compiled_call_impl = self  # copies and pickles leave it out

    def register_forward_pre_hook(self, hook: Callable, prepend: bool = False) -> RemovableHandle:
        """As that of a module; the hook is not compiled."""
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for hook in [*self._hooks.values()]:
            hook(self.module, args)
        resting = [m for m in self.resting if m.training]
        trained = "".join("01"[p.requires_grad] for p in self._parameters)
        for drop_path in self._drop_paths:
            vars(drop_path)["_trained"] = trained
        try:
            for module in resting:
                module.training = False
            return self._compiled(*args, **kwargs)
        finally:
            for module in resting:
                module.training = True

    def remove(self) -> None:
        """Leave the module compiled, but know nothing of its paths."""
        self.module._compiled_call_impl = self._compiled


def find_regions(model: nn.Module, graph: PathGraph) -> dict[str, tuple[str, ...]]:
    """The modules to compile one by one, and the names of the paths that each of them holds.

    A path's region is the smallest module that is called and holds its DropPath and its entrance. A
    path that has none, because that would be the model or a part with many paths, is left out.
    """
    if not blocks_share_graphs():
        return {}
    modules = dict(model.named_modules())
    wanted = {p: _around(modules, graph, p) for p in graph.paths if p.residual}
    regions: dict[str, tuple[str, ...]] = {}
    for name in sorted(set(wanted.values()) - {""}, key=len):
        inside = tuple(p.name for p, region in wanted.items() if _is_within(region, name))
        if len(inside) <= _MOST_PATHS and not any(_is_within(name, r) for r in regions):
            regions[name] = inside
    return regions


def compile_regions(model: nn.Module, graph: PathGraph, options: dict[str, Any]) -> None:
    """Compile the regions of a model in place, or else the whole; options as of torch.compile."""
    if "reduce-overhead" in (mode := str(options.get("mode"))) or mode == "max-autotune":
        raise ValueError(
            f"mode={mode!r} records CUDA graphs, which change with what is dropped: use "
            '"max-autotune-no-cudagraphs" or "default"'
        )
    names = find_regions(model, graph)
    if not names:
        return model.compile(**options)
    allow_graphs(_GRAPHS)
    kinds = {type(model.get_submodule(n)) for n in names if guards_on_freezing()}
    done: list[str] = []
    for name, module in model.named_modules():  # blocks of their kind without a path too
        if (name in names or type(module) in kinds) and not any(_is_within(name, d) for d in done):
            # A size of its own is worth a graph: widths differ between stages, batches seldom do.
            module.compile(**{"dynamic": False, **options})
            done.append(name)


def tell_of_regions(model: nn.Module, graph: PathGraph) -> None:
    """Say what a model that was compiled as a whole does for nothing, if it need not."""
    if paths := sum(map(len, find_regions(model, graph).values())):
        _logger.warning(
            f"compiled as a whole, {type(model).__name__} computes dropped paths and gradients of "
            f"what is frozen, to discard them: rdp.compile() instead saves that for {paths} paths"
        )


def region_of(name: str, regions: Mapping[str, Region]) -> Region | None:
    """The region that a module belongs to, by its name."""
    return next((r for n, r in regions.items() if _is_within(name, n)), None)


def compiled_regions(model: nn.Module, graph: PathGraph) -> dict[str, Region] | None:
    """The modules of a model that are compiled and hold paths, by name, made its regions.

    None where one of them is the model itself or holds so many that it cannot be a region.
    """
    most = _MOST_PATHS if blocks_share_graphs() else 0
    compiled = {n: m for n, m in model.named_modules() if m._compiled_call_impl is not None}
    outermost = [n for n in compiled if sum(_is_within(n, other) for other in compiled) == 1]
    regions = {}
    for name in outermost:
        inside = sum(_is_within(p.name.partition("#")[0], name) for p in graph.paths)
        if inside and (not name or inside > most):
            return None
        call = compiled[name]._compiled_call_impl
        if inside and call is not None:
            regions[name] = call if isinstance(call, Region) else Region(compiled[name], call)
    return regions


def _around(modules: dict[str, nn.Module], graph: PathGraph, path: Path) -> str:
    """Name of the smallest module that is called and holds a path."""
    name = path.name.partition("#")[0]
    owners = [n.rpartition(".")[0] for n in path.parameters]
    inside = graph.entrances(path.name) or owners
    while name and (
        modules[name] is path.module
        or isinstance(modules[name], nn.ModuleList | nn.ModuleDict)
        or not all(_is_within(n, name) for n in inside)
    ):
        name = name.rpartition(".")[0]
    return name


def _is_within(name: str, region: str) -> bool:
    return not region or f"{name}.".startswith(f"{region}.")
