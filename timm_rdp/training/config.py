"""YAML files of flags, read strictly: what argparse would refuse is refused here too."""

import argparse
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from timm_rdp.errors import UsageError, nearest

# timm passes a null on, and in these flags it has a meaning: no colour jitter.
_NULL_HAS_MEANING = {"color_jitter"}


class _Loader(yaml.SafeLoader):
    """Safe YAML, in which a key given twice is an error rather than the last one wins."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, Hashable) else repr(key))
        return super().construct_mapping(node, deep)


def read_config(path: str | Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Read a YAML mapping of flags, each value converted and checked as the parser would.

    Args:
        path: the file.
        parser: knows the flags; keys are their names with underscores (dashes do as well).

    Raises:
        UsageError: the file is missing, not YAML or not a mapping; a key is unknown (the message
            names the nearest known ones); a value does not fit its flag.
    """
    try:
        content = yaml.load(Path(path).read_bytes(), _Loader)
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror or error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}" if mark else ""
        raise UsageError(f"--config {path} is not valid YAML: {error.problem}{where}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"--config {path} is not valid YAML: {reason}") from None
    if not isinstance(content, dict):
        kind = "empty" if content is None else f"a {type(content).__name__}"
        raise UsageError(f"--config {path} is {kind}; it must be a mapping of flags to values")

    actions = {a.dest: a for a in parser._actions if a.dest not in ("help", "config")}
    config = {}
    for key, value in content.items():
        dest = str(key).replace("-", "_")
        if dest not in actions:
            raise UsageError(f"--config {path}: unknown key {key!r}{nearest(dest, actions)}")
        if dest in config:
            raise UsageError(f"--config {path}: the key {dest!r} is given twice")
        try:
            config[dest] = _convert(value, actions[dest])
        except ValueError as error:
            raise UsageError(f"--config {path}: {key}: {error}, got {value!r}") from None
    return config


def _convert(value: Any, action: argparse.Action) -> Any:
    """Return a YAML value as the flag would have it; ValueError says what the flag takes."""
    if action.nargs == 0:
        if isinstance(value, bool):
            return value
        raise ValueError("takes true or false")
    if isinstance(action.default, dict):
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return value
        raise ValueError("takes a mapping of names to values")
    if value is None:
        if action.default is None or action.dest in _NULL_HAS_MEANING:
            return None
        if isinstance(action.default, str) and not action.choices:
            return ""
    if value == action.default and not isinstance(value, bool):
        return action.default
    if action.nargs == "+" or isinstance(action.nargs, int):
        count = action.nargs if isinstance(action.nargs, int) else None
        if not isinstance(value, list) or not value or (count and len(value) != count):
            raise ValueError(f"takes a list of {count or 'one or more'} values")
        return [_convert_one(item, action) for item in value]
    return _convert_one(value, action)


def _convert_one(value: Any, action: argparse.Action) -> Any:
    kind = action.type or str
    what = {int: "a whole number", float: "a number", str: "a text"}[kind]
    # A number is fine where a text is asked for (experiment: 1), and YAML takes 1e-3 for a text.
    fits = isinstance(value, (str, int) if kind is int else (str, int, float))
    if not fits or isinstance(value, bool):
        raise ValueError(f"takes {what}")
    try:
        converted = kind(value)
    except (ValueError, OverflowError):
        raise ValueError(f"takes {what}") from None
    if action.choices and converted not in action.choices:
        raise ValueError(f"takes one of {', '.join(map(str, action.choices))}")
    return converted
