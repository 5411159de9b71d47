"""Folders and files that are written so that nothing is lost."""

import contextlib
import os
from pathlib import Path

from timm_rdp.errors import TrainingError, UsageError


def check_output(folder: str | Path) -> Path:
    """The output folder, which exists or can be made; nothing is made yet.

    Raises:
        UsageError: it has no name or none that can be, is a file, lies below one, or cannot be
            written.
    """
    if not str(folder):
        raise UsageError("--output '': name a folder")
    folder = Path(folder)
    path = folder.absolute()
    try:
        there = next(p for p in (path, *path.parents) if _is_there(p))
        for name in path.relative_to(there).parts:
            _is_there(there / name)
    except (OSError, ValueError) as error:  # too long, no permission, a loop of links, a NUL
        why = getattr(error, "strerror", None) or error
        raise UsageError(
            f"--output {folder}: cannot be written ({why}); name another folder"
        ) from error
    if not there.is_dir():
        raise UsageError(f"--output {folder}: {there} is a file, not a folder; name another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"--output {folder}: {there} cannot be written; name another folder")
    return folder


def _is_there(path: Path) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def write_atomically(path: str, content: bytes) -> None:
    """Write a file so that it is either the old or the new one at any time.

    Raises:
        TrainingError: it cannot be written; the old one is intact.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise TrainingError(
            f"{path} cannot be written: {error.strerror}; make room there"
        ) from error
