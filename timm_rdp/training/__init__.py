"""The training script; it needs a newer timm than the plugin itself."""

import re

import timm

from timm_rdp.errors import UsageError

OLDEST_TIMM = "1.0.31"


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


if _numbers(timm.__version__) < _numbers(OLDEST_TIMM):
    raise UsageError(
        f"timm-rdp train needs timm {OLDEST_TIMM} or newer, this is {timm.__version__}: "
        "pip install -U timm"
    )
