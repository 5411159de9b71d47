"""From the command line to checked options: timm's defaults < demo recipe < -c FILE < flags."""

import argparse
import importlib
import importlib.util
import logging
import re
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from PIL import ImageMode
from timm.data.transforms_factory import transforms_imagenet_train
from timm.utils.distributed import is_distributed_env

import timm_rdp
from timm_rdp.core.versions import best_device
from timm_rdp.errors import UsageError, nearest, refused_with
from timm_rdp.training.dataset import IMG_MODES, prepare_demo
from timm_rdp.training.flags import build_parser, flag
from timm_rdp.training.model import mixup_active, no_such_model

_logger = logging.getLogger(__name__)

DEMO_RECIPE = "demo_digits"
RDP_DROP_PATH = 0.1

# Flags, or beginnings of flags, without effect where another one is not given.
NEEDS = {
    "rdp": ("rdp_",),
    "kd_model_name": ("kd_", "distill_loss_weight", "task_loss_weight"),
    "naflex_loader": ("naflex_",),
    "train_img_sizes": ("train_batch", "train_size_", "variable_batch_loss_scale"),
    "torchcompile": ("torchcompile_mode",),
    "aug_splits": ("jsd_loss",),
    "resume": ("wandb_resume_id",),
    "pretrained": ("pretrained_path",),
}
EXCLUSIVE = (
    ("aug_splits", "no_aug"),
    ("aug_splits", "naflex_loader"),
    ("aug_splits", "train_img_sizes"),
    ("kd_model_name", "naflex_loader"),
    ("save_images", "naflex_loader"),
    ("split_bn", "sync_bn"),
    ("torchscript", "rdp"),
    ("torchscript", "sync_bn"),
    ("torchscript", "torchcompile"),
    ("train_img_sizes", "naflex_loader"),
    ("use_multi_epochs_loader", "naflex_loader"),
    ("use_multi_epochs_loader", "train_img_sizes"),
)
# Lists with one value for each of another list.
PER_VALUE = {
    "train_batch_sizes": "train_img_sizes",
    "train_size_probs": "train_img_sizes",
    "naflex_patch_size_probs": "naflex_patch_sizes",
}


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
    parser.epilog = f"Recipes that -c takes by name: {', '.join(recipes())}."
    defaults = vars(parser.parse_args([]))
    typed = typed_flags(parser, argv)
    config = read_config(typed["config"], parser) if typed.get("config") else {}
    given = {**config, **typed}
    demo = not any(given.get(name) for name in ("data", "data_dir", "dataset"))
    if demo:
        given = {**read_config(recipes()[DEMO_RECIPE], parser), **given}
    args = argparse.Namespace(**{**defaults, **given})

    # A config may spell out defaults, as args.yaml does: only a change counts there.
    explicit = set(typed) | {name for name, value in config.items() if value != defaults[name]}
    for module in args.device_modules or ():
        with refused_with(f"--device-modules {module}"):
            importlib.import_module(module)
    args.device = resolve_device(args.device)
    if args.rdp and args.drop_path is None:
        args.drop_path = RDP_DROP_PATH
        _logger.info(f"--rdp without --drop-path: taking --drop-path {RDP_DROP_PATH}")
    args.data_dir = args.data_dir or args.data
    _take_former_names(args)
    _check_effects(args, explicit)
    _check_values(args)
    _check_lists(args)
    args.demo = demo
    if demo:
        args.data_dir = str(prepare_demo())
    return args


def args_text(args: argparse.Namespace) -> str:
    """Return the flags as YAML, the text of args.yaml, which `-c` reads back.

    To be called before anything derived is written into `args` (timm writes the text so).
    """
    chosen = {name: value for name, value in vars(args).items() if name not in ("config", "demo")}
    return yaml.safe_dump(chosen, default_flow_style=False)


def recipes() -> dict[str, Path]:
    """Return the recipes of `configs/` by name, in a checkout or installed."""
    package = Path(timm_rdp.__file__).parent
    folders = (package / "configs", package.parent / "configs")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def typed_flags(parser: argparse.ArgumentParser, argv: list[str] | None) -> dict[str, Any]:
    """Return only those flags that a command line names, with their values."""
    absent = object()
    names = (action.dest for action in parser._actions)
    parsed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, absent))))
    if parsed["data"] is None:  # argparse sets a positional argument that is absent
        del parsed["data"]
    return {name: value for name, value in parsed.items() if value is not absent}


def read_config(path: str | Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Read a YAML mapping of flags, turned into words of a command line and parsed as such.

    The file may also be the name of a recipe. Keys are the flags' names, with underscores or
    dashes. A null is a flag that is not given; for --color-jitter it means none.

    Raises:
        UsageError: the file is missing, not YAML or not a mapping; a key is unknown or given twice;
            a value does not fit its flag.
    """
    known = recipes()
    file = Path(path)
    if str(path) in known and not file.is_file():
        file = known[str(path)]
    with refused_with(f"--config {path} (recipes: {', '.join(known)})"):
        text = file.read_bytes()
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
        return {**config, **typed_flags(parser, words)}
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
    if nargs == "?" and isinstance(value, bool):
        return [flag(name)] * value
    kind = {0: bool, 3: list, "+": list, "*": dict}.get(nargs, (str, int, float))
    if not isinstance(value, kind) or isinstance(value, bool) != (nargs == 0):
        what = {bool: "true or false", list: "a list", dict: "a mapping"}.get(kind, "one value")
        raise UsageError(f"{flag(name)} takes {what}, got {value!r}")
    if nargs == 0:
        return [flag(name if value else f"no_{name}")]
    if not isinstance(value, (list, dict)):
        return [f"{flag(name)}={value}"]
    pairs = isinstance(value, dict) and [f"{key}={item!r}" for key, item in value.items()]
    words = pairs or [str(item) for item in value]
    # A word that begins with a dash, and is no number, would be taken for a flag.
    if any(re.match("-[^0-9.]", word) for word in words):
        raise UsageError(f"{flag(name)} takes nothing that begins with a dash, got {value!r}")
    return [flag(name), *words]


def resolve_device(name: str | None) -> str:
    """The device that `--device` names, by default the best there is; UsageError if it is none."""
    best = best_device()
    if not name:
        return best
    with refused_with(f"--device {name}"):
        device = torch.device(name)
    here = getattr(torch, device.type, None)
    if not (here and here.is_available() and (device.index or 0) < here.device_count()):
        raise UsageError(f"--device {name} is not available here; use --device {best}")
    return name


def _take_former_names(args: argparse.Namespace) -> None:
    """Set what timm's former flags of losses mean today, and the defaults that the task decides."""
    weight = args.bce_pos_weight
    for former, name, value in (
        ("bce_loss", "loss", "bce" if args.bce_loss else None),
        ("jsd_loss", "loss", "jsd" if args.jsd_loss else None),
        ("bce_pos_weight", "loss_pos_weight", None if weight is None else str(weight)),
    ):
        if value is not None:
            if getattr(args, name) not in (None, value):
                raise UsageError(f"{flag(former)} cannot be combined with {_shown(args, name)}")
            _logger.warning(f"{flag(former)} is deprecated: {flag(name)} {value}")
            setattr(args, name, value)
    if args.smoothing is None:
        args.smoothing = 0.0 if args.task == "multilabel" else 0.1


def _check_effects(args: argparse.Namespace, explicit: set[str]) -> None:
    """Refuse flags that were given and would do nothing, and pairs that cannot be combined."""
    for name in sorted(explicit):
        for needed, beginnings in NEEDS.items():
            if name.startswith(beginnings) and name != needed and not getattr(args, needed):
                raise UsageError(f"{_shown(args, name)} has no effect without {flag(needed)}")
        loss = name.partition("_")[0]
        if loss in ("asl", "poly", "twoway", "db") and args.loss != loss:
            raise UsageError(f"{_shown(args, name)} has no effect without --loss {loss}")
    for one, other in EXCLUSIVE:
        if getattr(args, one) and getattr(args, other):
            raise UsageError(f"{flag(one)} cannot be combined with {flag(other)}; leave one out")


def _check_values(args: argparse.Namespace) -> None:
    """Refuse what timm would let pass, or fail with in the first epoch."""
    # timm takes a name with an empty tag for one without a tag.
    if ":" not in args.model and (not timm.is_model(args.model) or args.model.endswith(".")):
        raise UsageError(no_such_model(args.model))
    with refused_with(f"--aa {args.aa}"):
        transforms_imagenet_train(auto_augment=args.aa)
    low_dtype = args.model_dtype not in (None, "float32")
    mixes, multilabel = mixup_active(args), args.task == "multilabel"
    sizes = "train_batch_sizes" if args.train_batch_sizes else "batch_size"
    is_odd = any(size % 2 for size in args.train_batch_sizes or [args.batch_size])
    for name, is_wrong, why in (
        ("drop_path", args.rdp and args.drop_path == 0, "drops nothing with --rdp; try 0.1"),
        ("drop_connect", args.drop_connect is not None, "has no effect; give --drop-path"),
        ("amp", args.amp and low_dtype, "needs float32 weights; leave --model-dtype out"),
        ("sched_on_updates", args.sched == "plateau", "cannot be used with --sched plateau"),
        ("aug_repeats", not is_distributed_env(), "needs distributed training; leave it out"),
        ("aug_splits", args.aug_splits == 1, "splits nothing; give 0, or 2 and more"),
        ("split_bn", not (args.aug_splits or args.resplit), "needs --aug-splits, or --resplit"),
        ("loss", mixes and args.loss == "jsd", "compares classes, which mixup and cutmix mix"),
        ("aug_splits", mixes and not args.no_prefetcher, "needs --no-prefetcher with mixup"),
        ("no_prefetcher", mixes and args.mixup_mode == "half", "is not for --mixup-mode half"),
        (sizes, mixes and is_odd and not args.naflex_loader, "must be even with mixup or cutmix"),
        ("log_wandb", not importlib.util.find_spec("wandb"), "needs wandb: pip install wandb"),
        ("target_format", not multilabel, "needs --task multilabel"),
        ("task", multilabel and not args.num_classes, "needs --num-classes N"),
        ("kd_model_name", multilabel, "cannot be used with --task multilabel"),
    ):
        if is_wrong and (getattr(args, name) or name in ("drop_path", "drop_connect")):
            raise UsageError(f"{_shown(args, name)} {why}")


def _check_lists(args: argparse.Namespace) -> None:
    channels = args.input_size[0] if args.input_size else args.in_chans or 3
    if args.in_chans not in (None, channels):
        raise UsageError(
            f"--in-chans {args.in_chans} does not fit {_shown(args, 'input_size')}; leave one out"
        )
    if mode := args.input_img_mode:
        with refused_with(f"--input-img-mode {mode}: PIL has no such mode"):
            bands = len(ImageMode.getmode(mode).bands)
        if bands != channels:
            raise UsageError(
                f"--input-img-mode {mode} has {bands} channels, and the model takes {channels}; "
                f"give --in-chans {bands}"
            )
    elif channels not in IMG_MODES:
        raise UsageError(f"--in-chans {channels}: name the images' mode with --input-img-mode")
    for name in ("mean", "std"):
        if len(getattr(args, name) or "1") not in (1, channels):
            raise UsageError(f"{_shown(args, name)} must be one value or {channels}, per channel")
    for name in ("scale", "ratio", "cutmix_minmax"):
        values = getattr(args, name)
        if values and not (len(values) == 2 and 0 < values[0] <= values[1]):
            raise UsageError(f"{_shown(args, name)} must be two numbers, the smaller one first")
    if args.decay_milestones != sorted(set(args.decay_milestones)):
        raise UsageError(f"{_shown(args, 'decay_milestones')} must increase")
    for name, other in PER_VALUE.items():
        if getattr(args, name) and len(getattr(args, name)) != len(getattr(args, other) or ()):
            raise UsageError(f"{_shown(args, name)} must be one for each of {_shown(args, other)}")


def _shown(args: argparse.Namespace, name: str) -> str:
    """Return a flag and its value as on the command line."""
    value = getattr(args, name)
    words = value if isinstance(value, list) else [] if value is True else [value]
    return " ".join([flag(name), *map(str, words)])
