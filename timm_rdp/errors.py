"""Errors that a user can mend: shown as one line, without a traceback."""

import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class UsageError(Exception):
    """What the user gave cannot be used; the message is one line: the thing, its value, the fix."""

    def __init__(self, message: str):
        super().__init__("\\n".join(message.splitlines()))  # values may hold line breaks


class DataError(UsageError):
    """A sample cannot be read; the message names its file.

    A DataLoader worker hands an exception over as its formatted traceback and rebuilds it from
    that text, so only the last line is kept.
    """

    def __init__(self, message: str):
        last_line = message.strip().splitlines()[-1]
        super().__init__(last_line.removeprefix(f"{DataError.__module__}.DataError: "))


class TrainingError(Exception):
    """A run that was under way cannot go on; the message is one line: what happened and where."""


@contextmanager
def refused_with(what: str) -> Iterator[None]:
    """Pass on, in one line, what timm or torch refuse within this context.

    Args:
        what: the option and value that it came from, the beginning of the line.

    Raises:
        UsageError: anything was raised inside; errors of our own go through as they are.
    """
    try:
        yield
    except (UsageError, TrainingError):
        raise
    except Exception as error:  # whatever a library raises for arguments that it cannot take
        raise UsageError(f"{what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """An exception's message in one line; its type where it has none."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyError):
        return f"{text} is missing"
    return text or type(error).__name__


def report(error: UsageError | TrainingError) -> int:
    """Print an error's one line to stderr (TIMM_RDP_TRACEBACK=1 shows the traceback too).

    Returns:
        the exit status: 2 for what the user gave, 1 for a run that cannot go on
    """
    if os.environ.get("TIMM_RDP_TRACEBACK"):
        traceback.print_exception(error)
    print(f"error: {error}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which of the known names are nearest to one that is not among them."""
    close = get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""
