"""Data sets and loaders, made by timm's factories with the arguments of timm's script."""

import argparse
import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from timm.data import (
    AugMixDataset,
    FastCollateMixup,
    ImageDataset,
    Mixup,
    NaFlexMixup,
    create_dataset,
    create_loader,
    create_naflex_loader,
)
from timm.data.dataset_factory import _search_split
from timm.data.readers import create_reader
from timm.models import get_pretrained_cfg, parse_model_name
from timm.utils import is_primary
from torch import nn

from timm_rdp.errors import DataError, UsageError
from timm_rdp.training.img_size import check_model_takes

_logger = logging.getLogger(__name__)


@dataclass
class Data:
    """The loaders of a run, and what the loop has to know about them."""

    train: Any
    eval: Any | None
    mixup_fn: Mixup | None  # None with the prefetcher, which mixes while it collates
    mixup_active: bool
    num_aug_splits: int
    batch_size_reference: float  # mean batch size of scheduled image sizes, else --batch-size
    naflex: bool
    scheduled: bool


def check_data(args: argparse.Namespace) -> int | None:
    """Check the data folder before there is a model: both splits, their classes, their number.

    Returns:
        the number of classes, or None for a data set that is not a folder or a tar.

    Raises:
        UsageError: a folder is missing or empty, the splits differ in their classes, or the classes
            do not fit `--num-classes` or, without it, the model's own number.
    """
    if not _is_folder(args):
        return None
    root = args.data_dir
    if not root:
        raise UsageError(f"--dataset {args.dataset} needs --data-dir FOLDER")
    if not os.path.exists(root):
        raise UsageError(f"--data-dir {root} does not exist")
    train_root = _split_root(root, args.train_split)
    train = _reader(train_root, args.class_map, args.input_key)
    if args.val_split:
        val_root = _split_root(root, args.val_split)
        if train_root != root and val_root == root:
            raise UsageError(
                f"--data-dir {root} has no folder for --val-split {args.val_split}; make one, or "
                "give --val-split '' to train without validation"
            )
        if train_root == root and val_root != root:
            raise UsageError(
                f"--data-dir {root} has no folder for --train-split {args.train_split}"
            )
        if train_root == val_root:
            _logger.warning(f"{root} is not split: validation sees the images of training")
        val = _reader(val_root, args.class_map, args.input_key)
        if not args.class_map:
            _check_same_classes(train, val, args)
    if args.class_map:
        return max(train.class_to_idx.values()) + 1
    count = len(train.class_to_idx)
    _check_class_count(count, args)
    return count


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
        model: the model before it is wrapped; only asked for its patch size and class count.
        device: where batches go.
        model_dtype: dtype of the images, None for float32.

    Raises:
        UsageError: a data set cannot be made, or holds more classes than the model has outputs.
    """
    check_model_takes(args, data_config, model)
    channels = data_config["input_size"][0]
    img_mode = args.input_img_mode or ("RGB" if channels == 3 else "L")
    dataset_train = _dataset(args, args.train_split, img_mode, is_training=True)
    dataset_eval = None
    if args.val_split:
        dataset_eval = _dataset(args, args.val_split, img_mode, is_training=False)
    _check_outputs(dataset_train, args)
    if args.demo and is_primary(args):
        _logger.info(
            f"Demo: training on {len(dataset_train)} of scikit-learn's handwritten digits, in "
            f"{args.data_dir}. For your own images give --data-dir FOLDER, with FOLDER/train and "
            "FOLDER/validation, each of one folder of images per class."
        )

    mixup_active = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    mixup_args = dict(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
    )
    common = dict(
        mean=data_config["mean"],
        std=data_config["std"],
        pin_memory=args.pin_mem,
        img_dtype=model_dtype or torch.float32,
        device=device,
        distributed=args.distributed,
        use_prefetcher=not args.no_prefetcher,
    )
    data = Data(
        train=None,
        eval=None,
        mixup_fn=None,
        mixup_active=mixup_active,
        num_aug_splits=args.aug_splits,
        batch_size_reference=float(args.batch_size),
        naflex=args.naflex_loader,
        scheduled=args.train_img_sizes is not None,
    )
    try:
        if args.naflex_loader:
            patch_size = _patch_size(model)
            data.train = _naflex_train(
                args, data_config, dataset_train, common, mixup_active and mixup_args, patch_size
            )
        else:
            collate_fn = None
            if mixup_active and args.no_prefetcher:
                data.mixup_fn = Mixup(**mixup_args)
            elif mixup_active:
                collate_fn = FastCollateMixup(**mixup_args)
            data.train = _train(args, data_config, dataset_train, common, collate_fn)
        if data.scheduled:
            data.batch_size_reference = data.train.batch_sampler.average_batch_size
            _log_schedule(args, data.train.batch_sampler)
        if dataset_eval is not None:
            evaluation = _eval_kwargs(args, data_config)
            if args.naflex_loader:
                data.eval = create_naflex_loader(
                    dataset_eval,
                    patch_size=patch_size,
                    max_seq_len=args.naflex_max_seq_len,
                    patchify_channels_last=not args.naflex_patchify_channels_first,
                    **common,
                    **evaluation,
                )
            else:
                data.eval = create_loader(
                    dataset_eval, input_size=data_config["input_size"], **common, **evaluation
                )
    except (AssertionError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"timm cannot make a loader with these options: {reason}") from error
    if len(data.train) == 0:
        raise UsageError(
            f"--batch-size {args.batch_size} is more than the {len(dataset_train)} training images "
            "there are, so that an epoch has no batch; give a smaller one"
        )
    return data


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


class _StrictImageDataset(ImageDataset):
    """timm's data set, but an unreadable image is an error that names it, not a skipped sample."""

    def __getitem__(self, index: int):
        try:
            image, target, *features = self._load(index)
        except Exception as error:  # PIL's plugins raise nearly everything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            name = self.reader.filename(index, absolute=True)
            raise DataError(f"the image {name} cannot be read: {reason}") from error
        if self.transform is not None:
            image = self.transform(image)
        if target is None:
            target = -1
        elif self.target_transform is not None:
            target = self.target_transform(target)
        if self.additional_features is None:
            return image, target
        return image, target, *features

    def _load(self, index: int):
        file, *rest = self.reader[index]
        if self.load_bytes:
            return file.read(), *rest
        if not self.input_img_mode:
            return Image.open(file), *rest  # decodes later, from the open file
        with file:
            return Image.open(file).convert(self.input_img_mode), *rest


def _is_folder(args: argparse.Namespace) -> bool:
    """Whether timm would read the data set as a folder of class folders, or as a tar of one."""
    prefix, separator, _ = args.dataset.partition("/")
    return not (separator and prefix.lower() in ("torch", "hfds", "hfids", "tfds", "wds"))


def _split_root(root: str, split: str) -> str:
    return _search_split(root, split) if os.path.isdir(root) else root


@lru_cache(maxsize=2)
def _reader(root: str, class_map: str, input_key: str | None):
    """Scan a folder; once a process, because a large one on a network takes minutes."""
    try:
        return create_reader("", root=root, class_map=class_map, input_key=input_key)
    except RuntimeError:
        raise UsageError(f"the data folder {root} holds no images in class folders") from None
    except (AssertionError, OSError, ValueError) as error:
        raise UsageError(f"the data {root} cannot be read: {error}") from None


def _dataset(args: argparse.Namespace, split: str, img_mode: str, is_training: bool):
    if _is_folder(args):
        return _StrictImageDataset(
            args.data_dir,
            reader=_reader(_split_root(args.data_dir, split), args.class_map, args.input_key),
            input_img_mode=img_mode,
        )
    only_training = dict(seed=args.seed, repeats=args.epoch_repeats) if is_training else {}
    try:
        dataset = create_dataset(
            args.dataset,
            root=args.data_dir,
            split=split,
            is_training=is_training,
            class_map=args.class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            input_img_mode=img_mode,
            input_key=args.input_key,
            target_key=args.target_key,
            num_samples=args.train_num_samples if is_training else args.val_num_samples,
            trust_remote_code=args.dataset_trust_remote_code,
            **only_training,
        )
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"--dataset {args.dataset} (split {split}) in --data-dir {args.data_dir}: {reason}"
        ) from error
    if type(dataset) is ImageDataset:
        dataset.__class__ = _StrictImageDataset
    return dataset


def _train(args, data_config, dataset, common, collate_fn):
    if args.aug_splits > 1:
        dataset = AugMixDataset(dataset, num_splits=args.aug_splits)
    progressive = args.train_size_schedule == "progressive"
    return create_loader(
        dataset,
        input_size=data_config["input_size"],
        input_size_choices=args.train_img_sizes,
        batch_size_choices=args.train_batch_sizes,
        batch_choice_weights=args.train_size_probs,
        batch_choice_seed=args.seed,
        batch_choice_schedule=args.train_size_schedule,
        batch_schedule_epochs=args.epochs if progressive else None,
        batch_schedule_spread=args.train_size_schedule_spread,
        batch_schedule_random_mix=args.train_size_random_mix,
        num_batches=args.train_batches_per_epoch,
        collate_fn=collate_fn,
        use_multi_epochs_loader=args.use_multi_epochs_loader,
        **common,
        **_train_kwargs(args, data_config),
    )


def _naflex_train(args, data_config, dataset, common, mixup_args, patch_size):
    mixup_fn = None
    if mixup_args:  # NaFlexMixup knows neither of these two
        mixup_fn = NaFlexMixup(
            **{k: v for k, v in mixup_args.items() if k not in ("mode", "cutmix_minmax")}
        )
    if args.naflex_patch_sizes:
        patches = dict(patch_size_choices=args.naflex_patch_sizes)
        if args.naflex_patch_size_probs:
            patches["patch_size_choice_probs"] = args.naflex_patch_size_probs
    else:
        patches = dict(patch_size=patch_size)
    return create_naflex_loader(
        dataset=dataset,
        train_seq_lens=args.naflex_train_seq_lens,
        mixup_fn=mixup_fn,
        rank=args.rank,
        world_size=args.world_size,
        patchify_channels_last=not args.naflex_patchify_channels_first,
        **patches,
        **common,
        **_train_kwargs(args, data_config),
    )


def _train_kwargs(args, data_config):
    interpolation = args.train_interpolation
    if args.no_aug or not interpolation:
        interpolation = data_config["interpolation"]
    return dict(
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        re_split=args.resplit,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob,
        gaussian_blur_prob=args.gaussian_blur_prob,
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats,
        num_aug_splits=args.aug_splits,
        interpolation=interpolation,
        num_workers=args.workers,
        worker_seeding=args.worker_seeding,
    )


def _eval_kwargs(args, data_config):
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


def _patch_size(model: nn.Module) -> tuple[int, int]:
    if hasattr(model, "get_patch_size"):
        return model.get_patch_size()
    _logger.warning("The model does not tell its patch size; taking 16 x 16")
    return (16, 16)


def _log_schedule(args, sampler):
    if is_primary(args):
        _logger.info(
            f"Scheduled image sizes {args.train_img_sizes} with batch sizes {sampler.batch_sizes} "
            f"({args.train_size_schedule}): {len(sampler)} batches per epoch of "
            f"{sampler.average_batch_size:.2f} images on average"
        )


def _check_same_classes(train, val, args):
    train_names, val_names = set(train.class_to_idx), set(val.class_to_idx)
    for names, lacking in ((train_names - val_names, "val"), (val_names - train_names, "train")):
        if names:
            split = args.val_split if lacking == "val" else args.train_split
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise UsageError(
                f"--data-dir {args.data_dir}: the two splits must have the same classes, but "
                f"{len(names)} of them ({some}) have no images in {split}"
            )


def _check_class_count(count: int, args: argparse.Namespace) -> None:
    if args.num_classes is not None:
        if count != args.num_classes:
            raise UsageError(
                f"--num-classes {args.num_classes} does not fit --data-dir {args.data_dir}, which "
                f"has {count} classes; give --num-classes {count}"
            )
        return
    source, name = parse_model_name(args.model)
    config = None if source else get_pretrained_cfg(name)
    if config and count > config.num_classes:
        raise UsageError(_too_many(args.data_dir, count, args.model, config.num_classes))


def _check_outputs(dataset, args: argparse.Namespace) -> None:
    """For data sets that only tell their classes once they are made."""
    classes = getattr(dataset, "classes", None) or getattr(
        getattr(dataset, "reader", None), "class_to_idx", None
    )
    count = len(classes) if classes else 0
    if count > args.num_classes:
        raise UsageError(_too_many(args.data_dir, count, args.model, args.num_classes))


def _too_many(root, count, model, outputs):
    return (
        f"--data-dir {root} has {count} classes, but {model} has {outputs} outputs; "
        f"give --num-classes {count}"
    )
