"""A bounded sample of validation images."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data.dataset_factory import create_dataset
from torch import Tensor

from timm_rdp.errors import UsageError, refused_with
from timm_rdp.training.dataset import prepare_demo

# Fewer images than this say more about themselves than about the layers.
MIN_IMAGES = 16


class Images:
    """Some of a folder's validation images, drawn with a seed.

    Args:
        folder: as for training, with a `validation` or `val` folder of class folders, or class
            folders themselves; None for the demo's digits.
        count: how many images to take at most.
        seed: which.

    Raises:
        UsageError: no such folder, no validation split, or too few images.
    """

    def __init__(self, folder: str | None, count: int, seed: int):
        root = Path(folder) if folder else prepare_demo()
        if not root.exists():
            raise UsageError(f"--data-dir {folder} does not exist; check the path")
        with refused_with(f"--data-dir {root}: no validation images found in it"):
            dataset: Any = create_dataset("", root=str(root), split="validation")
        self._reader = dataset.reader
        if (root / "train").is_dir() and Path(self._reader.root) == root:
            raise UsageError(
                f"--data-dir {root} has train/ but no validation/ folder; add one, or give "
                "a folder that has class folders only"
            )
        images = len(self._reader)
        if images < MIN_IMAGES:
            raise UsageError(
                f"--data-dir {root} has {images} validation images: too few to compare "
                f"layers (CKA); give {MIN_IMAGES} or more"
            )
        self.classes = len(self._reader.class_to_idx)
        generator = torch.Generator().manual_seed(seed)
        self.chosen = torch.randperm(images, generator=generator)[:count].sort().values

    def __len__(self) -> int:
        return len(self.chosen)

    def batches(self, size: int, transform: Callable, mode: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Read the images, batch after batch: ((size, C, H, W), class numbers (size,)).

        Args:
            size: images a batch; the last may have fewer.
            transform: image to (C, H, W) tensor.
            mode: "RGB" or "L".

        Raises:
            UsageError: an image cannot be read.
        """
        for indices in self.chosen.split(size):
            images, targets = [], []
            for index in indices.tolist():
                name = self._reader.filename(index, absolute=True)
                with refused_with(f"image {name} cannot be read"):
                    file, target = self._reader[index]
                    with file:
                        images.append(transform(Image.open(file).convert(mode)))
                targets.append(target)
            yield torch.stack(images), torch.tensor(targets)
