"""What our training script costs without `--rdp`, against timm's own script.

    python benchmarks/loop.py --timm-script pytorch-image-models/train.py

The two run side by side with the same flags on the same images, each on a processor core of its
own, and change cores after every pair, so that whatever else slows the machine slows both. The time
is that from the first epoch's checkpoint to the last one's. Writes the ratios ours / timm's, pair
by pair in loop.csv, and as median and quartiles in loop.md. Linux only.

Each pair runs twice: with the heap as it is, and with a heap that keeps its memory. glibc hands the
heap's end back to the system when enough of it is free, and fetches it again page by page; whether
an update does that depends on where the heap happens to end, in both scripts.
"""

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import timm
import torch
from parity import write_digits
from tqdm import tqdm

TRAIN_IMAGES = 960
HEAPS = {
    "as it is": {},
    "keeps memory": {
        "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
        "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
    },
}
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
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/loop"))
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=21, help="of a run; the first is not timed")
    args = parser.parse_args()
    if not args.timm_script.is_file():
        parser.error(f"--timm-script {args.timm_script}: there is no such file")
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        parser.error("two processor cores are needed, and this process may use one")
    args.output.mkdir(parents=True, exist_ok=True)
    scripts = {
        "timm": args.timm_script.resolve(),
        "ours": Path(__file__).resolve().parents[1] / "train_rdp.py",
    }
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_digits(root / "data", train=TRAIN_IMAGES)
        for (name, flags), heap in product(CASES.items(), HEAPS):
            for pair in tqdm(range(args.pairs), desc=f"{name}, {heap}", leave=False, disable=None):
                places = dict(zip(scripts, cores[:: 1 if pair % 2 else -1], strict=True))
                running = {
                    who: start(
                        scripts[who],
                        flags,
                        root,
                        f"{name} {heap} {pair} {who}",
                        core,
                        args.epochs,
                        HEAPS[heap],
                    )
                    for who, core in places.items()
                }
                row: dict = {"flags": name, "heap": heap}
                for who, run in running.items():
                    row[who], row[f"{who} page faults"] = cost(*run, args.epochs)
                pairs.append({**row, "ratio": row["ours"] / row["timm"]})
            write(args.output, pairs, args.epochs)
    print((args.output / "loop.md").read_text())
    return 0


def start(
    script: Path,
    flags: str,
    root: Path,
    experiment: str,
    core: int,
    epochs: int,
    heap: dict[str, str],
) -> tuple[subprocess.Popen, Path]:
    """Start a run on a core of its own; returns the process and the folder that it writes."""
    command = f"{sys.executable} {script} --data-dir {root / 'data'} --num-classes 10 --workers 0 "
    command += f"--epochs {epochs} --warmup-epochs 0 --device cpu --lr 1e-3 --checkpoint-hist "
    command += f"{epochs} --output {root} {flags}"
    process = subprocess.Popen(
        [*command.split(), "--experiment", experiment],
        cwd=root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", **heap},
    )
    os.sched_setaffinity(process.pid, {core})
    return process, root / experiment


def cost(process: subprocess.Popen, folder: Path, epochs: int) -> tuple[float, int]:
    """Wait for a run's end.

    Returns:
        seconds from its first epoch's checkpoint to its last one's, and the page faults of all of
        it that needed no disk
    """
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(process.args)} ended with status {process.returncode}")
    first, last = (
        (folder / f"checkpoint-{epoch}.pth.tar").stat().st_mtime for epoch in (0, epochs - 1)
    )
    return last - first, usage.ru_minflt


def write(output: Path, pairs: list[dict], epochs: int) -> None:
    """Write loop.csv and loop.md."""
    with open(output / "loop.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, pairs[0].keys())
        writer.writeheader()
        writer.writerows(pairs)
    lines = [
        f"CPU, {platform.machine()}, one core each, torch {torch.__version__}, timm "
        f"{timm.__version__}; {epochs - 1} epochs of {TRAIN_IMAGES} images of 32 x 32. Ratio of "
        "our script's time, without --rdp, to timm's.",
        "",
        "| flags | heap | pairs | timm, s, median | ratio, median | quartiles | least - largest | "
        "page faults, 1000, timm | ours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, heap in dict.fromkeys((p["flags"], p["heap"]) for p in pairs):
        own = [p for p in pairs if (p["flags"], p["heap"]) == (name, heap)]
        ratios = [p["ratio"] for p in own]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        usual = statistics.median(p["timm"] for p in own)
        faults = (sorted(p[f"{who} page faults"] // 1000 for p in own) for who in ("timm", "ours"))
        lines.append(
            f"| {name} | {heap} | {len(own)} | {usual:.1f} | {middle:.2f} | {low:.2f} - {high:.2f} "
            f"| {min(ratios):.2f} - {max(ratios):.2f} | "
            + " | ".join(f"{f[0]} - {f[-1]}" for f in faults)
            + " |"
        )
    (output / "loop.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
