"""Finds a model's DropPaths, timm's or another library's, and patches them.

torchvision, Hugging Face and many repositories have a stochastic depth of their own, under a name
of their own. It is known by what it does to a few small tensors.
"""

import functools
import math
import re
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from timm_rdp.core.drop_path import ADDED, Kind, MaskedDropPath
from timm_rdp.core.stand_ins import on_stand_ins

_NAMED_AS_ONE = re.compile("drop_?path|stochastic_?depth", re.IGNORECASE)
_DRAWS = 64  # in which one that drops whole batches is seen to do both


def find_drop_paths(model: nn.Module) -> dict[str, Kind]:
    """The model's DropPaths by name, with what each of them is.

    Raises:
        ValueError: one of them cannot be patched, or is patched already.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "the model is a torch.jit.ScriptModule, which cannot be patched: pass the original"
        )
    modules = dict(model.named_modules())
    kinds = {n: kind for n, m in modules.items() if (kind := _kind_of(n, m)) is not None}
    for name in kinds:
        module = modules[name]
        owner = module._owner if isinstance(module, MaskedDropPath) else None
        if owner is not None and owner() is not None:
            raise ValueError(
                "the model is patched by another ResidualDropPath or by skip_dropped: detach() "
                "that first"
            )
        if "forward" in vars(module):
            raise ValueError(
                f"{name} has a forward of its own put in place of its class's, which the patch "
                "could not reach: take that back, and wrap the module around it instead"
            )
    return kinds


def _kind_of(name: str, module: nn.Module) -> Kind | None:
    if isinstance(module, MaskedDropPath) or type(module) is DropPath:
        return getattr(module, "_kind", Kind(DropPath))
    if [*module.children(), *module.parameters(), *module.buffers()]:
        return None
    for rate, value in [*vars(module).items()]:
        number = isinstance(value, int | float | Tensor) and not isinstance(value, bool)
        if number and (kind := _observe(module, rate)) is not None:
            return kind
    class_name = str(getattr(module, "original_name", type(module).__name__))  # of TorchScript
    if isinstance(module, DropPath) or _NAMED_AS_ONE.search(class_name):
        raise ValueError(
            f"{name} is a {class_name} that does something else than timm's DropPath: "
            "use timm.layers.DropPath there"
        )
    return None


def _observe(module: nn.Module, rate: str) -> Kind | None:
    """What a module is if it is a DropPath and its attribute `rate` the drop probability."""

    def factors(x: Tensor, training: bool, value: float) -> Tensor:
        """What each element of x (B, ...) is multiplied by, (B, N)."""
        vars(module).update({"training": training, rate: value})
        y = module.forward(x.clone())
        if y.shape != x.shape:
            raise ValueError("it was written for tensors of other dimensions")
        return (y / x).flatten(1)

    found: set[float] = set()
    per_sample = False
    with on_stand_ins(module, fake=False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for shape in ((64, 2, 3), (64, 2, 3, 5), (64, 2, 3, 5, 4)):
            count = math.prod(shape)
            x = (torch.arange(0.5, count, device="cpu") - count // 2).view(shape)
            try:
                if (factors(x, False, 0.5) != 1.0).any() or (factors(x, True, 0.0) != 1.0).any():
                    return None
                for _ in range(1 if per_sample else _DRAWS):
                    drawn = factors(x, True, 0.5)
                    if (drawn != drawn[:, :1]).any():
                        return None  # Dropout
                    rows = set(drawn[:, 0].tolist())
                    found |= rows
                    per_sample |= len(rows) > 1
            except Exception:  # whatever it raises on a tensor of so many dimensions
                continue
    if found not in ({0.0, 1.0}, {0.0, 2.0}):
        return None
    return Kind(type(module), rate, 2.0 in found, per_sample)


class _ForeignDropPath(MaskedDropPath):
    """A DropPath that is not timm's; outside an iteration its own class computes."""

    def _sample(self, x: Tensor) -> tuple[Tensor, Any]:
        kind = self._kind
        shape = x.shape[: int(kind.per_sample)]
        y = kind.type.forward(self, x)
        if self.drop_prob == 0.0:
            return y, (shape, True, x.device)
        # What it drew is seen in what it returns; a sample of zeros counts as dropped.
        return y, (y.detach() != 0).any(dim=tuple(range(len(shape), y.ndim)))

    def __reduce__(self) -> tuple:
        return (_unpickled, (self._kind,), self.__getstate__())


def _unpickled(kind: Kind) -> nn.Module:
    patched = _patched_class(kind)
    return patched.__new__(patched)


@functools.cache
def _patched_class(kind: Kind) -> type[MaskedDropPath]:
    """The class of patched modules of this kind; also a subclass of their own."""
    if kind.type is DropPath:
        return MaskedDropPath
    members: dict[str, Any] = {"_kind": kind, "extra_repr": kind.type.extra_repr}
    if not hasattr(kind.type, "scale_by_keep"):
        members["scale_by_keep"] = kind.scales
    if kind.rate != "drop_prob":
        members["drop_prob"] = property(
            lambda self: getattr(self, kind.rate), lambda self, p: setattr(self, kind.rate, p)
        )
    return type(f"Masked{kind.type.__name__}", (_ForeignDropPath, kind.type), members)


def patch(
    model: nn.Module, kinds: Mapping[str, Kind], calls_per_forward: Mapping[str, int], owner: object
) -> dict[str, MaskedDropPath]:
    """Turn a model's DropPaths, in place, into MaskedDropPaths of this controller."""
    patched = {}
    for name, kind in kinds.items():
        module = model.get_submodule(name)
        module.__class__ = _patched_class(kind)
        assert isinstance(module, MaskedDropPath)
        module._calls, module._call = calls_per_forward.get(name, 1), 0
        module._owner = weakref.ref(owner)
        module._batch, module._kept = {}, {}
        patched[name] = module
    return patched


def unpatch(modules: Mapping[str, MaskedDropPath]) -> None:
    """Give patched modules their class back and remove everything that patching added."""
    for module in modules.values():
        setattr(module, "__class__", module._kind.type)  # noqa: B010
        for name in ADDED:
            vars(module).pop(name, None)
