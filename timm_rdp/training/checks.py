"""What can be wrong with the options, found before there is a model, a folder or a file."""

import argparse
import importlib.util
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from timm.data.auto_augment import (
    augment_and_mix_transform,
    auto_augment_transform,
    rand_augment_transform,
)
from timm.models import get_pretrained_cfg, parse_model_name
from timm.optim import list_optimizers

from timm_rdp.errors import UsageError, nearest
from timm_rdp.training.files import check_output

# Flags without effect unless another one is given: rather refused than ignored.
NEEDS = {
    "kd_model_name": (
        "kd_distill_type",
        "kd_loss_type",
        "distill_loss_weight",
        "task_loss_weight",
        "kd_temperature",
        "kd_student_feature_dim",
        "kd_teacher_feature_dim",
        "kd_token_distill_type",
    ),
    "naflex_loader": (
        "naflex_train_seq_lens",
        "naflex_max_seq_len",
        "naflex_patch_sizes",
        "naflex_patch_size_probs",
        "naflex_loss_scale",
        "naflex_patchify_channels_first",
    ),
    "train_img_sizes": (
        "train_batch_sizes",
        "train_size_probs",
        "train_size_schedule",
        "train_size_schedule_spread",
        "train_size_random_mix",
        "train_batches_per_epoch",
        "variable_batch_loss_scale",
    ),
    "torchcompile": ("torchcompile_mode",),
}

Check = Callable[[float], bool]

RANGES: tuple[tuple[str, Check, tuple[str, ...]], ...] = (
    (
        "must be at least 0 and below 1",
        lambda x: 0 <= x < 1,
        ("drop", "drop_path", "drop_block", "smoothing"),
    ),
    (
        "must be between 0 and 1",
        lambda x: 0 <= x <= 1,
        (
            "mixup_prob",
            "mixup_switch_prob",
            "hflip",
            "vflip",
            "color_jitter_prob",
            "grayscale_prob",
            "gaussian_blur_prob",
            "reprob",
            "model_ema_decay",
            "train_size_random_mix",
        ),
    ),
    (
        "must be a number of at least 0",
        lambda x: 0 <= x < math.inf,
        (
            "lr",
            "lr_base",
            "min_lr",
            "warmup_lr",
            "weight_decay",
            "momentum",
            "clip_grad",
            "mixup",
            "cutmix",
            "color_jitter",
            "epoch_repeats",
            "aug_repeats",
            "opt_eps",
            "layer_decay",
            "decay_rate",
            "bce_pos_weight",
        ),
    ),
    (
        "must be a number above 0",
        lambda x: 0 < x < math.inf,
        ("crop_pct", "decay_epochs", "kd_temperature", "bn_eps"),
    ),
    (
        "must be at least 1",
        lambda x: x >= 1,
        (
            "batch_size",
            "validation_batch_size",
            "num_classes",
            "img_size",
            "in_chans",
            "lr_base_size",
            "log_interval",
            "val_interval",
            "checkpoint_hist",
            "recount",
            "rdp_every",
            "train_num_samples",
            "val_num_samples",
            "train_batches_per_epoch",
            "naflex_max_seq_len",
        ),
    ),
    (
        "must be at least 0",
        lambda x: x >= 0,
        (
            "epochs",
            "start_epoch",
            "warmup_epochs",
            "cooldown_epochs",
            "patience_epochs",
            "mixup_off_epoch",
            "recovery_interval",
            "workers",
            "tta",
            "rdp_start_epoch",
        ),
    ),
    ("must be between 0 and 4294967295", lambda x: 0 <= x < 2**32, ("seed",)),
    ("must be 0, or 2 and more", lambda x: x == 0 or x >= 2, ("aug_splits",)),
)

_INTERPOLATIONS = ("", "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")

CHOICES = {
    "amp_dtype": ("float16", "bfloat16"),
    "model_dtype": (None, "float32", "float16", "bfloat16"),
    "clip_mode": ("norm", "value", "agc"),
    "eval_metric": ("top1", "top5", "loss"),
    "remode": ("const", "rand", "pixel"),
    "mixup_mode": ("batch", "pair", "elem", "half"),
    "worker_seeding": ("all", "part"),
    "train_crop_mode": (None, "rrc", "rkrc", "rkrr"),
    "interpolation": _INTERPOLATIONS[:-1],
    "train_interpolation": _INTERPOLATIONS,
    "lr_base_scale": ("", "linear", "sqrt"),
    "dist_bn": ("", "broadcast", "reduce"),
    "fuser": ("", "te", "old", "legacy", "nvfuser", "nvf"),
    "kd_loss_type": ("kl",),
    "sched": (
        "cosine",
        "tanh",
        "step",
        "multistep",
        "poly",
        "plateau",
        "wsd",
        "rsqrt",
        "constant",
        "none",
    ),
}

# Arguments that flags already give, so that key=value would give them twice.
MODEL_FLAGS = {
    "pretrained": "pretrained",
    "in_chans": "in_chans",
    "num_classes": "num_classes",
    "drop_rate": "drop",
    "drop_path_rate": "drop_path",
    "drop_block_rate": "drop_block",
    "global_pool": "gp",
    "bn_momentum": "bn_momentum",
    "bn_eps": "bn_eps",
    "scriptable": "torchscript",
    "checkpoint_path": "initial_checkpoint",
}
OPTIMIZER_FLAGS = {
    "opt": "opt",
    "lr": "lr",
    "weight_decay": "weight_decay",
    "momentum": "momentum",
    "layer_decay": "layer_decay",
    "layer_decay_min_scale": "layer_decay_min_scale",
    "layer_decay_no_opt_scale": "layer_decay_no_opt_scale",
}


def check_options(args: argparse.Namespace, explicit: set[str], defaults: dict[str, Any]) -> None:
    """Check everything about the options that needs neither the model nor the data.

    Args:
        args: the options, complete.
        explicit: names of the flags that the user gave.
        defaults: every flag's default.

    Raises:
        UsageError: one line that names the flag, its value and the fix.
    """
    for text, holds, names in RANGES:
        for name in names:
            value = getattr(args, name)
            if value is not None and not holds(value):
                raise UsageError(f"{flag(name)} {value} {text}")
    for name, choices in CHOICES.items():
        value = getattr(args, name)
        if value not in choices:
            known = ", ".join(choice for choice in choices if choice)
            raise UsageError(f"{flag(name)} {value} is not one of {known}")
    _check_needs(args, defaults)
    _check_rdp(args, explicit)
    _check_model_name(args.model)
    _check_optimizer(args)
    _check_lists(args)
    _check_policy(args.aa)
    _check_combinations(args)
    check_output(Path(args.output or "output/train") / args.experiment)


def flag(name: str) -> str:
    """Return the flag of an option's name."""
    return "--local_rank" if name == "local_rank" else f"--{name.replace('_', '-')}"


def _check_needs(args, defaults):
    for needed, names in NEEDS.items():
        for name in names:
            value = getattr(args, name)
            if not getattr(args, needed) and value != defaults[name]:
                shown = "" if value is True else f" {_joined(value)}"
                raise UsageError(f"{flag(name)}{shown} has no effect without {flag(needed)}")


def _check_rdp(args, explicit):
    if args.drop_connect is not None:
        raise UsageError(
            f"--drop-connect {args.drop_connect} has no effect in timm any more; "
            f"give --drop-path {args.drop_connect}"
        )
    if not args.rdp:
        for name in sorted(explicit):
            if name.startswith("rdp_"):
                raise UsageError(f"{flag(name)} {getattr(args, name)} needs --rdp; add it")
    elif args.drop_path == 0:
        raise UsageError("--rdp --drop-path 0 drops nothing; give a rate above 0, such as 0.1")
    elif args.torchscript:
        raise UsageError(
            "--torchscript cannot go with --rdp: inside a scripted model neither the masks nor "
            "what is frozen can be changed; leave one of them out"
        )


def _check_model_name(name: str) -> None:
    try:
        source, rest = parse_model_name(name)
    except ValueError as error:
        raise UsageError(f"--model {name}: {str(error).splitlines()[0]}") from None
    if source == "local-dir" and not os.path.isfile(os.path.join(rest, "config.json")):
        raise UsageError(f"--model {name}: {rest} is not a folder with a config.json")
    if source:
        return
    architecture, _, tag = rest.partition(".")
    if not timm.is_model(architecture):
        close = nearest(architecture, timm.list_models()) or "; timm.list_models() lists them"
        raise UsageError(f"--model {name}: timm has no such model{close}")
    try:
        get_pretrained_cfg(rest, allow_unregistered=False)
    except RuntimeError:
        tags = timm.list_models(f"{architecture}.*", pretrained=True)
        known = f"; there are {', '.join(tags)}" if tags else ""
        raise UsageError(f"--model {name}: timm has no weights {tag!r} of it{known}") from None


def _check_optimizer(args):
    known = list_optimizers()
    # timm takes a name in any case, and lookahead_NAME around any of them.
    name = args.opt.lower().removeprefix("lookahead_")
    if name not in known and name not in ("nesterov", "nesterovw"):
        close = nearest(name, known) or "; timm.optim.list_optimizers() lists them"
        raise UsageError(f"--opt {args.opt}: timm has no such optimizer{close}")
    for kwargs, flags, option in (
        (args.model_kwargs, MODEL_FLAGS, "--model-kwargs"),
        (args.opt_kwargs, OPTIMIZER_FLAGS, "--opt-kwargs"),
    ):
        for key in kwargs:
            if key in flags:
                raise UsageError(f"{option} {key}={kwargs[key]}: give {flag(flags[key])} instead")


def _check_lists(args):
    in_chans = args.input_size[0] if args.input_size else args.in_chans or 3
    if args.input_size and min(args.input_size) < 1:
        raise UsageError(f"--input-size {_joined(args.input_size)} must be three sizes of 1 up")
    for name in ("mean", "std"):
        values = getattr(args, name)
        if values and len(values) not in (1, in_chans):
            raise UsageError(
                f"{flag(name)} {_joined(values)} must be 1 or {in_chans} values, one per channel"
            )
    for name in ("scale", "ratio", "cutmix_minmax"):
        values = getattr(args, name)
        if values and not (len(values) == 2 and 0 < values[0] <= values[1] < math.inf):
            raise UsageError(
                f"{flag(name)} {_joined(values)} must be two numbers, the smaller one first"
            )
    if args.decay_milestones != sorted(set(args.decay_milestones)):
        raise UsageError(f"--decay-milestones {_joined(args.decay_milestones)} must increase")
    if args.lr_noise and len(args.lr_noise) > 2:
        raise UsageError(f"--lr-noise {_joined(args.lr_noise)} must be one or two numbers")
    sizes = args.train_img_sizes
    for name in ("train_batch_sizes", "train_size_probs"):
        values = getattr(args, name)
        if values and len(values) != len(sizes or ()):
            raise UsageError(
                f"{flag(name)} {_joined(values)} must be one value for each of "
                f"--train-img-sizes {_joined(sizes or ['(not given)'])}"
            )
    probs = args.naflex_patch_size_probs
    if probs and len(probs) != len(args.naflex_patch_sizes or ()):
        raise UsageError(
            f"--naflex-patch-size-probs {_joined(probs)} must be one value for each of "
            f"--naflex-patch-sizes {_joined(args.naflex_patch_sizes or ['(not given)'])}"
        )


def _check_policy(policy: str | None) -> None:
    if not policy:
        return
    if policy.startswith("rand"):
        build = rand_augment_transform
    elif policy.startswith("augmix"):
        build = augment_and_mix_transform
    else:
        build = auto_augment_transform
    try:
        build(policy, {"translate_const": 100, "img_mean": (124, 116, 104)})
    except (AssertionError, ValueError, KeyError) as error:
        reason = f": {error}" if str(error) else ""
        raise UsageError(f"--aa {policy} is no policy that timm knows{reason}") from None


def _check_combinations(args):
    mixing = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    wrong = {
        "--amp needs float32 weights: leave --model-dtype out, or --amp": args.amp
        and args.model_dtype not in (None, "float32"),
        f"--aug-repeats {args.aug_repeats:g} needs distributed training; leave it out": (
            args.aug_repeats and not timm.utils.distributed.is_distributed_env()
        ),
        "--jsd-loss needs --aug-splits 2 or more": args.jsd_loss and args.aug_splits < 2,
        "--split-bn needs --aug-splits 2 or more, or --resplit": args.split_bn
        and args.aug_splits < 2
        and not args.resplit,
        "--split-bn and --sync-bn exclude each other": args.split_bn and args.sync_bn,
        f"--aug-splits {args.aug_splits} needs --no-prefetcher with mixup or cutmix": (
            args.aug_splits and mixing and not args.no_prefetcher
        ),
        f"--aug-splits {args.aug_splits} and --no-aug exclude each other": args.aug_splits
        and args.no_aug,
        f"--aug-splits {args.aug_splits} and --naflex-loader exclude each other": args.aug_splits
        and args.naflex_loader,
        "--train-img-sizes and --naflex-loader exclude each other": args.train_img_sizes
        and args.naflex_loader,
        "--train-img-sizes and --aug-splits exclude each other": args.train_img_sizes
        and args.aug_splits,
        "--use-multi-epochs-loader and --train-img-sizes exclude each other": (
            args.use_multi_epochs_loader and args.train_img_sizes
        ),
        "--use-multi-epochs-loader and --naflex-loader exclude each other": (
            args.use_multi_epochs_loader and args.naflex_loader
        ),
        f"--batch-size {args.batch_size} must be even with mixup or cutmix": mixing
        and args.batch_size % 2
        and not args.naflex_loader
        and not args.train_batch_sizes,
        f"--train-batch-sizes {_joined(args.train_batch_sizes)} must be even with mixup": mixing
        and any(size % 2 for size in args.train_batch_sizes or ()),
        "--mixup-mode half needs the prefetcher: leave --no-prefetcher out": mixing
        and args.mixup_mode == "half"
        and args.no_prefetcher,
        "--torchscript and --torchcompile exclude each other": args.torchscript
        and args.torchcompile,
        "--torchscript and --sync-bn exclude each other": args.torchscript and args.sync_bn,
        "--sched plateau works by epochs: leave --sched-on-updates out": args.sched == "plateau"
        and args.sched_on_updates,
        "--wandb-resume-id needs --resume": args.wandb_resume_id and not args.resume,
        "--log-wandb needs wandb, which is not installed: pip install wandb": args.log_wandb
        and importlib.util.find_spec("wandb") is None,
    }
    for message, holds in wrong.items():
        if holds:
            raise UsageError(message)


def _joined(values) -> str:
    return " ".join(map(str, values)) if isinstance(values, list) else str(values)
