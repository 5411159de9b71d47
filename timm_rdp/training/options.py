"""From the command line to checked options: timm's defaults < demo recipe < -c FILE < flags."""

import argparse
import importlib
import logging
import re
from pathlib import Path
from typing import Any

import torch
import yaml

import timm_rdp
from timm_rdp.errors import UsageError, nearest, refused_with
from timm_rdp.training.checks import check_options
from timm_rdp.training.demo import prepare_demo
from timm_rdp.training.flags import build_parser, flag

_logger = logging.getLogger(__name__)

DEMO_RECIPE = "demo_digits.yaml"
RDP_DROP_PATH = 0.1


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options of a run, complete and checked as far as that goes without a model.

    Three defaults differ from timm's script: the device is the best there is, `--rdp` alone takes
    `--drop-path 0.1`, and without data the run is the demo (`args.demo`), whose recipe is the
    default of every flag that is not given.

    Args:
        argv: the command line without the program, None for that of this process.

    Raises:
        UsageError: one line that names the flag, its value and the fix.
    """
    parser = build_parser()
    defaults = vars(parser.parse_args([]))
    typed = _typed(parser, argv)
    config = read_config(typed["config"], parser) if typed.get("config") else {}
    given = {**config, **typed}
    demo = not any(given.get(name) for name in ("data", "data_dir", "dataset"))
    if demo:
        given = {**read_config(recipe(DEMO_RECIPE), parser), **given}
    args = argparse.Namespace(**{**defaults, **given})

    # A config may spell out defaults, as args.yaml does: only a change counts there.
    explicit = set(typed) | {name for name, value in config.items() if value != defaults[name]}
    for module in args.device_modules or ():
        with refused_with(f"--device-modules {module}"):
            importlib.import_module(module)
    args.device = _resolve_device(args.device)
    if args.rdp and args.drop_path is None:
        args.drop_path = RDP_DROP_PATH
        _logger.info(f"--rdp without --drop-path: taking --drop-path {RDP_DROP_PATH}")
    if args.data and not args.data_dir:
        args.data_dir = args.data
    check_options(args, explicit)
    args.demo = demo
    if demo:
        args.data_dir = str(prepare_demo())
    return args


def args_text(args: argparse.Namespace) -> str:
    """Return the flags as YAML, the text of args.yaml, which `-c` reads back.

    To be called before anything derived is written into `args` (timm writes the text so).
    """
    flags = set(vars(build_parser().parse_args([]))) - {"config"}
    chosen = {name: value for name, value in vars(args).items() if name in flags}
    return yaml.safe_dump(chosen, default_flow_style=False)


def recipe(name: str) -> Path:
    """Return the path of a recipe of `configs/`, in a checkout or installed."""
    package = Path(timm_rdp.__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise UsageError(f"the recipe {name} is missing from {package / 'configs'}; reinstall timm-rdp")


def read_config(path: str | Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Read a YAML mapping of flags, turned into words of a command line and parsed as such.

    A null is a flag that is not given; for --color-jitter it means none.

    Args:
        path: the file.
        parser: knows the flags; keys are their names with underscores (dashes do as well).

    Raises:
        UsageError: the file is missing, not YAML or not a mapping; a key is unknown or given twice;
            a value does not fit its flag.
    """
    with refused_with(f"--config {path}"):
        text = Path(path).read_bytes()
    with refused_with(f"--config {path} is not valid YAML"):
        content = yaml.load(text, _Loader)
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} is no mapping of flags to values, but {content!r:.40}")
    actions = {a.dest: a for a in parser._actions if a.dest not in ("help", "config")}
    config: dict[str, Any] = {}
    words: list[str] = []
    try:
        for key, value in content.items():
            name = str(key).replace("-", "_")
            if name not in actions:
                raise UsageError(f"unknown key {key!r}{nearest(name, actions)}")
            if name in config:
                raise UsageError(f"the key {name!r} is given twice")
            default = None if name == "color_jitter" and value is None else actions[name].default
            config[name] = "" if value is None and isinstance(default, str) else value
            if name == "data":  # the one argument that is no flag
                config[name] = value and str(value)
            elif type(config[name]) is not type(default) or config[name] != default:
                words += _words(name, config[name], actions[name].nargs)
        return {**config, **_typed(parser, words)}
    except UsageError as error:
        raise UsageError(f"--config {path}: {error}") from None


class _Loader(yaml.SafeLoader):
    """Safe YAML, in which a key given twice is an error rather than the last one wins."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            text = key.value if isinstance(key, yaml.ScalarNode) else key
            if text in seen:
                raise ValueError(f"{text!r} is given twice, in line {key.start_mark.line + 1}")
            seen.add(text)
        return super().construct_mapping(node, deep)


def _words(name: str, value: Any, nargs: str | int | None) -> list[str]:
    """Return a YAML value as the words of its flag on a command line."""
    kinds = {0: bool, 3: list, "+": list, "*": dict}
    kind = kinds.get(nargs, (str, int, float))
    if not isinstance(value, kind) or isinstance(value, bool) != (nargs == 0):
        what = {bool: "true or false", list: "a list", dict: "a mapping"}.get(kind, "one value")
        raise UsageError(f"{flag(name)} takes {what}, got {value!r}")
    if nargs == 0:
        return [flag(name)]
    if not isinstance(value, (list, dict)):
        return [f"{flag(name)}={value}"]
    pairs = value.items() if isinstance(value, dict) else ()
    words = [f"{key}={item!r}" for key, item in pairs] or [str(item) for item in value]
    # A word that begins with a dash, and is no number, would be taken for a flag.
    if any(re.match("-[^0-9.]", word) for word in words):
        raise UsageError(f"{flag(name)} takes nothing that begins with a dash, got {value!r}")
    return [flag(name), *words]


def _typed(parser: argparse.ArgumentParser, argv: list[str] | None) -> dict[str, Any]:
    """Return only those flags that the command line names."""
    absent = object()
    names = (action.dest for action in parser._actions)
    parsed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, absent))))
    if parsed["data"] is None:  # argparse sets a positional argument that is absent
        del parsed["data"]
    return {name: value for name, value in parsed.items() if value is not absent}


def _resolve_device(name: str | None) -> str:
    best = torch.accelerator.current_accelerator(check_available=True)
    best = best.type if best else "cpu"
    if not name:
        return best
    with refused_with(f"--device {name}"):
        device = torch.device(name)
    here = getattr(torch, device.type, None)
    if not (here and here.is_available() and (device.index or 0) < here.device_count()):
        raise UsageError(f"--device {name} is not available here; use --device {best}")
    return name
