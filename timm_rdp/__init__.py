"""ResidualDroppath (arXiv 2411.09475) for timm."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timm_rdp.args import add_rdp_args, from_args
    from timm_rdp.core.paths import Path
    from timm_rdp.core.rdp import Iteration, ResidualDropPath
    from timm_rdp.core.skip_dropped import SkipDropped, skip_dropped

__version__ = "0.1.0"

__all__ = [
    "Iteration",
    "Path",
    "ResidualDropPath",
    "SkipDropped",
    "add_rdp_args",
    "from_args",
    "skip_dropped",
]

_MODULES = {
    "Iteration": "timm_rdp.core.rdp",
    "Path": "timm_rdp.core.paths",
    "ResidualDropPath": "timm_rdp.core.rdp",
    "SkipDropped": "timm_rdp.core.skip_dropped",
    "add_rdp_args": "timm_rdp.args",
    "from_args": "timm_rdp.args",
    "skip_dropped": "timm_rdp.core.skip_dropped",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `timm-rdp --help` needs no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
