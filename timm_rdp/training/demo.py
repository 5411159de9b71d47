"""The bundled demo: scikit-learn's handwritten digits, written once as an image folder."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from timm_rdp.errors import UsageError, refused_with

CACHE_VARIABLE = "TIMM_RDP_CACHE"
VALIDATION_SHARE = 5  # every fifth image of a class


def prepare_demo(root: Path | None = None) -> Path:
    """Write the digits as `train/` and `validation/`, and return the folder of both.

    1,797 greyscale images of 8 x 8 pixels in ten class folders; every fifth of a class is held
    out. Written once: a folder that exists is complete, because it gets its name last.

    Args:
        root: folder to write into; None for $TIMM_RDP_CACHE, else $XDG_CACHE_HOME/timm-rdp, else
            ~/.cache/timm-rdp.

    Raises:
        UsageError: scikit-learn is missing, or the folder cannot be written.
    """
    folder = (root or _cache()) / "digits-v1"
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
    with refused_with(f"the demo's images (set {CACHE_VARIABLE} to a folder that can be written)"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="digits-v1-", dir=folder.parent) as temporary:
            unfinished = Path(temporary, "digits")
            _write(digits.images, digits.target, unfinished)
            try:
                unfinished.rename(folder)
            except OSError:
                if not folder.is_dir():  # another process was not faster either
                    raise
    return folder


def _write(images: Any, targets: Any, folder: Path) -> None:
    seen = dict.fromkeys(range(10), 0)
    for index, (pixels, digit) in enumerate(zip(images, targets.tolist(), strict=True)):
        split = "validation" if seen[digit] % VALIDATION_SHARE == 0 else "train"
        seen[digit] += 1
        target = folder / split / str(digit)
        target.mkdir(parents=True, exist_ok=True)
        grey = (pixels * (255 / 16)).round().astype("uint8")
        Image.fromarray(grey).save(target / f"{index:04d}.png")


def _cache() -> Path:
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "timm-rdp"
