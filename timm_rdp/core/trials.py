"""Which paths need not be run when they are dropped: found by trying it out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from timm_rdp.core.drop_path import MaskedDropPath
from timm_rdp.core.foreign import patch
from timm_rdp.core.paths import PathGraph

# Trial forwards for one model, at the most: a model whose paths fail one by one is left alone.
_MAX_TRIALS = 32


@dataclass(eq=False)
class _Candidate:
    """A path that may be one that can be skipped."""

    name: str
    call: tuple[nn.Module, int]  # of its DropPath
    shape: tuple[int, ...]  # of what that is handed
    entrances: tuple[str, ...]
    kind: tuple  # equal for paths in blocks of one make


def find_skippable(
    graph: PathGraph, model: nn.Module, run: Callable[[], object], shapes: Sequence[tuple[int, ...]]
) -> dict[str, tuple[str, ...]]:
    """The residual paths that can be dropped without being run, and their entrances, by name.

    All are tried together, and those that turn out not to take it are left out one by one; where a
    second one of a kind does not, the others of its kind are left out with it.

    Args:
        graph: the model's paths.
        model: the model in train mode; its DropPaths are patched for good.
        run: runs it on an example of at least two samples.
        shapes: per path what its DropPath is handed.
    """
    patched = [*patch(model, graph.drop_paths, graph.calls_per_forward, graph).values()]
    groups = [_candidates(graph, model, shapes)]
    skippable: dict[str, tuple[str, ...]] = {}
    failed_kinds = set()
    trials = 0
    while groups and trials < _MAX_TRIALS:
        group = groups.pop()
        if not group:
            continue
        trials += 1
        failed, culprit = _try(graph, model, patched, run, group)
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
    graph: PathGraph, model: nn.Module, shapes: Sequence[tuple[int, ...]]
) -> list[_Candidate]:
    kinds = {}
    for module in model.modules():
        for attribute, child in module.named_children():
            if isinstance(child, MaskedDropPath):
                kinds[child] = (attribute, *((n, type(m)) for n, m in module.named_modules()))
    return [
        _Candidate(p.name, (p.module, p.call), shape, entrances, (p.call, *kinds[p.module]))
        for p, shape in zip(graph.paths, shapes, strict=True)
        if p.residual and shape[0] > 1 and (entrances := graph.entrances(p.name))
    ]


def _try(
    graph: PathGraph,
    model: nn.Module,
    drop_paths: list[MaskedDropPath],
    run: Callable[[], object],
    group: list[_Candidate],
) -> tuple[bool, _Candidate | None]:
    """Whether one of the paths cannot be dropped so, and which, as far as that shows."""
    modules = dict(model.named_modules())
    dropped = {c.call: c for c in group}
    under_way: list[_Candidate] = []

    def begin(candidate: _Candidate, *_: object) -> None:
        if candidate not in under_way:
            under_way.append(candidate)

    def end(module: Any, args: tuple) -> None:
        candidate = dropped.get((module, module._call))
        if candidate is None:
            return
        batch, _ = module._batch.get(module._call, (0, None))
        if args[0].shape[0] != 1 or (batch, *args[0].shape[1:]) != candidate.shape:
            under_way.append(candidate)
            raise ValueError(f"{candidate.name} was not handed one sample")
        under_way.remove(candidate)

    hooks: list[Any] = []
    for drop_path in drop_paths:
        drop_path.decide([float((drop_path, c) not in dropped) for c in range(drop_path._calls)])
        hooks.append(drop_path.register_forward_pre_hook(end))
    for candidate in group:
        drop_path, call = candidate.call
        assert isinstance(drop_path, MaskedDropPath)
        for name in candidate.entrances:
            for hook in (partial(begin, candidate), partial(drop_path.pass_on_one_sample, call)):
                hooks.append(modules[name].register_forward_pre_hook(hook))
    resting = [modules[n] for n in graph.dropped_buffers(c.name for c in group)]
    in_train = [m for m in resting if m.training]
    for module in in_train:
        module.training = False
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
