"""What each call of a DropPath is told to do in an iteration, in eager and in compiled code."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from timm_rdp.core.drop_path import Decision, MaskedDropPath
from timm_rdp.core.iteration import DROPPATH, Iteration
from timm_rdp.core.paths import Path


class Decisions:
    """Tells a model's DropPaths what to do.

    Eager code is told by numbers. The code of a region has one graph for what is dropped, one for
    what is passed on and one for what is scaled by whatever a tensor says. That of a model compiled
    as a whole would have one per mask: it reads all from tensors.

    Args:
        modules: the patched DropPaths.
        paths: the model's paths.
    """

    def __init__(self, modules: Iterable[MaskedDropPath], paths: Iterable[Path]):
        self._paths = [p for p in paths if p.residual]
        self._scales: dict[tuple[MaskedDropPath, int], tuple[float, Tensor]] = {}
        self._weights = torch.ones(0)
        self._flat: list[float] = []
        # What a complement iteration tells them, and what is not around a residual in any.
        self._kept: dict[Any, list[Decision]] = {m: [None] * m._calls for m in modules}
        for path in self._paths:
            self._kept[path.module][path.call] = 1.0

    def tell(
        self, it: Iteration, device: torch.device, whole: bool, in_regions: Iterable[Any]
    ) -> None:
        """Tell all of them; what is not around a residual keeps timm's own behaviour.

        Args:
            it: the iteration that begins.
            device: that of the model.
            whole: the model is compiled as a whole.
            in_regions: the modules that are compiled with a region.
        """
        drops = it.phase == DROPPATH
        told = {m: [*calls] for m, calls in self._kept.items()} if drops else self._kept
        for path in self._paths if drops else ():
            kept = 1.0 - path.drop_prob if path.module.scale_by_keep else 1.0
            told[path.module][path.call] = 0.0 if path.name in it.dropped else kept
        if whole:
            weights: Mapping[Any, Any] = self._as_tensors(told, device)
        else:
            weights = {m: self._as_constants(m, told[m], device) for m in in_regions}
        for module, decisions in told.items():
            if module in weights:
                module.decide(decisions, weights[module], device)
            else:  # nn.Module's own __setattr__ would be most of what an iteration costs
                own = vars(module)
                own["_decisions"], own["_call"] = decisions, 0

    def _as_tensors(
        self, told: dict[MaskedDropPath, list[Decision]], device: torch.device
    ) -> dict[MaskedDropPath, list[Tensor | None]]:
        flat = [d for calls in told.values() for d in calls if d is not None]
        if len(self._weights) != len(flat) or self._weights.device != device:
            self._weights, self._flat = torch.ones(len(flat), device=device), []
            self._views = self._weights.unbind()
        if flat != self._flat:  # else a backward pass may yet want them as they are
            self._weights.copy_(torch.tensor(flat), non_blocking=True)
            self._flat = flat
        views = iter(self._views)
        return {m: [None if d is None else next(views) for d in c] for m, c in told.items()}

    def _as_constants(
        self, module: MaskedDropPath, decisions: list[Decision], device: torch.device
    ) -> list[Tensor | bool | None]:
        constants: list[Tensor | bool | None] = []
        for call, decision in enumerate(decisions):
            if decision is None or decision in (0.0, 1.0):
                constants.append(None if decision is None else bool(decision))
                continue
            known, scale = self._scales.get((module, call), (None, None))
            if scale is None or known != decision or scale.device != device:
                scale = torch.full((), decision, device=device)
                self._scales[module, call] = decision, scale
            constants.append(scale)
        return constants
