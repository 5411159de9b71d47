"""Errors that a user can mend: shown as one line, without a traceback."""


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
