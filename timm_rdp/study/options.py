"""What the study's commands share: types of their options, and checks before any work is done."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from timm_rdp.args import number
from timm_rdp.errors import UsageError, refused_with

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


def check_output(folder: str | Path) -> Path:
    """The output folder, which can be made and written, or else a UsageError; nothing is left."""
    with refused_with(f"--output {str(folder) or repr('')}: cannot be written, name another"):
        if not str(folder):
            raise ValueError("it has no name")
        path = Path(folder).absolute()
        there = next(p for p in (path, *path.parents) if os.path.lexists(p))
        with TemporaryDirectory(dir=there) as trial:
            Path(trial, path.relative_to(there)).mkdir(parents=True, exist_ok=True)
    return Path(folder)
