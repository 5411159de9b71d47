"""What the study's commands share: the types of their options, and a model by its name."""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import timm

from timm_rdp.errors import UsageError, nearest, one_line, refused_with


class Parser(argparse.ArgumentParser):
    """Raises UsageError, one line, where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def number(kind: type, words: str, fits: Callable[[Any], bool]) -> Callable[[str], Any]:
    """The type of an option that takes a number for which `fits` is true; `words` say when."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} must be {words}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


def at_least(low: int) -> Callable[[str], int]:
    """The type of an option that takes whole numbers from `low` on."""
    return number(int, f"{low} or more", lambda value: value >= low)


# Without a drop path rate above 0 nothing is dropped, and timm makes no paths.
RATE = number(float, "above 0 and below 1", lambda value: 0 < value < 1)


@contextmanager
def refused_model(name: str) -> Iterator[None]:
    """Pass on, as one UsageError line, why timm or ResidualDropPath cannot take a model."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # whatever a constructor raises for arguments that it cannot take
        architecture = name.partition(".")[0]
        why = f": {one_line(error)}"
        if "drop_path_rate" in str(error):
            why = (
                " takes no drop_path_rate, so it has no paths: choose a model with stochastic "
                "depth, such as vit_small_patch16_224 or resnet50"
            )
        elif ":" not in name and not timm.is_model(architecture):
            close = nearest(architecture, timm.list_models()) or "; timm.list_models() lists them"
            why = f": timm has no such model{close}"
        raise UsageError(f"--model {name}{why}") from error


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
