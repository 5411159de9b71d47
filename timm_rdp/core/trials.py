"""Which paths need not be run when they are dropped: found by trying it out."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from timm_rdp.core.paths import PathGraph
from timm_rdp.core.skip import pass_on_one_sample, zeros_for_batch

# Trial forwards for one model, at the most: a model whose paths fail one by one is left alone.
_MAX_TRIALS = 32


@dataclass(eq=False)
class _Candidate:
    """A path that may be one that can be skipped."""

    name: str
    drop_path: Any  # a DropPath, with `_batch` during a trial
    call: int
    shape: tuple[int, ...]  # of what its DropPath is handed
    entrances: tuple[str, ...]
    kind: tuple  # equal for paths in blocks of one make


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
        model: the model, in train mode and on stand-ins.
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
        for attribute, child in module.named_children():
            if isinstance(child, DropPath):
                kinds[child] = (attribute, *((n, type(m)) for n, m in module.named_modules()))
    candidates = []
    for path, (module, shape) in zip(graph.paths, calls, strict=True):
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
    dropped: dict[tuple, _Candidate] = {(c.drop_path, c.call): c for c in group}
    under_way: list[_Candidate] = []
    calls: Counter[nn.Module] = Counter()

    def begin(candidate: _Candidate, *_: object) -> None:
        if candidate not in under_way:
            under_way.append(candidate)

    def end(module: nn.Module, args: tuple[Tensor], _: Tensor) -> Tensor | None:
        """Have a DropPath return the zeros of a dropped path if it is handed one sample."""
        call, (x,) = calls[module], args
        calls[module] += 1
        candidate = dropped.get((module, call))
        if candidate is None:
            return None
        batch, memory_format = candidate.drop_path._batch.get(call, (0, torch.contiguous_format))
        if candidate in under_way:
            under_way.remove(candidate)
        if x.shape[0] != 1 or (batch, *x.shape[1:]) != candidate.shape:
            under_way.append(candidate)
            raise ValueError(f"{candidate.name} was not handed one sample")
        return zeros_for_batch(x, batch, memory_format)

    hooks = []
    for candidate in group:
        drop_path = candidate.drop_path
        vars(drop_path)["_batch"] = {}
        skip = partial(pass_on_one_sample, drop_path, candidate.call)
        for name in candidate.entrances:
            for hook in (partial(begin, candidate), skip):
                hooks.append(modules[name].register_forward_pre_hook(hook))
    hooks += [m.register_forward_hook(end, prepend=True) for m in {c.drop_path for c in group}]
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
