"""Which paths need not be run when they are dropped: found by trying it out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from timm_rdp.core.paths import PathGraph
from timm_rdp.core.skip import SkippingDropPath, pass_on_one_sample, zeros_for_batch

# Trial forwards for one model, at the most: a model whose paths fail one by one is left alone.
_MAX_TRIALS = 32


@dataclass(eq=False)
class _Candidate:
    """A path that may be one that can be skipped."""

    name: str
    drop_path: "_TrialDropPath"
    call: int
    shape: tuple[int, ...]  # of what its DropPath is handed
    entrances: tuple[str, ...]
    kind: tuple  # equal for paths in blocks of one make


class _TrialDropPath(SkippingDropPath):
    """Returns the zeros of a dropped path if it is handed one sample of the batch."""

    _call: int
    _dropped: dict[int, tuple[_Candidate, list[_Candidate]]]  # by call; and the paths under way

    def forward(self, x: Tensor) -> Tensor:
        call = self._call
        self._call += 1
        if call not in self._dropped:
            return x
        candidate, under_way = self._dropped[call]
        batch, memory_format = self._batch.get(call, (0, torch.contiguous_format))
        if candidate in under_way:
            under_way.remove(candidate)
        if x.shape[0] != 1 or (batch, *x.shape[1:]) != candidate.shape:
            under_way.append(candidate)
            raise ValueError(f"{candidate.name} was not handed one sample")
        return zeros_for_batch(x, batch, memory_format)


def find_skippable(
    graph: PathGraph,
    model: nn.Module,
    run: Callable[[], object],
    calls: Sequence[tuple[DropPath, tuple[int, ...]]],
) -> dict[str, tuple[str, ...]]:
    """The residual paths that can be dropped without being run, and their entrances, by name.

    All are tried together, and those that turn out not to take it are left out one by one; where a
    second one of a kind does not, the others of its kind are left out with it.

    Args:
        graph: the model's paths.
        model: a copy of the model that may be changed, in train mode.
        run: runs it on an example of at least two samples.
        calls: per path its DropPath in `model`, and the shape that it is handed.
    """
    groups = [_candidates(graph, model, calls)]
    skippable: dict[str, tuple[str, ...]] = {}
    failed_kinds = set()
    trials = 0
    while groups and trials < _MAX_TRIALS:
        group = groups.pop()
        if not group:
            continue
        trials += 1
        failed, culprit = _try(graph, model, run, group)
        if not failed:
            skippable.update({c.name: c.entrances for c in group})
        elif culprit is not None:
            kind = culprit.kind if culprit.kind in failed_kinds else None
            groups.append([c for c in group if c is not culprit and c.kind != kind])
            failed_kinds.add(culprit.kind)
        elif half := len(group) // 2:
            groups += [group[half:], group[:half]]
    return skippable


def _candidates(
    graph: PathGraph, model: nn.Module, calls: Sequence[tuple[DropPath, tuple[int, ...]]]
) -> list[_Candidate]:
    kinds = {}
    for module in model.modules():
        if isinstance(module, DropPath):
            module.__class__ = _TrialDropPath
        for attribute, child in module.named_children():
            if isinstance(child, DropPath):
                kinds[child] = (attribute, *((n, type(m)) for n, m in module.named_modules()))
    candidates = []
    for path, (module, shape) in zip(graph.paths, calls, strict=True):
        assert isinstance(module, _TrialDropPath)
        entrances = graph.entrances(path.name)
        if path.residual and shape[0] > 1 and entrances:
            kind = (path.call, *kinds[module])
            candidates.append(_Candidate(path.name, module, path.call, shape, entrances, kind))
    return candidates


def _try(
    graph: PathGraph, model: nn.Module, run: Callable[[], object], group: list[_Candidate]
) -> tuple[bool, _Candidate | None]:
    """Whether one of the paths cannot be dropped so, and which, as far as that shows."""
    modules = dict(model.named_modules())
    under_way: list[_Candidate] = []
    hooks = []
    buffered = [modules[n] for n in graph.dropped_buffers(c.name for c in group)]
    in_train = [m for m in buffered if m.training]
    for module in in_train:
        module.training = False
    for module in modules.values():
        if isinstance(module, _TrialDropPath):
            module._call, module._batch, module._dropped = 0, {}, {}
    for candidate in group:
        candidate.drop_path._dropped[candidate.call] = (candidate, under_way)

        def begin(*_: object, candidate: _Candidate = candidate) -> None:
            if candidate not in under_way:
                under_way.append(candidate)

        skip = partial(pass_on_one_sample, candidate.drop_path, candidate.call)
        for name in candidate.entrances:
            hooks += [modules[name].register_forward_pre_hook(h) for h in (begin, skip)]
    try:
        run()
        return False, None
    except Exception:  # whatever a model raises on a batch that it cannot take
        return True, under_way[-1] if under_way else None
    finally:
        for hook in hooks:
            hook.remove()
        for module in in_train:
            module.training = True
