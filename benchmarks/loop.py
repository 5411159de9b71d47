"""What our training script costs without `--rdp`, against timm's own script.

    python benchmarks/loop.py --timm-script pytorch-image-models/train.py [--device cuda]

The two run with the same flags on the same images: on the CPU side by side, each on a processor
core of its own, and they change cores after every pair, so that whatever else slows the machine
slows both; on a GPU by turns, with larger models. The time is that from the first epoch's
checkpoint to the last one's. Writes the ratios ours / timm's, pair by pair in loop.csv, and as
median and quartiles in loop.md. Linux only.

glibc hands the end of its heap back to the system when enough of it is free, and fetches it again
page by page; whether an update does that depends on where the heap happens to end, in both scripts,
and makes runs of the same script differ by a tenth. So the heap keeps its memory in both, unless
--free-heap is given.
"""

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
from parity import write_digits
from tqdm import tqdm

KEEP_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
}


@dataclass(frozen=True)
class Case:
    """What both scripts train."""

    name: str
    flags: str
    images: int = 960
    epochs: int = 21  # of a run; the first is not timed
    pairs: int = 16


SMALL = "--img-size 32 -b 16"
CASES = (
    # Small and quick updates, where a loop's own work shows.
    Case("test_vit", f"--model test_vit --model-kwargs img_size=32 {SMALL}"),
    Case("test_resnet", f"--model test_resnet {SMALL} --opt sgd"),
    # Augmentation, mixing and averaged weights too.
    Case(
        "test_vit, recipe",
        f"--model test_vit --model-kwargs img_size=32 {SMALL} --aa rand-m5-n2 --mixup 0.8 "
        "--cutmix 1.0 --reprob 0.25 --model-ema --drop-path 0.1",
    ),
    # A model that people use, for epochs of about a minute.
    Case(
        "vit_tiny_patch16_224",
        "--model vit_tiny_patch16_224 -b 16",
        images=480,
        epochs=4,
        pairs=6,
    ),
)
HALF = "--img-size 224 --amp --amp-dtype bfloat16 --workers 6"
ON_GPU = (
    Case("vit_small_patch16_224", f"--model vit_small_patch16_224 -b 128 {HALF}", 768, 9, 4),
    Case("resnet50", f"--model resnet50 -b 128 {HALF} --channels-last", 768, 9, 4),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--timm-script", type=Path, required=True, help="timm's train.py")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/loop"))
    parser.add_argument("--pairs", type=int, default=16, help="at most so many of each case")
    parser.add_argument("--free-heap", action="store_true", help="leave glibc's heap as it is")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="the first case, to try the benchmark")
    args = parser.parse_args()
    if not args.timm_script.is_file():
        parser.error(f"--timm-script {args.timm_script}: there is no such file")
    cases = CASES if args.device == "cpu" else ON_GPU
    if args.quick:
        cases = (replace(cases[0], images=64, epochs=3, pairs=2),)
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("two processor cores are needed, and this process may use one")
    args.output.mkdir(parents=True, exist_ok=True)
    scripts = {
        "timm": args.timm_script.resolve(),
        "ours": Path(__file__).resolve().parents[1] / "train_rdp.py",
    }
    heap = {} if args.free_heap else KEEP_MEMORY
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for case in cases:
            write_digits(root / str(case.images), train=case.images)
            pairs_of_case = range(min(args.pairs, case.pairs))
            for pair in tqdm(pairs_of_case, desc=case.name, leave=False, disable=None):
                row = run_pair(case, scripts, root, pair, args.device, heap)
                pairs.append({**row, "ratio": row["ours"] / row["timm"]})
            write(args.output, pairs, args.device, args.free_heap)
    print((args.output / "loop.md").read_text())
    return 0


def run_pair(
    case: Case, scripts: dict[str, Path], root: Path, pair: int, device: str, heap: dict[str, str]
) -> dict:
    """Run both scripts, on the CPU side by side and else by turns; what each cost."""
    cores = sorted(os.sched_getaffinity(0))
    order = [*scripts][:: 1 if pair % 2 else -1]
    places = [cores[:1], cores[1:2]] if device == "cpu" else [cores, cores]
    runs = (
        (who, start(case, scripts[who], root, f"{case.name} {pair} {who}", device, own, heap))
        for who, own in zip(order, places, strict=True)
    )
    row: dict = {"case": case.name, "images": case.images, "epochs": case.epochs}
    for who, run in [*runs] if device == "cpu" else runs:
        row[who], row[f"{who} page faults"] = cost(*run, case.epochs)
    return row


def start(
    case: Case,
    script: Path,
    root: Path,
    experiment: str,
    device: str,
    cores: Iterable[int],
    heap: dict[str, str],
) -> tuple[subprocess.Popen, Path]:
    """Start a run on cores of its own; returns the process and the folder that it writes."""
    command = f"{sys.executable} {script} --data-dir {root / str(case.images)} --num-classes 10 "
    command += f"--workers 0 --epochs {case.epochs} --warmup-epochs 0 --device {device} --lr 1e-3 "
    command += f"--checkpoint-hist {case.epochs} --output {root} {case.flags}"
    process = subprocess.Popen(
        [*command.split(), "--experiment", experiment],
        cwd=root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **({"OMP_NUM_THREADS": "1"} if device == "cpu" else {}), **heap},
    )
    os.sched_setaffinity(process.pid, cores)
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


def write(output: Path, pairs: list[dict], device: str, free_heap: bool) -> None:
    """Write loop.csv and loop.md."""
    with open(output / "loop.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, pairs[0].keys())
        writer.writeheader()
        writer.writerows(pairs)
    heap = "the heap as it is" if free_heap else "a heap that keeps its memory"
    on_cpu = f"CPU, {platform.machine()}, one core each"
    where = on_cpu if device == "cpu" else torch.cuda.get_device_name()
    lines = [
        f"{where}, torch {torch.__version__}, timm {timm.__version__}, {heap}. Ratio of our "
        "script's time, without --rdp, to timm's.",
        "",
        "| flags | epochs x images | pairs | timm, s, median | images per s | ratio, median | "
        "quartiles | least - largest | page faults, 1000, timm | ours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(p["case"] for p in pairs):
        own = [p for p in pairs if p["case"] == name]
        ratios = [p["ratio"] for p in own]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        usual = statistics.median(p["timm"] for p in own)
        timed, images = own[0]["epochs"] - 1, own[0]["images"]
        faults = (sorted(p[f"{who} page faults"] // 1000 for p in own) for who in ("timm", "ours"))
        lines.append(
            f"| {name} | {timed} x {images} | {len(own)} | {usual:.1f} "
            f"| {timed * images / usual:.0f} | {middle:.2f} | {low:.2f} - {high:.2f} "
            f"| {min(ratios):.2f} - {max(ratios):.2f} | "
            + " | ".join(f"{f[0]} - {f[-1]}" for f in faults)
            + " |"
        )
    (output / "loop.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
