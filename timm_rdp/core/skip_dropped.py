"""timm's own per-sample stochastic depth, without computing what it drops."""

import logging
from functools import partial
from typing import Any

from torch import nn

from timm_rdp.core.checks import find_drop_paths, why_none_is_called
from timm_rdp.core.drop_path import Hook, MaskedDropPath, patch, unpatch
from timm_rdp.core.paths import PathGraph
from timm_rdp.core.trace import trace_paths

SAMPLES = ("drawn", "fixed")

_logger = logging.getLogger(__name__)


class SkipDropped:
    """What `skip_dropped` did to a model, and how to take it back.

    Attributes:
        skipped: names of the paths that are computed for the kept samples only.
        computed: for every other path, by name, why it is computed for the whole batch.
    """

    def __init__(self, model: nn.Module, example_input: Any = None, samples: str = "drawn"):
        if samples not in SAMPLES:
            raise ValueError(f"samples={samples!r}: must be one of {', '.join(SAMPLES)}")
        drop_paths = find_drop_paths(model)
        graph = trace_paths(model, example_input)
        if not graph.paths:
            raise ValueError(
                f"{type(model).__name__} has no path to skip: {why_none_is_called(model)}"
            )
        self.model = model
        self.computed: dict[str, str] = {}
        self._hooks: list[Any] = []
        self._drop_paths = patch(drop_paths, graph.calls_per_forward, self)
        modules = dict(model.named_modules())
        for path in graph.paths:
            if reason := _why_not(graph, path.name, path.entrances, modules):
                self.computed[path.name] = reason
                continue
            assert isinstance(path.module, MaskedDropPath)
            for i, name in enumerate(path.entrances):
                pass_on = path.module.pass_on_kept_samples
                hook = Hook(partial(pass_on, path.call, i, samples == "fixed"))
                self._hooks.append(modules[name].register_forward_pre_hook(hook))
        self.skipped = tuple(p.name for p in graph.paths if p.name not in self.computed)

    def detach(self) -> nn.Module:
        """Give the model its original classes back, remove every hook, and return it."""
        for hook in self._hooks:
            hook.remove()
        unpatch(self._drop_paths)
        self._hooks, self._drop_paths = [], {}
        return self.model


def skip_dropped(
    model: nn.Module, example_input: Any = None, samples: str = "drawn"
) -> SkipDropped:
    """Make timm's per-sample DropPath compute, on each path, only the samples that it keeps.

    With "drawn" samples the masks have the same distribution and use the same random numbers as
    timm's, and outputs are timm's up to floating-point tolerance (with dropout on the path in
    distribution, since what is not computed draws no dropout); compiled models compute everything.
    With "fixed" each path keeps max(1, round(B * (1 - drop_prob))) of B samples, drawn without
    replacement, and is scaled so that its expectation is timm's: every update costs the same, and
    compiled models skip as well (as DINOv2 trains its ViTs; Oquab et al., arXiv 2304.07193).

    A path with batch statistics is left to timm, because they would be taken over other samples.
    A deepcopy computes everything.

    Args:
        model: any module with timm DropPaths, not wrapped; patched in place until `detach()`.
        example_input: see ResidualDropPath.
        samples: "drawn" or "fixed".

    Raises:
        ValueError: the model has no DropPath, cannot be traced or is already patched.
    """
    handle = SkipDropped(model, example_input, samples)
    if handle.computed:
        first, reason = next(iter(handle.computed.items()))
        _logger.warning(
            f"{len(handle.computed)} of {len(handle.computed) + len(handle.skipped)} paths are "
            f"computed for the whole batch, as timm does: {first} because {reason}"
        )
    return handle


def _why_not(
    graph: PathGraph, name: str, entrances: tuple[str, ...], modules: dict[str, nn.Module]
) -> str | None:
    for buffered in graph.dropped_buffers([name]):
        if any(b.startswith("running_") for b, _ in modules[buffered].named_buffers(recurse=False)):
            return f"{buffered} takes statistics over the batch"
    if not entrances:
        return "the model does not take a smaller batch there"
    return None
