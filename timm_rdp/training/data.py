"""The loaders of a run, made by timm's factories with the arguments of timm's script."""

import argparse
import logging
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import (
    AugMixDataset,
    FastCollateMixup,
    Mixup,
    NaFlexMixup,
    create_loader,
    create_naflex_loader,
)
from timm.data.auto_augment import NAME_TO_OP
from timm.utils import is_primary
from torch import nn

from timm_rdp.errors import UsageError, refused_with
from timm_rdp.training.dataset import IMG_MODES, make_dataset
from timm_rdp.training.model import mixup_active, patch_size

_logger = logging.getLogger(__name__)


@dataclass
class Data:
    """The loaders of a run, and what the loop has to know about them."""

    train: Any
    eval: Any | None
    mixup_fn: Mixup | None  # None with the prefetcher, which mixes while it collates
    batch_size_reference: float  # mean batch size of scheduled image sizes, else --batch-size


def create_data(
    args: argparse.Namespace,
    data_config: dict[str, Any],
    model: nn.Module,
    device: torch.device,
    model_dtype: torch.dtype | None,
) -> Data:
    """Create data sets and loaders as timm's script does.

    Args:
        args: the options, with those that timm's `init_distributed_device` adds.
        data_config: from timm's `resolve_data_config`.
        model: asked for its patch size, for NaFlex.
        device: where batches go.
        model_dtype: dtype of the images, None for float32.

    Raises:
        UsageError: a data set cannot be made, or holds more classes than the model has outputs.
    """
    channels = data_config["input_size"][0]
    img_mode = args.input_img_mode or IMG_MODES[channels]
    train = make_dataset(args, img_mode, is_training=True)
    val = make_dataset(args, img_mode, is_training=False) if args.val_split else None
    count = _count_classes(args, train)
    common = dict(
        mean=data_config["mean"],
        std=data_config["std"],
        pin_memory=args.pin_mem,
        img_dtype=model_dtype or torch.float32,
        device=device,
        distributed=args.distributed,
        use_prefetcher=not args.no_prefetcher,
        persistent_workers=args.persistent_workers,
    )
    mix = _mixup_kwargs(args) if mixup_active(args) else None
    if args.aa:
        names = ("Posterize", "PosterizeIncreasing", "PosterizeOriginal")
        NAME_TO_OP.update(dict.fromkeys(names, _posterize))
    with refused_with("timm cannot make a loader with these options"):
        if args.naflex_loader:
            size = patch_size(model)
            with redirect_stdout(None):  # timm prints its schedule
                loaders = _naflex_loaders(args, data_config, train, val, common, mix, size)
        else:
            loaders = _image_loaders(args, data_config, train, val, common, mix)
    if len(loaders[0]) == 0:
        raise UsageError(
            f"--batch-size {args.batch_size} is more than the {len(train)} training images there "
            "are, so that an epoch has no batch; give a smaller one"
        )
    reference = args.batch_size
    if args.train_img_sizes is not None:
        reference = loaders[0].batch_sampler.average_batch_size
    if is_primary(args):
        _log(args, len(train), count, loaders[0].batch_sampler)
    return Data(*loaders, float(reference))


def _count_classes(args: argparse.Namespace, dataset: Any) -> int:
    """How many classes a data set tells, 0 where it does not; refuses more than outputs."""
    reader = getattr(dataset, "reader", None)
    count = len(getattr(dataset, "classes", None) or getattr(reader, "class_to_idx", None) or ())
    if count > args.num_classes:
        raise UsageError(
            f"--data-dir {args.data_dir} has {count} classes, but {args.model} has "
            f"{args.num_classes} outputs; give --num-classes {count}"
        )
    return count


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    if bits_to_keep == 0:  # the black image, an error since Pillow 13
        return image.point(lambda _: 0)
    return image if bits_to_keep >= 8 else ImageOps.posterize(image, bits_to_keep)


def close_data(data: Data) -> None:
    """End the loaders' worker processes; to be called however a run ends.

    Left to the garbage collector after an error in a worker, they are waited for 5 s each: torch's
    iterator is then part of a reference cycle, in which the queues go before it can use them.
    """
    for loader in (data.train, data.eval):
        loader = getattr(loader, "loader", loader)  # the prefetcher's
        for name in ("_iterator", "iterator"):  # torch's persistent workers, timm's multi-epochs
            shut_down = getattr(getattr(loader, name, None), "_shutdown_workers", None)
            if shut_down:
                shut_down()


Loaders = tuple[Any, Any | None, Mixup | None]  # training, validation, mixup left to the loop


def _image_loaders(
    args: argparse.Namespace,
    data_config: dict,
    train: Any,
    val: Any | None,
    common: dict,
    mix: dict | None,
) -> Loaders:
    mixup_fn = None
    if mix is not None:
        kind = Mixup if args.no_prefetcher else FastCollateMixup
        mixup_fn = kind(mode=args.mixup_mode, cutmix_minmax=args.cutmix_minmax, **mix)
    if args.aug_splits > 1:
        train = AugMixDataset(train, num_splits=args.aug_splits)
    progressive = args.train_size_schedule == "progressive"
    create = partial(create_loader, input_size=data_config["input_size"], **common)
    train_loader = create(
        train,
        input_size_choices=args.train_img_sizes,
        batch_size_choices=args.train_batch_sizes,
        batch_choice_weights=args.train_size_probs,
        batch_choice_seed=args.seed,
        batch_choice_schedule=args.train_size_schedule,
        batch_schedule_epochs=args.epochs if progressive else None,
        batch_schedule_spread=args.train_size_schedule_spread,
        batch_schedule_random_mix=args.train_size_random_mix,
        num_batches=args.train_batches_per_epoch,
        collate_fn=None if args.no_prefetcher else mixup_fn,
        use_multi_epochs_loader=args.use_multi_epochs_loader,
        **_train_kwargs(args, data_config),
    )
    val_loader = None if val is None else create(val, **_val_kwargs(args, data_config))
    return train_loader, val_loader, mixup_fn if args.no_prefetcher else None


def _naflex_loaders(
    args: argparse.Namespace,
    data_config: dict,
    train: Any,
    val: Any | None,
    common: dict,
    mix: dict | None,
    own_size: tuple[int, int],
) -> Loaders:
    sizes: dict[str, Any] = dict(patch_size=own_size)
    if args.naflex_patch_sizes:
        sizes = dict(patch_size_choices=args.naflex_patch_sizes)
        if args.naflex_patch_size_probs:
            sizes["patch_size_choice_probs"] = args.naflex_patch_size_probs
    if mix is not None:
        mix = dict(mixup_fn=NaFlexMixup(**mix, mixup_off_epoch=args.mixup_off_epoch))
    channels_last = not args.naflex_patchify_channels_first
    create = partial(create_naflex_loader, patchify_channels_last=channels_last, **common)
    train_loader = create(
        train,
        train_seq_lens=args.naflex_train_seq_lens,
        rank=args.rank,
        world_size=args.world_size,
        **(mix or {}),
        **sizes,
        **_train_kwargs(args, data_config),
    )
    val_kwargs = dict(patch_size=own_size, max_seq_len=args.naflex_max_seq_len)
    return train_loader, val and create(val, **val_kwargs, **_val_kwargs(args, data_config)), None


def _mixup_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    return dict(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
        multi_label=args.task == "multilabel",
    )


# Options that timm's loader factories call as the command line does, and otherwise.
_SAME = (
    *("batch_size", "no_aug", "train_crop_mode", "scale", "ratio", "hflip", "vflip"),
    *("color_jitter", "color_jitter_prob", "grayscale_prob", "gaussian_blur_prob"),
    *("worker_seeding",),
)
_RENAMED = {
    **dict(re_prob="reprob", re_mode="remode", re_count="recount", re_split="resplit"),
    **dict(auto_augment="aa", num_aug_repeats="aug_repeats", num_aug_splits="aug_splits"),
    **dict(num_workers="workers"),
}


def _train_kwargs(args: argparse.Namespace, data_config: dict[str, Any]) -> dict[str, Any]:
    interpolation = None if args.no_aug else args.train_interpolation
    return dict(
        is_training=True,
        interpolation=interpolation or data_config["interpolation"],
        **{name: getattr(args, name) for name in _SAME},
        **{name: getattr(args, option) for name, option in _RENAMED.items()},
    )


def _val_kwargs(args: argparse.Namespace, data_config: dict[str, Any]) -> dict[str, Any]:
    workers = args.workers
    if args.distributed and ("tfds" in args.dataset or "wds" in args.dataset):
        workers = min(2, workers)  # more of them pad the last batches of these readers more
    return dict(
        batch_size=args.validation_batch_size or args.batch_size,
        is_training=False,
        interpolation=data_config["interpolation"],
        num_workers=workers,
        crop_pct=data_config["crop_pct"],
    )


def _log(args: argparse.Namespace, images: int, classes: int, sampler: Any) -> None:
    if 0 < classes < args.num_classes:
        _logger.info(
            f"The model has {args.num_classes} outputs for {classes} classes; --num-classes "
            f"{classes} leaves out what is never trained on"
        )
    if args.demo:
        _logger.info(
            f"Demo: training on {images} of scikit-learn's handwritten digits, in "
            f"{args.data_dir}. For your own images give --data-dir FOLDER, with FOLDER/train and "
            "FOLDER/validation, each of one folder of images per class."
        )
    if args.train_img_sizes is not None:
        _logger.info(
            f"Scheduled image sizes {args.train_img_sizes} with batch sizes {sampler.batch_sizes} "
            f"({args.train_size_schedule}): {len(sampler)} batches per epoch of "
            f"{sampler.average_batch_size:.2f} images on average"
        )
    long_lived = args.persistent_workers or args.use_multi_epochs_loader
    mixes = args.mixup_off_epoch and mixup_active(args) and not args.no_prefetcher
    if mixes and args.workers and long_lived and not args.naflex_loader:
        _logger.warning(
            f"--mixup-off-epoch {args.mixup_off_epoch} does not reach loader processes that live "
            "on, which mix in the prefetcher: add --no-persistent-workers"
        )
