"""Per-sample stochastic depth, without computing what it drops."""

import logging
from functools import partial
from typing import Any

from torch import nn

from timm_rdp.core.checks import why_none_is_called
from timm_rdp.core.drop_path import Hook, MaskedDropPath
from timm_rdp.core.foreign import patch, unpatch
from timm_rdp.core.paths import Path, PathGraph
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
        graph = trace_paths(model, example_input)
        if not graph.paths:
            raise ValueError(
                f"{type(model).__name__} has no path to skip: {why_none_is_called(graph)}"
            )
        self.model = model
        self.computed: dict[str, str] = {}
        self._hooks: list[Any] = []
        self._drop_paths = patch(model, graph.drop_paths, graph.calls_per_forward, self)
        modules = dict(model.named_modules())
        for path in graph.paths:
            if reason := _why_not(graph, path, modules):
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

    With "drawn" samples the masks have the same distribution and, with timm's own class, use the
    same random numbers; outputs are timm's up to floating-point tolerance (with dropout on the path
    in distribution, since what is not computed draws no dropout); compiled models compute all.
    With "fixed" each path keeps max(1, round(B * (1 - drop_prob))) of B samples, drawn without
    replacement, and is scaled so that its expectation is timm's: every update costs the same, and
    compiled models skip as well (as DINOv2 trains its ViTs; Oquab et al., arXiv 2304.07193).

    A path with batch statistics is left as it is, because they would be taken over other samples;
    so is one that drops whole batches. A deepcopy computes everything.

    Args:
        model: any module with DropPaths, not wrapped; patched in place until `detach()`.
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
            f"computed for the whole batch, as before: {first} because {reason}"
        )
    return handle


def _why_not(graph: PathGraph, path: Path, modules: dict[str, nn.Module]) -> str | None:
    if not path.kind.per_sample:
        return f"its {path.kind.type.__name__} keeps or drops the batch as a whole"
    for buffered in graph.dropped_buffers([path.name]):
        if any(b.startswith("running_") for b, _ in modules[buffered].named_buffers(recurse=False)):
            return f"{buffered} takes statistics over the batch"
    if not path.entrances:
        return "the model does not take a smaller batch there"
    return None
