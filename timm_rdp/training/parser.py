"""argparse, with complaints in one line, and the numbers that flags take."""

import argparse
import math
import shlex
from collections.abc import Callable
from typing import NoReturn

from timm.utils.misc import ParseKwargs

from timm_rdp.errors import UsageError, nearest


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError where argparse would print its usage."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            flags = [f for action in self._actions for f in action.option_strings]
            close = nearest(unknown.split(" ")[0].split("=")[0], flags)
            raise UsageError(f"unknown flag or argument: {unknown!r}{close or ' (see --help)'}")
        raise UsageError(message.removeprefix("argument ").replace(": ", " ", 1) + " (see --help)")


class KeyValues(ParseKwargs):
    """timm's key=value ... arguments, with a complaint where a value is no such pair."""

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            super().__call__(parser, namespace, values, option_string)
        except Exception:
            message = f"takes key=value ..., got {' '.join(values)!r}"
            raise argparse.ArgumentError(self, message) from None


def number(
    kind: type[int] | type[float], rule: str = "", holds: Callable[[float], bool] = lambda x: True
) -> Callable[[str], float]:
    """Return a `type=` of argparse: finite numbers, for which `holds` what `rule` says."""
    what = f"a {'whole ' if kind is int else ''}number {rule}".strip()

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (-math.inf < value < math.inf and holds(value)):
            raise argparse.ArgumentTypeError(f"{shlex.quote(text)} must be {what}")
        return value

    return convert
