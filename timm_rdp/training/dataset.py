"""Data sets: found, checked before there is a model, and strict about images that are broken."""

import argparse
import logging
import os
from functools import lru_cache
from typing import Any

from PIL import Image
from timm.data import ImageDataset, create_dataset
from timm.data.dataset_factory import _search_split
from timm.data.readers import create_reader
from timm.models import get_pretrained_cfg, parse_model_name

from timm_rdp.errors import DataError, UsageError, one_line, refused_with

_logger = logging.getLogger(__name__)


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
    train_root, val_root = (
        _split_root(root, split) for split in (args.train_split, args.val_split)
    )
    train = _reader(train_root, args.class_map, args.input_key)
    if args.val_split:
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
            _check_same_classes(set(train.class_to_idx), set(val.class_to_idx), args)
    if args.class_map:
        return max(train.class_to_idx.values()) + 1
    count = len(train.class_to_idx)
    _check_class_count(count, args)
    return count


class _StrictImageDataset(ImageDataset):
    """timm's data set, but an unreadable image is an error that names it, not a skipped sample."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        reader: Any = self.reader
        try:
            file, target = reader[index]
            with file:
                image = Image.open(file).convert(self.input_img_mode)
        except Exception as error:  # PIL's plugins raise nearly everything
            name = reader.filename(index, absolute=True)
            raise DataError(f"the image {name} cannot be read: {one_line(error)}") from error
        if self.transform is not None:
            image = self.transform(image)
        return image, -1 if target is None else target


def _is_folder(args: argparse.Namespace) -> bool:
    """Whether timm would read the data set as a folder of class folders, or as a tar of one."""
    prefix, separator, _ = args.dataset.partition("/")
    return not (separator and prefix.lower() in ("torch", "hfds", "hfids", "tfds", "wds"))


def _split_root(root: str, split: str) -> str:
    return _search_split(root, split) if os.path.isdir(root) else root


@lru_cache(maxsize=2)
def _reader(root: str, class_map: str, input_key: str | None) -> Any:
    """Scan a folder; once a process, because a large one on a network takes minutes."""
    if not os.path.exists(root):
        raise UsageError(f"--data-dir {root} does not exist")
    with refused_with(f"the data {root} cannot be read"):
        try:
            return create_reader("", root=root, class_map=class_map, input_key=input_key)
        except RuntimeError:
            raise UsageError(f"the data folder {root} holds no images in class folders") from None


def make_dataset(args: argparse.Namespace, img_mode: str, is_training: bool) -> Any:
    """Make the data set of a split; one of image files never skips what it cannot read."""
    split = args.train_split if is_training else args.val_split
    if _is_folder(args):
        reader = _reader(_split_root(args.data_dir, split), args.class_map, args.input_key)
        return _StrictImageDataset(args.data_dir, reader=reader, input_img_mode=img_mode)
    only_training = dict(seed=args.seed, repeats=args.epoch_repeats) if is_training else {}
    with refused_with(f"--dataset {args.dataset} (split {split}) in --data-dir {args.data_dir}"):
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
    if type(dataset) is ImageDataset:
        dataset.__class__ = _StrictImageDataset
    return dataset


def _check_same_classes(train: set[str], val: set[str], args: argparse.Namespace) -> None:
    for names, split in ((train - val, args.val_split), (val - train, args.train_split)):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise UsageError(
                f"--data-dir {args.data_dir}: the two splits must have the same classes, but "
                f"{len(names)} of them ({some}) have no images in {split}"
            )


def _check_class_count(count: int, args: argparse.Namespace) -> None:
    """Compare the data's classes with `--num-classes` or, without it, with the model's outputs."""
    if args.num_classes is not None:
        if count != args.num_classes:
            raise UsageError(
                f"--num-classes {args.num_classes} does not fit --data-dir {args.data_dir}, which "
                f"has {count} classes; give --num-classes {count}"
            )
        return
    source, name = parse_model_name(args.model)
    config = None if source else get_pretrained_cfg(name)
    if config:
        check_outputs(count, config.num_classes, args)


def check_outputs(count: int, outputs: int, args: argparse.Namespace) -> None:
    """Raises UsageError where the data has more classes than the model has outputs."""
    if count > outputs:
        raise UsageError(
            f"--data-dir {args.data_dir} has {count} classes, but {args.model} has {outputs} "
            f"outputs; give --num-classes {count}"
        )
