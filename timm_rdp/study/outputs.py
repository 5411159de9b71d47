"""Files that the study writes."""

import csv
from collections.abc import Iterable
from pathlib import Path


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable]) -> None:
    """Write one table."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
