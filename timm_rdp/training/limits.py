"""Combinations that timm's library cannot run, refused before the first batch."""

from __future__ import annotations

import argparse
import difflib

import torch

from timm_rdp.errors import UsageError
from timm_rdp.training.data import Data


def check_limits(args: argparse.Namespace) -> None:
    """Refuse what would fail in the first epoch with a traceback out of a library.

    Raises:
        UsageError: names the flags and what to leave out.
    """
    if args.save_images and args.naflex_loader:
        raise UsageError("--save-images: the batches of --naflex-loader are patches; leave one out")
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if args.jsd_loss and mixes:
        raise UsageError("--jsd-loss compares classes, which mixup and cutmix mix; leave one out")
    if args.kd_model_name and args.naflex_loader:
        raise UsageError("--kd-model-name: no teacher takes the patches of --naflex-loader")
    if args.torchcompile:
        _check_backend(args.torchcompile)


def check_tta(args: argparse.Namespace, data: Data) -> None:
    """Refuse validation batches that `--tta` cannot average over.

    Raises:
        UsageError: naming the sizes.
    """
    if args.tta < 2 or data.eval is None:
        return
    batch = args.validation_batch_size or args.batch_size
    images = len(data.eval.dataset)
    if batch % args.tta or images % args.tta:
        raise UsageError(
            f"--tta {args.tta} averages that many validation samples in a row: the validation "
            f"batch size ({batch}) and the number of samples ({images}) must be multiples of it"
        )


def _check_backend(name: str) -> None:
    known = torch.compiler.list_backends(exclude_tags=())
    if name not in known:
        near = difflib.get_close_matches(name, known) or known
        raise UsageError(
            f"--torchcompile {name} is no backend of torch.compile; there is {', '.join(near)}"
        )
