"""Real images for the tests: scikit-learn's handwritten digits."""

import functools

import torch
from sklearn.datasets import load_digits
from torch import Tensor


@functools.lru_cache(maxsize=1)
def _all_digits() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    return (images / 16 - 0.5) / 0.5, torch.tensor(digits.target)


def digit_images(
    count: int, size: int = 32, start: int = 0, channels: int = 3
) -> tuple[Tensor, Tensor]:
    """Images (count, channels, size, size) in -1..1 and labels (count,), from digit `start` on."""
    images, labels = (t[start : start + count] for t in _all_digits())
    images = torch.nn.functional.interpolate(images, (size, size), mode="bilinear")
    return images.repeat(1, channels, 1, 1), labels.clone()
