"""What the study's commands share: types of their options, and the check for the demo extra."""

import importlib.util
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

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
    """The output folder, which exists or can be made; nothing is made yet.

    Raises:
        UsageError: it has no name, is a file, lies below one, or cannot be written.
    """
    path = Path(folder).absolute()
    with refused_with(f"--output {str(folder) or repr('')}: cannot be written"):
        if not str(folder):
            raise ValueError("name a folder")
        there = next(p for p in (path, *path.parents) if p.exists())
        if not there.is_dir():
            raise NotADirectoryError(f"{there} is a file, not a folder")
        for name in path.relative_to(there).parts:
            with suppress(FileNotFoundError):
                (there / name).stat()  # raises for names that are too long, links in a loop, ...
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(f"no permission in {there}; name another folder")
    return Path(folder)
