"""How long compiling takes: ResidualDroppath by regions, and timm's model as a whole.

    python benchmarks/cold_start.py --output benchmarks/results/cold_start_cpu

Each in a process of its own without torch's caches. "first": until the first update of timm's model
is done, or the first cycle of ResidualDroppath. "all": what 30 updates or cycles take longer than
30 more do that compile nothing. Writes cold_start.csv and cold_start.md.
"""

import argparse
import csv
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
from torch._dynamo.utils import counters
from tqdm import tqdm

from timm_rdp import ResidualDropPath

ROWS = (
    ("vit_tiny_patch16_224", 0.1),
    ("vit_tiny_patch16_224", 0.4),
    ("resnet50", 0.1),
    ("convnext_tiny", 0.1),
)
CYCLES = 30
COLUMNS = ("first", "all", "graphs")


def measure(name: str, rate: float, kind: str, device: str) -> tuple[float, float, int]:
    """Seconds until the first update, seconds of compiling in all, and graphs."""
    torch.manual_seed(0)
    model = timm.create_model(name, drop_path_rate=rate).train().to(device)
    images, labels = torch.randn(2, 3, 224, 224, device=device), torch.zeros(2).long().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def update() -> None:
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    def cycle() -> None:
        for it in rdp.cycle():
            with it:
                update()

    def seconds(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            one()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    if kind == "whole":
        model.compile()
        one = update
    else:
        rdp = ResidualDropPath(model)
        rdp.compile()
        start, one = rdp.state_dict(), cycle
    first = seconds(1)
    total = first + seconds(CYCLES - 1)
    graphs = counters["stats"]["unique_graphs"]
    if kind != "whole":
        rdp.load_state_dict(start)  # the same masks again
    return first, total - seconds(CYCLES), graphs


def in_own_process(name: str, rate: float, kind: str, device: str) -> list[float]:
    command = [sys.executable, __file__, "--output", "", "--device", device]
    command += ["--one", name, str(rate), kind]
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return [float(value) for value in out.stdout.split()[-len(COLUMNS) :]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, rate, kind = args.one
        print(*measure(name, float(rate), kind, args.device))
        return
    rows = []
    for name, rate in tqdm(ROWS, disable=None):
        row: dict = {"model": name, "drop_path": rate}
        for kind in ("whole", "regions"):
            found = in_own_process(name, rate, kind, args.device)
            row |= {f"{kind}_{c}": v for c, v in zip(COLUMNS, found, strict=True)}
        rows.append(row)
    args.output.mkdir(parents=True, exist_ok=True)
    with open(args.output / "cold_start.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    where = torch.cuda.get_device_name() if args.device != "cpu" else f"CPU, {platform.machine()}"
    lines = [
        f"{where}, torch {torch.__version__}, timm {timm.__version__}, no caches, batch 2. Seconds "
        "by regions (in brackets: timm's model, compiled as a whole), and their ratio.",
        "",
        "| model, drop path | first update or cycle | ratio | all compiling | ratio | graphs |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [f"{row['model']} {row['drop_path']}"]
        for column in ("first", "all"):
            ours, whole = row[f"regions_{column}"], row[f"whole_{column}"]
            cells += [f"{ours:.0f} ({whole:.0f})", f"{ours / whole:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {row['regions_graphs']:.0f} |")
    (args.output / "cold_start.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
