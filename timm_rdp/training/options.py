"""From the command line to checked options: timm's defaults < demo recipe < -c FILE < flags."""

import argparse
import importlib
import logging
from pathlib import Path
from typing import Any

import torch
import yaml

import timm_rdp
from timm_rdp.errors import UsageError
from timm_rdp.training.checks import check_options
from timm_rdp.training.config import read_config
from timm_rdp.training.demo import prepare_demo
from timm_rdp.training.flags import build_parser
from timm_rdp.training.inputs import img_size_kwargs

__all__ = ["args_text", "build_parser", "img_size_kwargs", "parse_args", "recipe"]

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
    typed = _given(parser, argv, defaults)
    config = read_config(typed["config"], parser) if typed.get("config") else {}
    given = {**config, **typed}
    demo = not any(given.get(name) for name in ("data", "data_dir", "dataset"))
    if demo:
        given = {**read_config(recipe(DEMO_RECIPE), parser), **given}
    args = argparse.Namespace(**{**defaults, **given})

    # A config may spell out defaults (args.yaml of another run does): only a change counts there.
    explicit = set(typed) | {name for name, value in config.items() if value != defaults[name]}
    _import_device_modules(args.device_modules)
    args.device = _resolve_device(args.device)
    chosen_drop_path = args.rdp and args.drop_path is None
    if chosen_drop_path:
        args.drop_path = RDP_DROP_PATH
    if args.data and not args.data_dir:
        args.data_dir = args.data
    check_options(args, explicit, defaults)
    args.demo = demo
    if demo:
        args.data_dir = str(prepare_demo())
    if chosen_drop_path:
        _logger.info(f"--rdp without --drop-path: taking --drop-path {RDP_DROP_PATH}")
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


def _given(parser: argparse.ArgumentParser, argv: list[str] | None, flags: Any) -> dict[str, Any]:
    """Return only those flags that the command line names."""
    absent = object()
    parsed = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(flags, absent)))
    given = {name: value for name, value in vars(parsed).items() if value is not absent}
    if given.get("data") is None:  # argparse sets an absent positional
        given.pop("data", None)
    return given


def _import_device_modules(names: list[str] | None) -> None:
    for name in names or ():
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UsageError(f"--device-modules {name} cannot be imported: {error}") from None


def _resolve_device(name: str | None) -> str:
    best = torch.accelerator.current_accelerator(check_available=True)
    best = best.type if best else "cpu"
    if not name:
        return best
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name} is no device; here there is {best}") from None
    backend = getattr(torch, device.type, None)
    if device.type != "cpu" and not (backend and backend.is_available()):
        raise UsageError(f"--device {name} is not available here; use --device {best}")
    if device.index is not None and device.index >= backend.device_count():
        raise UsageError(
            f"--device {name} does not exist; there are {backend.device_count()} of {device.type}"
        )
    return name
