"""Run timm's training script and ours with the same flags and compare what they leave behind.

    python benchmarks/parity.py --timm-script pytorch-image-models/train.py

The script must be of the timm release that is installed. Each case trains for two epochs on 112
handwritten digits, on the CPU, without `--rdp`. A case agrees if summary.csv has the same bytes and
every tensor of the last checkpoint (weights, EMA weights, optimizer state) has the same bits.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits

REPOSITORY = Path(__file__).resolve().parents[1]
COMMON = (
    "--data-dir {data} --num-classes 10 --workers 0 --epochs 2 --device cpu -b 16 "
    "--warmup-epochs 1 --log-interval 3"
)
VIT = "--model test_vit --img-size 32 --model-kwargs img_size=32 depth=3"
RESNET = "--model test_resnet --img-size 32"
EFFICIENTNET = "--model test_efficientnet --img-size 32"
DISTILLED = (
    "--model deit_tiny_distilled_patch16_224 --img-size 32 "
    "--model-kwargs img_size=32 depth=2 embed_dim=48"
)
NAFLEX = (
    "--model naflexvit_base_patch16_gap --model-kwargs embed_dim=32 depth=2 num_heads=2 "
    "--naflex-loader --naflex-train-seq-lens 4 9 --naflex-max-seq-len 4"
)
MULTILABEL = (
    "--task multilabel --dataset hfds/{labels} --data-dir {cache} --target-key labels "
    "--num-classes 4"
)
ADAMW = "--opt adamw --lr 1e-3 --weight-decay 0.05"
SGD = "--opt sgd --lr 0.05"


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        name: says what it touches.
        flags: beside COMMON; {teacher} is a folder with a model, {data} the images.
        then: flags of a second run of both scripts that resumes the timm script's checkpoint.
        swap: whether each script then runs on the args.yaml that the other one wrote.
    """

    name: str
    flags: str
    then: str = ""
    swap: bool = False


CASES = (
    Case("ViT, SGD, cosine", f"{VIT} {SGD}"),
    Case("ResNet with BatchNorm, SGD, step", f"{RESNET} {SGD} --sched step --decay-epochs 1"),
    Case(
        "EfficientNet, RMSprop, EMA with warmup",
        f"{EFFICIENTNET} --opt rmsproptf --lr 0.01 --model-ema --model-ema-decay 0.99 "
        "--model-ema-warmup",
    ),
    Case("ViT, AdamW, layer decay, drop path", f"{VIT} {ADAMW} --layer-decay 0.7 --drop-path 0.3"),
    Case(
        "mixup + cutmix in the prefetcher, EMA",
        f"{VIT} {ADAMW} --mixup 0.8 --cutmix 1.0 --mixup-off-epoch 1 --model-ema",
    ),
    Case(
        "mixup + cutmix without prefetcher, BCE",
        f"{RESNET} --opt lamb --lr 5e-3 --mixup 0.2 --cutmix 1.0 --bce-loss "
        "--bce-target-thresh 0.2 --no-prefetcher",
    ),
    Case("BCE with smoothing, sum", f"{RESNET} {SGD} --bce-loss --bce-sum"),
    Case(
        "RandAugment, random erasing, grayscale, blur",
        f"{VIT} {ADAMW} --aa rand-m7-mstd0.5-inc1 --reprob 0.5 --recount 2 --grayscale-prob 0.2 "
        "--gaussian-blur-prob 0.2",
    ),
    Case(
        "accumulation by 4 with 3 left over, clip norm",
        f"{RESNET} {SGD} --grad-accum-steps 4 --clip-grad 1.0 --sched-on-updates",
    ),
    Case(
        "accumulation by 5 with 2 left over, drop path",
        f"{VIT} {ADAMW} --grad-accum-steps 5 --drop-path 0.2 --drop 0.1 --recovery-interval 1",
    ),
    Case("clip value", f"{VIT} {SGD} --clip-grad 0.01 --clip-mode value"),
    Case("clip agc", f"{RESNET} {SGD} --clip-grad 0.02 --clip-mode agc"),
    Case("plateau, on the loss", f"{RESNET} {SGD} --sched plateau --eval-metric loss"),
    Case(
        "schedule per update with noise, Lookahead",
        f"{RESNET} --opt lookahead_sgd --lr 0.05 --sched-on-updates --lr-noise 0.1 0.9",
    ),
    Case("learning rate from its base, LAMB", f"{VIT} --opt lamb --lr-base 0.01"),
    Case("bf16 AMP, channels last", f"{RESNET} {SGD} --amp --amp-dtype bfloat16 --channels-last"),
    Case("bf16 weights, EMA", f"{VIT} {ADAMW} --model-dtype bfloat16 --model-ema"),
    Case(
        "gradient checkpointing, fast norm, head init",
        f"{VIT} {ADAMW} --grad-checkpointing --fast-norm --head-init-scale 0.5 "
        "--head-init-bias -2 --drop-path 0.2",
    ),
    Case(
        "AugMix with JSD, split BN",
        f"{RESNET} {SGD} --aa augmix-m3-w2 --aug-splits 3 --jsd-loss --split-bn",
    ),
    Case(
        "augmentation splits with JSD, random erasing",
        f"{RESNET} {SGD} --aug-splits 2 --jsd-loss --resplit --reprob 0.3",
    ),
    Case("test-time augmentation, val interval", f"{VIT} {SGD} --tta 2 --val-interval 2"),
    Case("no validation split", f"{VIT} {SGD} --val-split {{none}}"),
    Case("multi-epochs loader, no augmentation", f"{VIT} {SGD} --use-multi-epochs-loader --no-aug"),
    Case("logit distillation", f"{VIT} {ADAMW} --kd-model-name local-dir:{{teacher}}"),
    Case(
        "feature distillation, clip agc",
        f"{RESNET} {SGD} --kd-model-name local-dir:{{teacher}} --kd-distill-type feature "
        "--distill-loss-weight 0.5 --clip-grad 0.1 --clip-mode agc --model-ema",
    ),
    Case(
        "token distillation",
        f"{DISTILLED} {ADAMW} --kd-model-name local-dir:{{teacher}} --kd-distill-type token",
    ),
    Case("NaFlex, variable length, mixup", f"{NAFLEX} {ADAMW} --mixup 0.8"),
    Case(
        "NaFlex, variable patch size",
        f"{NAFLEX} {ADAMW} --naflex-patch-sizes 8 16 --naflex-loss-scale sqrt "
        "--model-kwargs embed_dim=32 depth=2 num_heads=2 enable_patch_interpolator=True",
    ),
    Case(
        "scheduled sizes and batches",
        f"{RESNET} {SGD} --train-img-sizes 32 48 --train-batch-sizes 16 8 "
        "--train-size-schedule progressive --variable-batch-loss-scale linear",
    ),
    Case("torchscript", f"{RESNET} {SGD} --torchscript"),
    Case("torch.compile", f"{VIT} {SGD} --torchcompile aot_eager"),
    Case(
        "resume with EMA",
        f"{VIT} {ADAMW} --model-ema --drop-path 0.2 --epochs 1",
        then=f"{VIT} {ADAMW} --model-ema --drop-path 0.2 --epochs 3",
    ),
    Case(
        "resume without optimizer, start epoch",
        f"{RESNET} {SGD} --epochs 1",
        then=f"{RESNET} {SGD} --epochs 3 --no-resume-opt --start-epoch 1 --sched-on-updates",
    ),
    Case(
        "multilabel, mixup in the prefetcher, EMA",
        f"{VIT} {ADAMW} {MULTILABEL} --mixup 0.8 --smoothing 0.1 --model-ema",
    ),
    Case(
        "multilabel, asymmetric loss, no prefetcher",
        f"{RESNET} {SGD} {MULTILABEL} --loss asl "
        "--no-prefetcher --mixup 0.2 --eval-metric micro_f1",
    ),
    Case(
        "multilabel, several fields, weights",
        f"{VIT} {SGD} {MULTILABEL} "
        "--target-key odd,large,prime --num-classes 3 --loss-pos-weight 2 "
        "--loss-class-weight 1,2,3",
    ),
    Case(
        "multilabel, vectors, two-way loss",
        f"{VIT} {SGD} {MULTILABEL} --target-key vector --target-format multihot --loss twoway",
    ),
    Case("multilabel, NaFlex, mixup", f"{NAFLEX} {ADAMW} {MULTILABEL} --mixup 0.8"),
    Case("poly loss", f"{RESNET} {SGD} --loss poly --poly-epsilon 1"),
    Case(
        "each on the args.yaml of the other",
        f"{VIT} {ADAMW} --mixup 0.5 --aa rand-m5-inc1 --sched wsd --decay-epochs 1 --drop-path 0.2 "
        "--opt-betas 0.9 0.95 --clip-grad 1.0",
        swap=True,
    ),
    Case("poly loss, mixup", f"{RESNET} {SGD} --loss poly --mixup 0.5"),
    Case("warmup-stable-decay", f"{VIT} {ADAMW} --sched wsd --decay-epochs 1"),
    Case(
        "reciprocal square root, per update",
        f"{VIT} {ADAMW} --sched rsqrt --sched-on-updates --lr-stable-timescale 0.5 --epochs 3",
    ),
    Case("constant schedule, layer decay", f"{VIT} {ADAMW} --sched constant --layer-decay 0.7"),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--timm-script", required=True, metavar="PATH", help="timm's train.py")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cases at the same time")
    parser.add_argument("--keep", default="", metavar="DIR", help="keep what the runs wrote there")
    options = parser.parse_args(argv)

    script = Path(options.timm_script).resolve()
    if not script.is_file():
        parser.error(f"--timm-script {script}: there is no such file")
    cases = [case for case in CASES if options.only in case.name]
    if not cases:
        parser.error(f"--only {options.only!r}: no case has that in its name")
    root = Path(options.keep or tempfile.mkdtemp(prefix="parity-")).resolve()
    try:
        write_digits(root / "data")
        write_teacher(root / "teacher")
        write_labels(root / "labels", root / "data")
        width = max(len(case.name) for case in cases)
        print(f"timm {timm.__version__}, torch {torch.__version__}")
        print(f"{'case':{width}}  summary.csv  checkpoint", flush=True)
        agreed = 0
        with ThreadPoolExecutor(options.jobs) as pool:
            results = pool.map(
                lambda item: compare(item[1], root, item[0], script), enumerate(cases)
            )
            for case, (summary, checkpoint) in zip(cases, results, strict=True):
                print(f"{case.name:{width}}  {summary:11}  {checkpoint}", flush=True)
                agreed += summary == "same" and checkpoint.startswith("same")
        print(f"{agreed} of {len(cases)} agree")
    finally:
        if not options.keep:
            shutil.rmtree(root, ignore_errors=True)
    return 0 if agreed == len(cases) else 1


def write_digits(folder: Path, train: int = 112, validation: int = 48) -> None:
    """Write digits as an ImageFolder of 32 x 32 pixels."""
    digits = load_digits()
    for split, start, count in (("train", 0, train), ("validation", 1000, validation)):
        for index in range(start, start + count):
            target = folder / split / str(digits.target[index])
            target.mkdir(parents=True, exist_ok=True)
            grey = (digits.images[index] * (255 / 16)).round().astype("uint8")
            Image.fromarray(grey).convert("RGB").resize((32, 32)).save(target / f"{index}.png")


def write_labels(folder: Path, images: Path) -> None:
    """Write the digits as a Hugging Face data set with several labels each."""
    import datasets

    for split in ("train", "validation"):
        rows = [
            {
                "image": {"bytes": path.read_bytes(), "path": path.name},
                "labels": [name for name, holds in enumerate(labels) if holds],
                "vector": [float(holds) for holds in labels],
                **dict(zip(("odd", "large", "prime"), labels, strict=False)),
            }
            for path in sorted((images / split).rglob("*.png"))
            for digit in [int(path.parent.name)]
            for labels in [[digit % 2 == 1, digit > 4, digit in (2, 3, 5, 7), digit % 3 == 0]]
        ]
        data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


def write_teacher(folder: Path) -> None:
    """Write a small model, with random weights, that `local-dir:` finds."""
    torch.manual_seed(1)
    teacher = timm.create_model("test_efficientnet", num_classes=10)
    timm.models.save_for_hf(teacher, str(folder), safe_serialization=True)


def compare(case: Case, root: Path, number: int, script: Path) -> tuple[str, str]:
    """Run a case with both scripts; what the comparison says of summary.csv and checkpoint."""
    commands = {
        "timm": [str(script)],
        "ours": ["-c", "import sys; from timm_rdp.training.train import main; sys.exit(main())"],
    }
    folders = {}
    for who, command in commands.items():
        folder = root / f"{number}-{who}"
        if error := run(command, case.flags, folder, "first", root):
            return who, error
        folders[who] = folder / "first"
    first = folders["timm"]
    if case.then:
        flags = f"{case.then} --resume {first / 'last.pth.tar'}"
        for who, command in commands.items():
            if error := run(command, flags, root / f"{number}-{who}", "then", root):
                return who, error
            folders[who] = root / f"{number}-{who}" / "then"
    if case.swap:
        for who, other in (("timm", "ours"), ("ours", "timm")):
            flags = f"-c {root / f'{number}-{other}' / 'first' / 'args.yaml'}"
            if error := run(commands[who], flags, root / f"{number}-{who}", "then", root):
                return who, error
            folders[who] = root / f"{number}-{who}" / "then"
    return compare_folders(folders["timm"], folders["ours"])


def run(command: list[str], flags: str, folder: Path, experiment: str, root: Path) -> str:
    """Run one script; its last words where it fails, else nothing."""
    folder.mkdir(exist_ok=True)
    flags = f"{COMMON} {flags} --output {folder} --experiment {experiment}"
    places = {name: root / name for name in ("data", "teacher", "labels", "cache")}
    arguments = flags.format(**places, none="NONE").split()
    arguments = ["" if a == "NONE" else a for a in arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    (folder / f"{experiment}.log").write_text(done.stdout + done.stderr)
    return "failed: " + done.stderr.strip().splitlines()[-1] if done.returncode else ""


def compare_folders(timm_folder: Path, our_folder: Path) -> tuple[str, str]:
    """What differs between two finished runs."""
    summaries = [(folder / "summary.csv").read_bytes() for folder in (timm_folder, our_folder)]
    states = [load(folder / "last.pth.tar") for folder in (timm_folder, our_folder)]
    for state in states:
        state.pop("run", None)  # where a run of ours stands, which timm's do not hold
    theirs, ours = (dict(tensors(state)) for state in states)
    if theirs.keys() != ours.keys():
        odd = sorted(theirs.keys() ^ ours.keys())[0]
        checkpoint = f"not the same entries: {odd}"
    else:
        different = [name for name in theirs if not same_bits(theirs[name], ours[name])]
        checkpoint = f"same ({len(theirs)} tensors)"
        if different:
            checkpoint = f"{len(different)} of {len(theirs)} differ, e.g. {different[0]}"
    return "same" if summaries[0] == summaries[1] else "differs", checkpoint


def load(path: Path) -> Any:
    # Not the context of that name: where one thread leaves it, it is gone for the others too.
    torch.serialization.add_safe_globals([argparse.Namespace])
    return torch.load(path, weights_only=True)


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint, by its place in it."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from tensors(entry, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from tensors(entry, f"{name}[{index}]")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return (
        a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()
        if (a.dtype != torch.bfloat16)
        else torch.equal(a.view(torch.int16), b.view(torch.int16))
    )


if __name__ == "__main__":
    sys.exit(main())
