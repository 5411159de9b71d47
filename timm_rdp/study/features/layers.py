"""Features of a model's paths and blocks, gathered by hooks while images pass through."""

import contextlib
import difflib
import fnmatch
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from timm_rdp import Path
from timm_rdp.errors import UsageError

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
    blocks = blocks_of(model, paths)
    if not wanted:
        return list(paths), blocks
    modules = {n: m for n, m in model.named_modules() if n}
    by_name = {path.name: path for path in paths}
    chosen, others = {}, {}
    for name in wanted:
        found = fnmatch.filter(by_name, name)
        chosen |= {n: by_name[n] for n in found}
        if not found:
            found = fnmatch.filter(modules, name)
            others |= {n: modules[n] for n in found}
        if not found:
            known = list(dict.fromkeys([*by_name, *blocks, *modules]))
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
            raise UsageError(
                f"--layers {name}: the model has no such path or module; "
                f"did you mean {', '.join(near)}?"
            )
    return [path for path in paths if path.name in chosen], others


class Recorder:
    """Keeps the pooled features of paths and modules over any number of batches.

    Args:
        model: in eval mode.
        paths: their outputs are what each adds to the residual stream.
        modules: their outputs, e.g. of blocks: the stream itself. What the first of them gets is
            kept as "(input)" where `with_input` is set.
        samples: how many will pass through; memory for them is taken once per layer, since small
            tensors kept batch by batch would pin the heap between the big ones that are freed.
        pool: how the positions of a feature map or token sequence become one value a channel:
            "mean", "max", or "first" (the class token where there is one).

    Use as a context manager; afterwards `paths` and `blocks` hold {name: (samples, width)} in the
    order of the forward pass, and `skipped` the names of layers whose output is no feature per
    image.
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
        self._model = model
        self._path_names = {(path.module, path.call): path.name for path in paths}
        self._modules = modules
        self._pool = pool
        self._with_input = with_input
        self._on = True
        self._waiting = False
        self._batch = 0
        self._calls: dict[nn.Module, int] = {}
        self._samples = samples
        self._seen = 0
        self.paths: dict[str, Tensor] = {}
        self.blocks: dict[str, Tensor] = {}
        self._hooks: list = []
        self.skipped: set[str] = set()

    def __enter__(self) -> "Recorder":
        self._hooks = [self._model.register_forward_pre_hook(self._start)]
        for module in {module for module, _ in self._path_names}:
            self._hooks.append(module.register_forward_hook(self._path))
        for name, module in self._modules.items():
            if self._with_input:
                self._hooks.append(module.register_forward_pre_hook(self._first))
            self._hooks.append(module.register_forward_hook(self._block(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for name in self.skipped:
            self.paths.pop(name, None)
            self.blocks.pop(name, None)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it nothing is kept."""
        self._on = False
        try:
            yield
        finally:
            self._on = True

    def _start(self, _: nn.Module, inputs: tuple) -> None:
        self._calls = {}
        if not self._on:
            return
        self._seen += self._batch
        self._batch = len(inputs[0])
        self._waiting = self._with_input

    def _path(self, module: nn.Module, _: tuple, output: Tensor) -> None:
        call = self._calls.get(module, 0)
        self._calls[module] = call + 1
        if (module, call) in self._path_names:
            self._keep(self.paths, self._path_names[module, call], output)

    def _first(self, _: nn.Module, inputs: tuple) -> None:
        if self._waiting and inputs:
            self._waiting = False
            self._keep(self.blocks, INPUT, inputs[0])

    def _block(self, name: str):
        def hook(module: nn.Module, _: tuple, output: Tensor | Sequence) -> None:
            call = self._calls.get(module, 0)
            self._calls[module] = call + 1
            self._keep(self.blocks, f"{name}#{call}" if call else name, output)

        return hook

    def _keep(self, kept: dict[str, Tensor], name: str, output: Tensor | Sequence) -> None:
        if not self._on:
            return
        while isinstance(output, tuple | list) and output:
            output = output[0]
        pooled = None
        if isinstance(output, Tensor):
            pooled = pool_features(output.detach(), self._batch, self._pool)
        if pooled is None:
            self.skipped.add(name)
            return
        if name not in kept:
            kept[name] = torch.empty(self._samples, pooled.shape[1])
        if kept[name].shape[1] != pooled.shape[1]:
            self.skipped.add(name)
            return
        kept[name][self._seen : self._seen + self._batch] = pooled


def pool_features(features: Tensor, batch: int, pool: str = "mean") -> Tensor | None:
    """One row a sample: positions are pooled, channels stay.

    Args:
        features: (batch, channels, H, W), (batch, H, W, channels), (batch, tokens, channels) or
            (batch, channels); where samples were cut into windows, a multiple of batch first.
        batch: number of samples.
        pool: "mean", "max" or "first".

    Returns:
        (batch, channels), or None where the first dimension does not count samples.

    Of a 4-d tensor the channels are the odd one out of the three sizes (feature maps are mostly
    square); where that does not tell, dimension 1.
    """
    if features.ndim < 2 or len(features) == 0 or len(features) % batch:
        return None
    if features.ndim == 4:
        _, a, b, c = features.shape
        if not (a == b and b != c):
            features = features.movedim(1, -1)
    elif features.ndim == 5:  # video and windowed maps: (B, C, T, H, W)
        features = features.movedim(1, -1)
    features = features.reshape(batch, -1, features.shape[-1])
    if pool == "first":
        return features[:, 0].clone()
    return features.amax(1) if pool == "max" else features.mean(1)


@contextlib.contextmanager
def dropped(model: nn.Module, path: Path) -> Iterator[None]:
    """Within it the model runs as at inference, but with one path contributing exactly zero."""
    call = 0

    def start(*_: object) -> None:
        nonlocal call
        call = 0

    def drop(_: nn.Module, __: tuple, output: Tensor) -> Tensor | None:
        nonlocal call
        call += 1
        # A full-size tensor of its own: many blocks add the shortcut in place.
        return torch.zeros_like(output) if call == path.call + 1 else None

    hooks = [model.register_forward_pre_hook(start), path.module.register_forward_hook(drop)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
