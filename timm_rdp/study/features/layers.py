"""Features of a model's paths and blocks, gathered by hooks while images pass through."""

import fnmatch
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from timm_rdp import Path
from timm_rdp.errors import UsageError, nearest

POOLS = ("mean", "max", "first")
INPUT = "(input)"


def choose(
    model: nn.Module, paths: Sequence[Path], wanted: Sequence[str] | None
) -> tuple[list[Path], dict[str, nn.Module]]:
    """The paths and modules of a model to observe: all paths and blocks, or those wanted.

    The names wanted may hold * for any text; paths come before modules of the same name.
    """
    modules = {n: m for n, m in model.named_modules() if n}
    if not wanted:  # blocks hold the paths' DropPaths, or are of the same types
        owners = {path.name.partition("#")[0].rpartition(".")[0] for path in paths}
        kinds = {type(model.get_submodule(name)) for name in owners}
        return list(paths), {n: m for n, m in modules.items() if type(m) in kinds}
    path_names = [path.name for path in paths]
    chosen: set[str] = set()
    others = {}
    for name in wanted:
        if found := fnmatch.filter(path_names, name):
            chosen.update(found)
        elif found := fnmatch.filter(modules, name):
            others |= {n: modules[n] for n in found}
        else:
            close = nearest(name, [*path_names, *modules])
            raise UsageError(f"--layers {name}: the model has no such path or module{close}")
    return [path for path in paths if path.name in chosen], others


@torch.no_grad()
def run_observed(
    model: nn.Module,
    x: Tensor,
    paths: Sequence[Path],
    modules: dict[str, nn.Module],
    pool: str = "mean",
    with_input: bool = True,
) -> tuple[Any, dict[tuple[str, str], Tensor | None]]:
    """Run a model in eval mode on a batch and pool what its paths and modules put out.

    Args:
        paths: their outputs are what each adds to the residual stream.
        modules: their outputs, e.g. of blocks: the stream itself.
        with_input: also what the first of the modules gets, as "(input)".

    Returns:
        the model's output, and {("paths" or "blocks", name): (batch, width)} in the order of the
        forward pass, None where the output is no feature per image
    """
    path_names: dict[Any, str] = {(path.module, path.call): path.name for path in paths}
    block_names = {module: name for name, module in modules.items()}
    calls: Counter[nn.Module] = Counter()
    features: dict[tuple[str, str], Tensor | None] = {}

    def keep(kind: str, name: str, output: Any) -> None:
        while isinstance(output, tuple | list) and output:
            output = output[0]
        pooled = pool_features(output, len(x), pool) if isinstance(output, Tensor) else None
        features[kind, name] = pooled

    def before(_: nn.Module, inputs: tuple) -> None:
        if inputs and ("blocks", INPUT) not in features:
            keep("blocks", INPUT, inputs[0])

    def after(module: nn.Module, _: tuple, output: Any) -> None:
        call, calls[module] = calls[module], calls[module] + 1
        if (module, call) in path_names:
            keep("paths", path_names[module, call], output)
        if module in block_names:
            keep("blocks", block_names[module] + (f"#{call}" if call else ""), output)

    with ExitStack() as hooks:
        for module in {*block_names, *(path.module for path in paths)}:
            hooks.enter_context(module.register_forward_hook(after))
        for module in block_names if with_input else ():
            hooks.enter_context(module.register_forward_pre_hook(before))
        return model(x), features


def pool_features(features: Tensor, batch: int, pool: str = "mean") -> Tensor | None:
    """One row a sample: positions are pooled ("first" takes the class token), channels stay.

    Features are (batch, channels, H, W), (batch, H, W, channels), (batch, channels, T, H, W),
    (batch, tokens, channels) or (batch, channels); where samples were cut into windows, a multiple
    of batch first. Of a 4-d tensor the channels are the odd one out of the three sizes (feature
    maps are mostly square); where that does not tell, dimension 1. None where the first dimension
    does not count samples.
    """
    if features.ndim < 2 or len(features) == 0 or len(features) % batch:
        return None
    _, *sizes = features.shape
    channels_last = len(sizes) == 3 and sizes[0] == sizes[1] != sizes[2]
    if len(sizes) in (3, 4) and not channels_last:
        features = features.movedim(1, -1)
    features = features.reshape(batch, -1, features.shape[-1])
    if pool == "first":
        return features[:, 0].clone()
    return features.amax(1) if pool == "max" else features.mean(1)


@contextmanager
def dropped(model: nn.Module, *paths: Path) -> Iterator[None]:
    """Within it the model runs as at inference, but with paths contributing exactly zero."""
    calls: Counter[nn.Module] = Counter()
    chosen: set[Any] = {(path.module, path.call) for path in paths}

    def drop(module: nn.Module, _: tuple, output: Tensor) -> Tensor | None:
        call, calls[module] = calls[module], calls[module] + 1
        # A full-size tensor of its own: many blocks add the shortcut in place.
        return torch.zeros_like(output) if (module, call) in chosen else None

    with ExitStack() as hooks:
        hooks.enter_context(model.register_forward_pre_hook(lambda *_: calls.clear()))
        for module in {path.module for path in paths}:
            hooks.enter_context(module.register_forward_hook(drop))
        yield
