"""A bounded sample of validation images."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_dataset
from torch import Tensor

from timm_rdp.errors import UsageError
from timm_rdp.training.demo import prepare_demo

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
        if count < MIN_IMAGES:
            raise UsageError(
                f"--num-images {count}: too few to compare layers (CKA); give {MIN_IMAGES} or more"
            )
        self.folder = Path(folder) if folder else prepare_demo()
        if not os.path.exists(self.folder):
            raise UsageError(f"--data-dir {folder} does not exist; check the path")
        try:
            reader = create_dataset("", root=str(self.folder), split="validation").reader
        except Exception as error:
            raise UsageError(
                f"--data-dir {self.folder}: no validation images found in it; "
                "it needs validation/CLASS/IMAGE files"
            ) from error
        if (self.folder / "train").is_dir() and Path(reader.root) == self.folder:
            raise UsageError(
                f"--data-dir {self.folder} has train/ but no validation/ folder; add one, or give "
                "a folder that has class folders only"
            )
        if len(reader) < MIN_IMAGES:
            raise UsageError(
                f"--data-dir {self.folder} has {len(reader)} validation images: too few to compare "
                f"layers (CKA); give {MIN_IMAGES} or more"
            )
        self._reader = reader
        self.classes = len(reader.class_to_idx)
        generator = torch.Generator().manual_seed(seed)
        self.chosen = torch.randperm(len(reader), generator=generator)[:count].sort().values

    def __len__(self) -> int:
        return len(self.chosen)

    def batches(self, size: int, transform, mode: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Read the images, batch after batch: ((size, C, H, W), class numbers (size,)).

        Args:
            size: images a batch; the last may have fewer.
            transform: image to (C, H, W) tensor.
            mode: "RGB" or "L".

        Raises:
            UsageError: an image cannot be read.
        """
        for indices in self.chosen.split(size):
            read = [self._read(int(i), transform, mode) for i in indices]
            yield torch.stack([x for x, _ in read]), torch.tensor([y for _, y in read])

    def _read(self, index: int, transform, mode: str) -> tuple[Tensor, int]:
        file, target = self._reader[index]
        try:
            with file:
                image = Image.open(file).convert(mode)
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
            name = self._reader.filename(index, absolute=True)
            raise UsageError(
                f"image {name} cannot be read ({type(error).__name__}); repair or remove it"
            ) from error
        return transform(image), target
