"""ResidualDroppath (arXiv 2411.09475) for timm."""

from timm_rdp.args import add_rdp_args, from_args
from timm_rdp.core.paths import Path
from timm_rdp.core.rdp import Iteration, ResidualDropPath
from timm_rdp.core.skip_dropped import SkipDropped, skip_dropped

__all__ = [
    "Iteration",
    "Path",
    "ResidualDropPath",
    "SkipDropped",
    "add_rdp_args",
    "from_args",
    "skip_dropped",
]
