"""What our training script costs without `--rdp`, against timm's own script.

    python benchmarks/loop.py --timm-script pytorch-image-models/train.py

The two run in turn, each as a process of its own, with the same flags on the same images, for one
epoch and for several; the difference is the training without the start of the process. Prints the
ratio ours / timm's of wall and of processor time, pair by pair, as median, least and largest.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from parity import write_digits
from tqdm import tqdm

CASES = {
    # Small and quick updates, where a loop's own work shows.
    "test_vit": "--model test_vit --img-size 32 --model-kwargs img_size=32 -b 16",
    "test_resnet": "--model test_resnet --img-size 32 -b 16 --opt sgd",
    # Augmentation, mixing and averaged weights too.
    "test_vit, recipe": "--model test_vit --img-size 32 --model-kwargs img_size=32 -b 16 --aa "
    "rand-m5-n2 --mixup 0.8 --cutmix 1.0 --reprob 0.25 --model-ema --drop-path 0.1",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--timm-script", type=Path, required=True, help="timm's train.py")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=6, help="of the longer run")
    args = parser.parse_args()
    if not args.timm_script.is_file():
        parser.error(f"--timm-script {args.timm_script}: there is no such file")
    ours = Path(__file__).resolve().parents[1] / "train_rdp.py"
    scripts = {"timm": str(args.timm_script.resolve()), "ours": str(ours)}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_digits(root / "data", train=960)
        print(f"{args.epochs - 1} epochs of 60 updates, {args.pairs} pairs, ratio ours / timm's:")
        print("| flags | wall, median | least - largest | processor, median | least - largest |")
        print("| --- | --- | --- | --- | --- |")
        for name, flags in CASES.items():
            ratios = []
            for pair in tqdm(range(args.pairs + 1), desc=name, leave=False, disable=None):
                order = list(scripts) if pair % 2 else list(scripts)[::-1]
                spent = {who: training_time(scripts[who], flags, root, args) for who in order}
                if pair:  # the first pair warms up
                    ratios.append(
                        [o / t for o, t in zip(spent["ours"], spent["timm"], strict=True)]
                    )
            cells = []
            for column in zip(*ratios, strict=True):
                cells += [
                    f"{statistics.median(column):.2f}",
                    f"{min(column):.2f} - {max(column):.2f}",
                ]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return 0


def training_time(script: str, flags: str, root: Path, args: argparse.Namespace) -> list[float]:
    """Wall and processor seconds of the epochs after the first."""
    short, long = (seconds(script, flags, root, epochs) for epochs in (1, args.epochs))
    return [after - before for before, after in zip(short, long, strict=True)]


def seconds(script: str, flags: str, root: Path, epochs: int) -> tuple[float, float]:
    """Wall and processor seconds of a whole run."""
    command = f"{sys.executable} {script} --data-dir {root / 'data'} --num-classes 10 --workers 0 "
    command += f"--epochs {epochs} --warmup-epochs 0 --device cpu --lr 1e-3 --output {root} {flags}"
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(
        command.split(),
        check=True,
        cwd=root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    wall = time.perf_counter() - start
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
