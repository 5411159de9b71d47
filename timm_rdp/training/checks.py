"""What argparse, timm and torch let pass, or refuse too late, found before anything is written."""

import argparse
import importlib.util
from pathlib import Path

import timm
import torch
from timm.data.transforms_factory import transforms_imagenet_train
from timm.utils.distributed import is_distributed_env

from timm_rdp.errors import UsageError, nearest, refused_with
from timm_rdp.training.data import Data
from timm_rdp.training.files import check_output
from timm_rdp.training.flags import flag

# Flags, or beginnings of flags, without effect where another one is not given.
NEEDS = {
    "rdp": ("rdp_",),
    "kd_model_name": ("kd_", "distill_loss_weight", "task_loss_weight"),
    "naflex_loader": ("naflex_",),
    "train_img_sizes": ("train_batch", "train_size_", "variable_batch_loss_scale"),
    "torchcompile": ("torchcompile_mode",),
    "aug_splits": ("jsd_loss",),
    "resume": ("wandb_resume_id",),
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


def check_options(args: argparse.Namespace, explicit: set[str]) -> None:
    """Check everything about the options that needs neither the model nor the data.

    Args:
        args: the options, complete.
        explicit: names of the flags that the user gave.

    Raises:
        UsageError: one line that names the flag, its value and the fix.
    """
    for name in sorted(explicit):
        for needed, beginnings in NEEDS.items():
            if name.startswith(beginnings) and name != needed and not getattr(args, needed):
                raise UsageError(f"{_shown(args, name)} has no effect without {flag(needed)}")
    _check_names(args)
    _check_lists(args)
    check_limits(args)
    check_output(Path(args.output or "output/train") / args.experiment)


def check_limits(args: argparse.Namespace) -> None:
    """Refuse options that cannot be combined, or that timm would fail with in the first epoch.

    Raises:
        UsageError: names the flags and what to leave out.
    """
    for one, other in EXCLUSIVE:
        if getattr(args, one) and getattr(args, other):
            raise UsageError(f"{flag(one)} cannot be combined with {flag(other)}; leave one out")
    distributed = is_distributed_env()
    low_dtype = args.model_dtype not in (None, "float32")
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    mixes_half = mixes and args.mixup_mode == "half"
    sizes = "train_batch_sizes" if args.train_batch_sizes else "batch_size"
    is_odd = any(size % 2 for size in args.train_batch_sizes or [args.batch_size])
    no_wandb = args.log_wandb and importlib.util.find_spec("wandb") is None
    for name, is_wrong, why in (
        ("rdp_every", args.rdp_every < 1, "must be at least 1"),
        ("rdp_start_epoch", args.rdp_start_epoch < 0, "must be at least 0"),
        ("drop_path", args.rdp and args.drop_path == 0, "drops nothing with --rdp; try 0.1"),
        ("drop_connect", args.drop_connect is not None, "has no effect; give --drop-path"),
        ("amp", args.amp and low_dtype, "needs float32 weights; leave --model-dtype out"),
        ("sched_on_updates", args.sched == "plateau", "cannot be used with --sched plateau"),
        ("aug_repeats", not distributed, "needs distributed training; leave it out"),
        ("aug_splits", args.aug_splits == 1, "splits nothing; give 0, or 2 and more"),
        ("split_bn", not (args.aug_splits or args.resplit), "needs --aug-splits, or --resplit"),
        ("jsd_loss", mixes, "compares classes, which mixup and cutmix mix; leave one out"),
        ("aug_splits", mixes and not args.no_prefetcher, "needs --no-prefetcher with mixup"),
        ("no_prefetcher", mixes_half, "cannot be used with --mixup-mode half"),
        (sizes, mixes and is_odd and not args.naflex_loader, "must be even with mixup or cutmix"),
        ("log_wandb", no_wandb, "needs wandb: pip install wandb"),
    ):
        # Elsewhere a 0 is off.
        if is_wrong and (getattr(args, name) or name in ("rdp_every", "drop_path", "drop_connect")):
            raise UsageError(f"{_shown(args, name)} {why}")


def check_tta(args: argparse.Namespace, data: Data) -> None:
    """Refuse validation batches that `--tta` cannot average over: UsageError names the sizes."""
    if args.tta < 2 or data.eval is None:
        return
    batch = args.validation_batch_size or args.batch_size
    images = len(data.eval.dataset)
    if batch % args.tta or images % args.tta:
        raise UsageError(
            f"--tta {args.tta} averages that many validation samples in a row: the validation "
            f"batch size ({batch}) and the number of samples ({images}) must be multiples of it"
        )


def _check_names(args: argparse.Namespace) -> None:
    # timm takes a name with an empty tag for one without a tag.
    if ":" not in args.model and (not timm.is_model(args.model) or args.model.endswith(".")):
        close = nearest(args.model, timm.list_models())
        raise UsageError(f"--model {args.model}: timm has no such model{close}")
    with refused_with(f"--aa {args.aa}"):
        transforms_imagenet_train(auto_augment=args.aa)
    backend = args.torchcompile
    if backend and backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise UsageError(f"--torchcompile {backend}: no such backend{nearest(backend, known)}")


def _check_lists(args: argparse.Namespace) -> None:
    channels = args.input_size[0] if args.input_size else args.in_chans or 3
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
