"""Files that the study writes."""

import csv
import os
from collections.abc import Iterable
from pathlib import Path

from timm_rdp.training.errors import UsageError


def check_output(folder: str | Path) -> Path:
    """The output folder, which exists or can be made; nothing is made yet.

    Raises:
        UsageError: it has no name, is a file, lies below one, or cannot be written.
    """
    if not str(folder):
        raise UsageError("--output '': name a folder")
    folder = Path(folder)
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UsageError(f"--output {folder}: {there} is a file, not a folder; name another folder")
    if not os.access(there, os.W_OK):
        raise UsageError(f"--output {folder}: {there} cannot be written; name another folder")
    return folder


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable]) -> None:
    """Write one table."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
