"""Features of a model's paths and blocks, gathered by hooks while images pass through."""

import fnmatch
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from timm_rdp import Path
from timm_rdp.errors import UsageError, nearest

POOLS = ("mean", "max", "first")
INPUT = "(input)"


def blocks_of(model: nn.Module, paths: Sequence[Path]) -> dict[str, nn.Module]:
    """The modules that hold the paths' DropPaths, and others of their types, by name."""
    modules = dict(model.named_modules())
    owners = {path.name.partition("#")[0].rpartition(".")[0] for path in paths}
    kinds = {type(modules[name]) for name in owners}
    return {n: m for n, m in modules.items() if n and type(m) in kinds}


def choose(
    model: nn.Module, paths: Sequence[Path], wanted: Sequence[str] | None
) -> tuple[list[Path], dict[str, nn.Module]]:
    """The paths and modules to observe: all paths and blocks, or those that were asked for.

    Args:
        model: the model.
        paths: its paths.
        wanted: names, which may hold * for any text; paths come before modules of the same name.

    Raises:
        UsageError: the model has no path or module of that name.
    """
    if not wanted:
        return list(paths), blocks_of(model, paths)
    modules = {n: m for n, m in model.named_modules() if n}
    path_names = [path.name for path in paths]
    chosen: set[str] = set()
    others = {}
    for name in wanted:
        found = fnmatch.filter(path_names, name)
        chosen.update(found)
        if not found:
            found = fnmatch.filter(modules, name)
            others |= {n: modules[n] for n in found}
        if not found:
            close = nearest(name, [*path_names, *modules])
            raise UsageError(f"--layers {name}: the model has no such path or module{close}")
    return [path for path in paths if path.name in chosen], others


class Recorder:
    """Runs a model and keeps the pooled features of its paths and modules, over any batches.

    Args:
        model: in eval mode.
        paths: their outputs are what each adds to the residual stream.
        modules: their outputs, e.g. of blocks: the stream itself. What the first of them gets is
            kept as "(input)" where `with_input` is set.
        samples: how many will pass through; memory for them is taken once per layer, since small
            tensors kept batch by batch would pin the heap between the big ones that are freed.
        pool: how the positions of a feature map or token sequence become one value a channel:
            "mean", "max", or "first" (the class token where there is one).

    `paths` and `blocks` hold {name: (samples, width)} in the order of the forward pass, and
    `skipped` the names of layers whose output is no feature per image.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Sequence[Path],
        modules: dict[str, nn.Module],
        samples: int,
        pool: str = "mean",
        with_input: bool = True,
    ):
        self._model, self._modules, self._with_input = model, modules, with_input
        self._path_names = {(path.module, path.call): path.name for path in paths}
        self._samples, self._pool, self._seen = samples, pool, 0
        self.paths: dict[str, Tensor] = {}
        self.blocks: dict[str, Tensor] = {}
        self.skipped: set[str] = set()

    def __call__(self, x: Tensor) -> Any:
        """Run the model on a batch, (batch, C, H, W); returns the model's output."""
        calls = Counter()

        def after_path(module: nn.Module, _: tuple, output: Any) -> None:
            key: Any = (module, calls[module])
            calls[module] += 1
            if key in self._path_names:
                self._keep(self.paths, self._path_names[key], output, len(x))

        def before_block(_: nn.Module, inputs: tuple) -> None:
            if inputs and not calls[INPUT]:
                calls[INPUT] += 1
                self._keep(self.blocks, INPUT, inputs[0], len(x))

        def after_block(name: str, _: nn.Module, __: tuple, output: Any) -> None:
            call = f"#{calls[name]}" if calls[name] else ""
            calls[name] += 1
            self._keep(self.blocks, name + call, output, len(x))

        shared = {module for module, _ in self._path_names}
        hooks = [module.register_forward_hook(after_path) for module in shared]
        for name, module in self._modules.items():
            if self._with_input:
                hooks.append(module.register_forward_pre_hook(before_block))
            hooks.append(module.register_forward_hook(partial(after_block, name)))
        try:
            return self._model(x)
        finally:
            for hook in hooks:
                hook.remove()
            self._seen += len(x)

    def _keep(self, kept: dict[str, Tensor], name: str, output: Any, batch: int) -> None:
        while isinstance(output, tuple | list) and output:
            output = output[0]
        pooled = None
        if isinstance(output, Tensor) and name not in self.skipped:
            pooled = pool_features(output.detach(), batch, self._pool)
        if pooled is not None and name not in kept:
            kept[name] = torch.empty(self._samples, pooled.shape[1])
        if pooled is None or kept[name].shape[1] != pooled.shape[1]:
            self.skipped.add(name)
            kept.pop(name, None)
            return
        kept[name][self._seen : self._seen + batch] = pooled


def pool_features(features: Tensor, batch: int, pool: str = "mean") -> Tensor | None:
    """One row a sample: positions are pooled, channels stay.

    Args:
        features: (batch, channels, H, W), (batch, H, W, channels), (batch, channels, T, H, W),
            (batch, tokens, channels) or (batch, channels); where samples were cut into windows, a
            multiple of batch first.
        batch: number of samples.
        pool: "mean", "max" or "first".

    Returns:
        (batch, channels), or None where the first dimension does not count samples.

    Of a 4-d tensor the channels are the odd one out of the three sizes (feature maps are mostly
    square); where that does not tell, dimension 1.
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
def dropped(model: nn.Module, path: Path) -> Iterator[None]:
    """Within it the model runs as at inference, but with one path contributing exactly zero."""
    calls = Counter()

    def drop(_: nn.Module, __: tuple, output: Tensor) -> Tensor | None:
        calls[path] += 1
        # A full-size tensor of its own: many blocks add the shortcut in place.
        return torch.zeros_like(output) if calls[path] == path.call + 1 else None

    hooks = [
        model.register_forward_pre_hook(lambda *_: calls.clear()),
        path.module.register_forward_hook(drop),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
