"""Lay out Fashion-MNIST's files for `--dataset torch/fashion_mnist`, without a download.

python benchmarks/fashion_mnist.py --output output/fashion_mnist
timm-rdp train --dataset torch/fashion_mnist --data-dir output/fashion_mnist/choose --in-chans 1 ...

OUTPUT/choose is for every choice: 55,000 of the 60,000 training images, and as its validation split
the other 5,000, the last 500 of each class in the order of the file. It holds no test image.
OUTPUT/final is for the final table: all 60,000 training images, and the 10,000 test images as its
validation split.
"""

import argparse
import gzip
import sys
from pathlib import Path

import numpy as np

PACKAGE = "dataset-fashion-mnist"  # Debian's and Ubuntu's
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
NAMES = ("images-idx3-ubyte", "labels-idx1-ubyte")
HEADERS = (16, 8)  # bytes


def read(source: Path, split: str) -> list[np.ndarray]:
    """Images (N, 28, 28) and labels (N,) of "train" or "t10k", from packed or unpacked files."""
    arrays = []
    for name, header in zip(NAMES, HEADERS, strict=True):
        plain, packed = (source / f"{split}-{name}{end}" for end in ("", ".gz"))
        if not (plain.exists() or packed.exists()):
            print(
                f"error: --source {source} has no {packed.name}: install the package {PACKAGE}, or "
                "name the folder of its files",
                file=sys.stderr,
            )
            sys.exit(2)
        data = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
        values = np.frombuffer(data, np.uint8, offset=header)
        arrays.append(values.reshape(-1, 28, 28) if header == HEADERS[0] else values)
    return arrays


def write(root: Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Write a split where torchvision looks for it, unpacked."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in zip(NAMES, (images, labels), strict=True):
        sizes = np.array(values.shape, ">i4").tobytes()
        magic = bytes([0, 0, 8, values.ndim])  # 8: unsigned bytes
        (folder / f"{split}-{name}").write_bytes(magic + sizes + values.tobytes())
    print(f"{folder}: {split}, {len(labels)} images")


def last_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Which images are the last `count` of their class in the order of the file: bool (N,)."""
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        chosen[np.flatnonzero(labels == label)[-count:]] = True
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=INSTALLED, help="folder of the four files")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--apart", type=int, default=500, help="images of each class for choosing")
    parser.add_argument("--per-class", type=int, help="train on so many of each class alone")
    args = parser.parse_args()
    images, labels = read(args.source, "train")
    test = read(args.source, "t10k")
    apart = last_of_each_class(labels, args.apart)
    for name, training in (("choose", ~apart), ("final", np.ones(len(labels), bool))):
        chosen = np.flatnonzero(training)
        if args.per_class:
            chosen = chosen[last_of_each_class(labels[chosen], args.per_class)]
        write(args.output / name, "train", images[chosen], labels[chosen])
    write(args.output / "choose", "t10k", images[apart], labels[apart])
    write(args.output / "final", "t10k", *test)


if __name__ == "__main__":
    main()
