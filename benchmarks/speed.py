"""What an update costs with ResidualDroppath, against timm's own at the same drop rate.

    python benchmarks/speed.py --output benchmarks/results/speed_cpu

Everything in a row is measured in one process, interleaved: each round has one of timm's updates,
one cycle of ResidualDroppath and one update with each kind of skip_dropped, on the same batch. With
--compile, timm's model and the skipping one are compiled as a whole, and ResidualDroppath's by
regions; skip_dropped with drawn samples, which does not compile, is left out. Beside each measured
ratio stands the one that floating-point operations predict, counted over the very masks
that were measured. Writes speed.csv, speed.md and speed.png.
"""

import argparse
import csv
import gc
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from tqdm import tqdm

from timm_rdp import ResidualDropPath, skip_dropped
from timm_rdp.study.compare.cost import flop_counter

ROWS = (
    ("vit_small_patch16_224", 0.1),
    ("vit_small_patch16_224", 0.4),
    ("resnet50", 0.1),
    ("convnext_tiny", 0.1),
    ("swin_tiny_patch4_window7_224", 0.2),
    ("efficientnet_b0", 0.2),
    ("mixer_s16_224", 0.1),
    # Not measured unless they are asked for:
    ("vit_tiny_patch16_224", 0.1),
    ("vit_tiny_patch16_224", 0.4),
)
COLUMNS = ("droppath", "complement", "next", "same", "skip_dropped", "skip_fixed")


def main() -> None:
    args = parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    if args.peak_memory_of:
        print(peak_memory(args, args.peak_memory_of))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    rows = [ROWS[i] for i in args.rows or range(7)]
    if args.quick:
        rows = [("test_vit", 0.4)]
    results = []
    for name, rate in tqdm(rows, desc="models", disable=None):
        results.append(measure(args, name, rate))
        gc.collect()
        write(args, results)
    sizes = []
    for size in args.batch_sizes:
        sizes.append(measure(with_batch_size(args, size), *ROWS[0]))
    overhead = [measure_overhead(args, depth) for depth in (12, 24, 48)]
    write(args, results, overhead, sizes)
    print((args.output / "speed.md").read_text())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/speed"))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20, help="cycles per row")
    parser.add_argument("--rows", type=int, nargs="*", help="which, by number (default: 0 to 6)")
    parser.add_argument(
        "--batch-sizes",
        type=int,
        nargs="*",
        default=(4, 8, 32),
        help="more batch sizes, for the first model",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile all variants")
    parser.add_argument(
        "--memory", action="store_true", help="peak memory, in processes of its own"
    )
    parser.add_argument("--quick", action="store_true", help="one tiny model, to try the benchmark")
    parser.add_argument("--peak-memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.batch_size, args.rounds, args.batch_sizes = 4, 3, []
    return args


def with_batch_size(args: argparse.Namespace, size: int) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), "batch_size": size, "memory": False})


def create(name: str, rate: float) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, drop_path_rate=rate).train()


def batch(args: argparse.Namespace, model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch_size, *model.pretrained_cfg["input_size"], generator=generator)
    targets = torch.randint(0, 1000, (args.batch_size,), generator=generator)
    return images.to(args.device), targets.to(args.device)


class Trainee:
    """A model with its optimizer, and its update."""

    def __init__(self, args: argparse.Namespace, model: torch.nn.Module):
        self.args = args
        self.model = model.to(args.device)
        self.run = self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def update(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        kind = torch.device(self.args.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=self.args.bf16):
            loss = F.cross_entropy(self.run(images), targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def timed(args: argparse.Namespace, call) -> float:
    synchronize = torch.cuda.synchronize if "cuda" in args.device else lambda: None
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def measure(args: argparse.Namespace, name: str, rate: float) -> dict:
    plain, method, drawn, fixed = (Trainee(args, create(name, rate)) for _ in range(4))
    rdp = ResidualDropPath(method.model)
    skip_dropped(fixed.model, samples="fixed")
    skipping = {"skip_dropped": drawn, "skip_fixed": fixed}
    if args.compile:
        del skipping["skip_dropped"]
        rdp.compile()
        for trainee in (plain, fixed):
            trainee.run = torch.compile(trainee.model)
    else:
        skip_dropped(drawn.model)
    data = batch(args, plain.model)

    for trainee in (plain, *skipping.values()):  # warm up: allocator, kernels, compilation
        trainee.update(*data)
    rdp_start = rdp.state_dict()
    for _ in range(args.rounds if args.compile else 1):
        for it in rdp.cycle():
            with it:
                method.update(*data)
    rdp.load_state_dict(rdp_start)

    kinds = ("timm", "droppath", "complement", "skip_dropped", "skip_fixed")
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    ratios: dict[str, list[float]] = {kind: [] for kind in times}  # to timm's of the same round
    for _ in tqdm(range(args.rounds), desc=f"{name} {rate}", leave=False, disable=None):
        usual = timed(args, lambda: plain.update(*data))
        spent = [("timm", usual)]
        for it in rdp.cycle():
            with it:
                spent.append((it.phase, timed(args, lambda: method.update(*data))))
        for kind, trainee in skipping.items():
            spent.append((kind, timed(args, partial(trainee.update, *data))))
        for kind, seconds in spent:
            times[kind].append(seconds)
            ratios[kind].append(seconds / usual)

    counted = predict(args, name, rate, rdp_start)
    base = statistics.median(times["timm"])
    result = {
        "model": name,
        "drop_path": rate,
        "batch": args.batch_size,
        "timm_seconds": base,
        "timm_spread": spread(times["timm"], base),
        "cycles_with_complement": len(times["complement"]) / args.rounds,
    }
    for kind in kinds[1:]:
        result[kind] = statistics.median(ratios[kind]) if ratios[kind] else float("nan")
        result[f"{kind}_spread"] = spread(ratios[kind], 1.0)
    for kind in ("droppath", "complement"):
        result[f"{kind}_predicted"] = statistics.median(counted[kind] or [float("nan")])
    # What a batch costs is a mean over masks, and a mean of times is at the mercy of whatever else
    # the machine does. So each iteration is measured against what its own mask predicts, and the
    # median of that, of each kind of iteration, is applied to the mean over masks.
    total = predicted = 0.0
    for kind in ("droppath", "complement"):
        excess = [r / c for r, c in zip(ratios[kind], counted[kind], strict=True)]
        result[f"{kind}_excess"] = statistics.median(excess) if excess else float("nan")
        predicted += sum(counted[kind])
        total += sum(counted[kind]) * (result[f"{kind}_excess"] if excess else 0.0)
    iterations = len(ratios["droppath"]) + len(ratios["complement"])
    for kind, count in (("next", iterations), ("same", args.rounds)):
        result[kind], result[f"{kind}_predicted"] = total / count, predicted / count
    if args.memory:
        for kind in kinds:
            result[f"{kind}_memory_mib"] = in_own_process(args, name, rate, kind)
    return result


def spread(values: list[float], unit: float) -> float:
    """Half the distance between the quartiles, in `unit`."""
    if len(values) < 2:
        return float("nan")
    first, _, third = statistics.quantiles(values, n=4)
    return (third - first) / 2 / unit


def predict(
    args: argparse.Namespace, name: str, rate: float, start: dict
) -> dict[str, list[float]]:
    """Ratio of floating-point operations of each iteration, over the masks that were measured."""
    model = create(name, rate).to("meta")
    data = tuple(t.to("meta") for t in batch(args, model))

    def flops() -> int:
        with flop_counter() as counter:
            F.cross_entropy(model(data[0]), data[1]).backward()
        model.zero_grad()
        return counter.get_total_flops()

    base = flops()
    rdp = ResidualDropPath(model)
    rdp.load_state_dict(start)
    counts: dict[str, list[float]] = {"droppath": [], "complement": []}
    for _ in range(args.rounds):
        for it in rdp.cycle():
            with it:
                counts[it.phase].append(flops() / base)
    return counts


def in_own_process(args: argparse.Namespace, name: str, rate: float, kind: str) -> float:
    """What `peak_memory` returns in a process that has done nothing else."""
    # glibc else moves this threshold up, and keeps what is freed in a heap with holes: the peak of
    # the same update then differs by a tenth from process to process.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    command = [sys.executable, __file__, "--peak-memory-of", kind, "--model", name]
    command += ["--rate", str(rate), "--batch-size", str(args.batch_size), "--device", args.device]
    command += ["--bf16"] * args.bf16
    out = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout
    return float(out.split()[-1])


def peak_memory(args: argparse.Namespace, kind: str) -> float:
    """Peak memory in MiB of an update of one kind, beyond what there is before it begins."""
    trainee = Trainee(args, create(args.model, args.rate))
    data = batch(args, trainee.model)
    on_gpu = "cuda" in args.device
    rdp = None
    if kind.startswith("skip"):
        skip_dropped(trainee.model, samples="fixed" if kind == "skip_fixed" else "drawn")
    elif kind != "timm":
        rdp = ResidualDropPath(trainee.model)
    for parameter in trainee.model.parameters():
        trainee.optimizer.state[parameter] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.ones_like(parameter),
            "exp_avg_sq": torch.ones_like(parameter),
        }

    gc.collect()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, see proc(5)

    def peak() -> float:
        if on_gpu:
            return torch.cuda.max_memory_allocated() / 2**20
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    before = peak()
    while rdp is not None:
        it = rdp.iteration()
        if it.phase == kind:
            with it:
                trainee.update(*data)
            break
        with it:  # the complement needs no droppath update to have its set
            pass
    else:
        trainee.update(*data)
    return peak() - before


def measure_overhead(args: argparse.Namespace, depth: int) -> dict:
    """Microseconds per update that are ours: entering and leaving an iteration, nothing inside."""
    model = timm.create_model("test_vit", depth=depth, drop_path_rate=0.2)
    rdp = ResidualDropPath(model)
    values = []
    for _ in range(200):
        start = time.perf_counter()
        with rdp.iteration():
            pass
        values.append((time.perf_counter() - start) * 1e6)
    return {
        "depth": depth,
        "paths": len(rdp.paths),
        "parameters": sum(1 for _ in model.parameters()),
        "microseconds": statistics.median(values),
    }


def write(
    args: argparse.Namespace, results: list[dict], overhead: Sequence = (), sizes: Sequence = ()
) -> None:
    with open(args.output / "speed.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(results[0]))
        writer.writeheader()
        writer.writerows([*results, *sizes])
    device = torch.cuda.get_device_name() if "cuda" in args.device else f"CPU, {platform.machine()}"
    lines = [
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, timm "
        f"{timm.__version__}, batch {args.batch_size}, {'bfloat16' if args.bf16 else 'float32'}, "
        f"{'compiled' if args.compile else 'eager'}, {args.rounds} cycles a row. "
        "Ratios to timm's own update; in brackets what floating-point operations predict. "
        "droppath, complement, skip_dropped, skip_fixed: median of the ratios to timm's update of "
        "the same round ± half the distance between their quartiles. next (per update), same (per "
        "batch): mean over the masks, from each kind's median ratio of measured to predicted.",
        "",
        *heading("model, rate"),
    ]
    lines += [line_of(row, f"{row['model']} {row['drop_path']}") for row in results]
    if args.memory:
        kinds = ("timm", "droppath", "complement", "skip_dropped", "skip_fixed")
        lines += ["", f"| peak memory of an update, MiB | {' | '.join(kinds)} |"]
        lines.append("| --- | --- | --- | --- | --- | --- |")
        for row in results:
            cells = [f"{row[f'{k}_memory_mib']:.0f}" for k in kinds]
            lines.append(f"| {row['model']} {row['drop_path']} | {' | '.join(cells)} |")
    if sizes:
        lines += ["", f"The same for {sizes[0]['model']} {sizes[0]['drop_path']}:", ""]
        lines += heading("batch")
        lines += [line_of(row, str(row["batch"])) for row in sizes]
    if overhead:
        lines += ["", "| blocks | paths | parameters | ours per iteration, µs |"]
        lines.append("| --- | --- | --- | --- |")
        for row in overhead:
            cells = (row["depth"], row["paths"], row["parameters"], f"{row['microseconds']:.0f}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    (args.output / "speed.md").write_text("\n".join(lines) + "\n")
    draw(args, results)


def heading(first: str) -> list[str]:
    names = (first, "timm, s", *COLUMNS)
    return [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]


def line_of(row: dict, title: str) -> str:
    cells = [title, f"{row['timm_seconds']:.3f}"]
    for kind in COLUMNS:
        text = f"{row[kind]:.2f}"
        if f"{kind}_spread" in row:
            text += f" ± {row[f'{kind}_spread']:.2f}"
        if f"{kind}_predicted" in row:
            text += f" ({row[f'{kind}_predicted']:.2f})"
        cells.append("" if math.isnan(row[kind]) else text)
    return f"| {' | '.join(cells)} |"


def draw(args: argparse.Namespace, results: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.9 * len(results)), layout="constrained")
    kinds = ("droppath", "complement", "next", "same")
    for k, (kind, shade) in enumerate(zip(kinds, ("0.15", "0.4", "0.6", "0.8"), strict=True)):
        places = [i + (k - 1.5) * 0.2 for i in range(len(results))]
        axes.barh(places, [r[kind] for r in results], height=0.18, color=shade, label=kind)
        axes.plot(
            [r[f"{kind}_predicted"] for r in results],
            places,
            "|",
            color="#d55e00",
            markersize=12,
            markeredgewidth=2.5,
            label="predicted from FLOPs" if k == 3 else None,
        )
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(
        range(len(results)), [f"{r['model']}\ndrop path {r['drop_path']}" for r in results]
    )
    axes.invert_yaxis()
    axes.set_xlabel("time relative to timm's own update")
    axes.set_title("Cost of ResidualDroppath: one update of each kind against timm's")
    figure.legend(loc="outside lower center", ncols=5)
    figure.savefig(args.output / "speed.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
