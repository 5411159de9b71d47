"""Data sets: found, checked before there is a model, strict about broken images; and the demo's."""

import argparse
import logging
import os
from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from timm.data import ImageDataset, MultiLabelTarget, create_dataset
from timm.data.dataset_factory import _search_split
from timm.data.readers import create_reader
from timm.data.readers.img_extensions import get_img_extensions
from torch.utils.data import IterableDataset

from timm_rdp.errors import DataError, UsageError, one_line, refused_with

_logger = logging.getLogger(__name__)

CACHE_VARIABLE = "TIMM_RDP_CACHE"
IMG_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by channels
SPLITS = ("train", "validation")  # the default names
VALIDATION_SHARE = 5  # every fifth image of a class


def check_data(args: argparse.Namespace) -> None:
    """Check the data folder before there is a model: both splits, their classes, their number.

    Raises:
        UsageError: a folder is missing or empty, or the splits' classes differ or do not fit
            `--num-classes`.
    """
    if not _is_folder(args):
        return
    root = args.data_dir
    if not root:
        raise UsageError(f"--dataset {args.dataset} needs --data-dir FOLDER")
    if args.task == "multilabel":
        raise UsageError(
            f"--data-dir {root} is read as class folders, of one label an image: --task multilabel "
            "needs --dataset and --target-key"
        )
    roots = [_split_root(root, split) for split in (args.train_split, args.val_split)]
    train = _reader(roots[0], args.class_map, args.input_key)
    if args.val_split:
        is_split = set(roots) != {root} or (args.train_split, args.val_split) != SPLITS
        for split, own in zip(("train", "val"), roots, strict=True):
            if is_split and own == root:
                raise UsageError(
                    f"--data-dir {root} has no folder for --{split}-split "
                    f"{getattr(args, f'{split}_split')}; make one"
                    + (", or give --val-split '' to train without validation" * (split == "val"))
                )
        if roots[0] == roots[1]:
            _logger.warning(f"{root} is not split: validation sees the images of training")
        val = _reader(roots[1], args.class_map, args.input_key)
        if not args.class_map:
            for own, reader in zip(roots, (train, val), strict=True):
                _check_folders(Path(own), reader.class_to_idx)
            _check_same_classes(set(train.class_to_idx), set(val.class_to_idx), args)
    count = len(train.class_to_idx)
    if args.num_classes not in (None, count) and not args.class_map:
        raise UsageError(
            f"--num-classes {args.num_classes} does not fit --data-dir {root}, which has {count} "
            f"classes; give --num-classes {count}"
        )


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
        if target is not None and self.target_transform is not None:
            target = self.target_transform(target)
        return image, -1 if target is None else target


def _split_root(root: str, split: str) -> str:
    return _search_split(root, split) if os.path.isdir(root) else root


def _is_folder(args: argparse.Namespace) -> bool:
    """Whether timm would read the data set as a folder of class folders, or as a tar of one."""
    prefix, separator, _ = args.dataset.partition("/")
    return not (separator and prefix.lower() in ("torch", "hfds", "hfids", "tfds", "wds"))


@lru_cache(maxsize=2)
def _reader(root: str, class_map: str, input_key: str | None) -> Any:
    """Scan a folder; once a process, because a large one on a network takes minutes."""
    if not os.path.exists(root):
        raise UsageError(f"--data-dir {root} does not exist")
    with refused_with(f"the data {root}{class_map and f' with --class-map {class_map}'}"):
        return create_reader("", root=root, class_map=class_map, input_key=input_key)


def make_dataset(args: argparse.Namespace, img_mode: str, is_training: bool) -> Any:
    """Make the data set of a split; one of image files never skips what it cannot read."""
    split = args.train_split if is_training else args.val_split
    if _is_folder(args):
        reader = _reader(_split_root(args.data_dir, split), args.class_map, args.input_key)
        return _StrictImageDataset(args.data_dir, reader=reader, input_img_mode=img_mode)
    what = f"--dataset {args.dataset} (split {split}) in --data-dir {args.data_dir}"
    check = partial(_check_label, args.num_classes, what)
    more: dict[str, Any] = {"target_transform": check}
    if args.task == "multilabel":
        dense = args.target_format == "multihot"
        more["target_transform"] = MultiLabelTarget(args.num_classes, dense=dense)
    with refused_with(what):
        create = partial(
            create_dataset,
            args.dataset,
            root=args.data_dir,
            split=split,
            class_map=args.class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            input_img_mode=img_mode,
            input_key=args.input_key,
            target_key=args.target_key,
            target_format=args.target_format,
            num_samples=args.train_num_samples if is_training else args.val_num_samples,
            trust_remote_code=args.dataset_trust_remote_code,
            **more,
        )
        repeats = dict(seed=args.seed, repeats=args.epoch_repeats) if is_training else {}
        dataset = create(is_training=is_training, **repeats)
        # Its fields, and whether they fit the task; one that iterates keeps its own place.
        if isinstance(dataset, IterableDataset):
            next(iter(create(is_training=False)), None)
        elif hasattr(dataset, "__getitem__"):
            dataset[0]
    if type(dataset) is ImageDataset:
        dataset.__class__ = _StrictImageDataset
    return dataset


def _check_label(num_classes: int, what: str, label: Any) -> Any:
    if not -1 <= label < num_classes:  # timm's -1 is no label
        raise DataError(
            f"{what} has the label {label}, and the model {num_classes} outputs: give --num-classes"
        )
    return label


def _check_folders(root: Path, classes: Iterable[str]) -> None:
    """Refuse folders that would be, or would not be, a class by accident."""
    if hidden := [name for name in classes if name.startswith(".")]:
        raise UsageError(f"{root} holds {hidden[0]}, which would be a class; remove it")
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if not folder.is_dir() or folder.name.startswith(".") or folder.name in classes:
            continue
        inside = list(folder.iterdir())
        if inside and not any(path.is_dir() for path in inside):
            read = " ".join(get_img_extensions())
            raise UsageError(
                f"{folder} holds no image that timm reads ({read}), but e.g. {inside[0].name}"
            )


def _check_same_classes(train: set[str], val: set[str], args: argparse.Namespace) -> None:
    for names, split in ((train - val, args.val_split), (val - train, args.train_split)):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise UsageError(
                f"--data-dir {args.data_dir}: the two splits must have the same classes, but "
                f"{len(names)} of them ({some}) have no images in {split}"
            )


def prepare_demo(root: Path | None = None) -> Path:
    """Write scikit-learn's digits as `train/` and `validation/`, and return the folder of both.

    1,797 greyscale images of 8 x 8 pixels in ten class folders; every fifth of a class is held
    out. Written once: a folder that exists is complete, because it gets its name last.

    Args:
        root: folder to write into; None for $TIMM_RDP_CACHE, else $XDG_CACHE_HOME/timm-rdp, else
            ~/.cache/timm-rdp.

    Raises:
        UsageError: scikit-learn is missing, or the folder cannot be written.
    """
    with refused_with(f"the demo's images (set {CACHE_VARIABLE} to a folder that can be written)"):
        caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        cache = os.environ.get(CACHE_VARIABLE) or f"{caches}/timm-rdp"
        folder = (root or Path(cache).expanduser()) / "digits-v1"
        if folder.is_dir():
            return folder
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UsageError(
                "the demo needs scikit-learn, which is not installed: pip install scikit-learn, "
                "or train on images of your own with --data-dir FOLDER"
            ) from None
        digits: Any = load_digits()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="digits-v1-", dir=folder.parent) as temporary:
            for index, digit in enumerate(digits.target):
                place = (digits.target[:index] == digit).sum()  # within the class
                split = "train" if place % VALIDATION_SHARE else "validation"
                target = Path(temporary, "digits", split, str(digit))
                target.mkdir(parents=True, exist_ok=True)
                grey = (digits.images[index] * (255 / 16)).round().astype("uint8")
                Image.fromarray(grey).save(target / f"{index:04d}.png")
            try:
                Path(temporary, "digits").rename(folder)
            except OSError:
                if not folder.is_dir():  # another process was not faster either
                    raise
    return folder
