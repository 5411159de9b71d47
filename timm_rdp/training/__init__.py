"""The training script; it needs a newer timm than the plugin itself."""

import timm
from torch.torch_version import TorchVersion

from timm_rdp.errors import UsageError

OLDEST_TIMM = "1.0.31"

if TorchVersion(timm.__version__) < OLDEST_TIMM:
    raise UsageError(
        f"timm-rdp train needs timm {OLDEST_TIMM} or newer, this is {timm.__version__}: "
        "pip install -U timm"
    )
