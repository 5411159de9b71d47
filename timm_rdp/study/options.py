"""What the study's commands share: types of their options, and the check for the demo extra."""

import importlib.util
from collections.abc import Callable

from timm_rdp.errors import UsageError
from timm_rdp.training.flags import number

# Without a drop path rate above 0 nothing is dropped, and timm makes no paths.
RATE = number(float, "above 0 and below 1", lambda value: 0 < value < 1)


def at_least(low: int) -> Callable[[str], float]:
    """The type of an option that takes whole numbers from `low` on."""
    return number(int, f"of at least {low}", lambda value: value >= low)


def check_installed(*packages: str) -> None:
    """Raises UsageError where a package is missing that only the demo extra installs."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UsageError(f'{package} is not installed: pip install "timm-rdp[demo]"')
