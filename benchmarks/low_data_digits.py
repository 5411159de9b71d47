"""Write the demo's digits as an image folder with few training images; the rest is validation.

python benchmarks/low_data_digits.py --per-class 30 --output output/digits300
"""

import argparse
import shutil
from pathlib import Path

from timm_rdp.training.dataset import prepare_demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-class", type=int, default=30, help="training images of each class")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    demo = prepare_demo()
    for digit in map(str, range(10)):
        # The demo holds out every fifth image of a class: in order of number, both splits again.
        images = sorted(demo.glob(f"*/{digit}/*.png"), key=lambda path: path.name)
        for place, image in enumerate(images):
            split = "train" if place < args.per_class else "validation"
            target = args.output / split / digit
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image, target / image.name)
    for split in ("train", "validation"):
        count = sum(1 for _ in (args.output / split).glob("*/*.png"))
        print(f"{args.output / split}: {count} images")


if __name__ == "__main__":
    main()
