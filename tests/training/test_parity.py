"""Without --rdp a run is timm's, bit for bit.

The reference of the default tests is a loop written out below on timm's library; timm's own script
is run by `benchmarks/parity.py`, which the test at the end does where TIMM_TRAIN_SCRIPT names it.
"""

import csv
import importlib.util
import io
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from core_helpers import same_bits
from runs import RESNET, VIT, checkpoint, run
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.task import ClassificationEvaluator
from timm.utils import AverageMeter

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "parity.py"


@pytest.fixture(scope="module")
def parity():
    spec = importlib.util.spec_from_file_location("parity", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules["parity"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["parity"]


def loaders(folder, model, mix=None, batch_size=16, prefetcher=True, **train):
    """timm's loaders of a folder, and the mixup that is left to the loop."""
    config = resolve_data_config(dict(img_size=32), model=model)
    common = dict(
        input_size=(3, 32, 32), batch_size=batch_size, num_workers=0, use_prefetcher=prefetcher,
        device=torch.device("cpu"), mean=config["mean"], std=config["std"],
    )  # fmt: skip
    kind = timm.data.FastCollateMixup if prefetcher else timm.data.Mixup
    mixup = mix and kind(label_smoothing=0.1, num_classes=10, **mix)
    training = create_loader(
        create_dataset("", root=str(folder), split="train"), is_training=True, re_mode="pixel",
        interpolation="random", collate_fn=mixup if prefetcher else None, **common, **train,
    )  # fmt: skip
    validation = create_loader(
        create_dataset("", root=str(folder), split="validation"),
        interpolation=config["interpolation"], crop_pct=config["crop_pct"], **common,
    )  # fmt: skip
    return training, validation, None if prefetcher else mixup


def reference_run(
    folder, *, data, model, loss, optimizer, schedule, accumulate=1, clip=None, ema=None
):
    """Two epochs as timm's script trains them; its summary.csv, weights and EMA weights."""
    torch.manual_seed(42), np.random.seed(42), random.seed(42)
    model = model()
    training, validation, mixup = loaders(folder, model, **data)
    optimizer = optimizer(model)
    average = ema and timm.utils.ModelEmaV3(model, **ema)
    per_epoch = -(-len(training) // accumulate)
    scheduler, _ = timm.scheduler.create_scheduler_v2(
        optimizer, num_epochs=2, warmup_epochs=0, warmup_lr=1e-5, updates_per_epoch=per_epoch,
        **schedule,
    )  # fmt: skip
    text = io.StringIO(newline="")
    writer = None
    for epoch in range(2):
        losses, updates, size = AverageMeter(), epoch * per_epoch, accumulate
        model.train()
        optimizer.zero_grad()
        for index, (images, labels) in enumerate(training):
            update = index == len(training) - 1 or (index + 1) % size == 0
            if index >= len(training) // accumulate * accumulate:
                size = len(training) % accumulate
            if mixup:
                images, labels = mixup(images, labels)
            value = loss(model(images), labels) / size
            value.backward()
            losses.update(value.item() * size, len(images))
            if update:
                if clip:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
                updates += 1
                if average:
                    average.update(model, step=updates)
                scheduler.step_update(updates)
        metrics = [evaluate(model, validation)]
        if average:
            metrics.append(evaluate(average.module, validation))
        groups = optimizer.param_groups
        row = {"epoch": epoch, "train_loss": losses.avg, **metrics[-1]}
        row["lr"] = sum(group["lr"] for group in groups) / len(groups)
        if writer is None:
            writer = csv.DictWriter(text, row)
            writer.writeheader()
        writer.writerow(row)
        scheduler.step(epoch + 1, row["eval_top1"])
    return text.getvalue().encode(), model.state_dict(), average and average.module.state_dict()


@torch.inference_mode()
def evaluate(model, loader):
    evaluator = ClassificationEvaluator()
    model.eval()
    for images, labels in loader:
        evaluator.update(model(images), labels)
    return {f"eval_{name}": value for name, value in evaluator.compute().items()}


CASES = {
    "ViT, AdamW, mixup and cutmix in the prefetcher, drop path, EMA with warmup": (
        (*VIT, "--mixup", 0.8, "--cutmix", 1.0, "--drop-path", 0.3, "--reprob", 0.3,
         "--model-ema", "--model-ema-decay", 0.9, "--model-ema-warmup"),
        dict(
            data=dict(mix=dict(mixup_alpha=0.8, cutmix_alpha=1.0), re_prob=0.3),
            model=lambda: timm.create_model(
                "test_vit", num_classes=10, img_size=32, depth=3, drop_path_rate=0.3
            ),
            loss=timm.loss.SoftTargetCrossEntropy(),
            optimizer=lambda m: timm.optim.create_optimizer_v2(
                m, "adamw", lr=1e-3, weight_decay=2e-5
            ),
            schedule=dict(sched="cosine"),
            ema=dict(decay=0.9, use_warmup=True),
        ),
    ),
    "ResNet, SGD, accumulation with a remainder, clipping, schedule per update": (
        (*RESNET, "--opt", "sgd", "--lr", 0.05, "-b", 11, "--grad-accum-steps", 4,
         "--clip-grad", 0.5, "--sched-on-updates", "--aa", "rand-m5-inc1"),
        dict(
            data=dict(batch_size=11, auto_augment="rand-m5-inc1"),
            model=lambda: timm.create_model("test_resnet", num_classes=10),
            loss=timm.loss.LabelSmoothingCrossEntropy(0.1),
            optimizer=lambda m: timm.optim.create_optimizer_v2(
                m, "sgd", lr=0.05, weight_decay=2e-5
            ),
            schedule=dict(sched="cosine", step_on_epochs=False),
            accumulate=4,
            clip=0.5,
        ),
    ),
    "ResNet, LAMB, BCE, mixup without prefetcher, step": (
        (*RESNET, "--opt", "lamb", "--lr", 5e-3, "--bce-loss", "--mixup", 0.2, "--no-prefetcher",
         "--sched", "step", "--decay-epochs", 1, "--drop", 0.2),
        dict(
            data=dict(mix=dict(mixup_alpha=0.2, cutmix_alpha=0.0), prefetcher=False),
            model=lambda: timm.create_model("test_resnet", num_classes=10, drop_rate=0.2),
            loss=timm.loss.BinaryCrossEntropy(),
            optimizer=lambda m: timm.optim.create_optimizer_v2(
                m, "lamb", lr=5e-3, weight_decay=2e-5
            ),
            schedule=dict(sched="step", decay_epochs=1, decay_rate=0.1),
        ),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:unclosed file")  # timm's own loader leaves images open
@pytest.mark.parametrize("case", CASES)
def test_a_plain_run_is_timms_to_the_last_bit(digits_folder, tmp_path, case):
    more, reference = CASES[case]
    folder = run(digits_folder, tmp_path / "ours", *more)
    summary, weights, average = reference_run(digits_folder, **reference)
    assert (folder / "summary.csv").read_bytes() == summary
    state = checkpoint(folder)
    assert same_bits(dict(state["state_dict"]), dict(weights))
    assert ("state_dict_ema" in state) == bool(average)
    if average:
        assert same_bits(dict(state["state_dict_ema"]), dict(average))


def test_the_benchmark_finds_a_single_bit(parity, digits_folder, tmp_path):
    folders = [run(digits_folder, tmp_path / name, *VIT, "--epochs", 1) for name in "ab"]
    summary, tensors = parity.compare_folders(*folders)
    assert summary == "same" and tensors.startswith("same (")

    state = checkpoint(folders[1])
    weight = state["state_dict"]["head.bias"]
    weight.view(torch.int32)[3] ^= 1
    torch.save(state, folders[1] / "last.pth.tar")
    (folders[1] / "summary.csv").write_bytes((folders[1] / "summary.csv").read_bytes()[:-1])
    summary, tensors = parity.compare_folders(*folders)
    assert summary == "differs"
    assert tensors.startswith("1 of ") and "head.bias" in tensors

    del state["state_dict"]["head.bias"]
    torch.save(state, folders[1] / "last.pth.tar")
    assert "head.bias" in parity.compare_folders(*folders)[1]


def test_the_benchmark_touches_what_it_should(parity):
    assert len(parity.CASES) >= 36
    text = " ".join(f"{case.flags} {case.then}" for case in parity.CASES)
    for flag in (
        "test_vit", "test_resnet", "test_efficientnet", "--opt sgd", "--opt adamw", "--opt lamb",
        "--mixup", "--cutmix", "--no-prefetcher", "--bce-loss", "--aa rand", "--reprob",
        "--model-ema-warmup", "--grad-accum-steps", "--clip-grad", "--clip-mode value",
        "--clip-mode agc", "--sched step", "--sched plateau", "--sched-on-updates",
        "--layer-decay", "--amp-dtype bfloat16", "--drop-path", "--kd-distill-type feature",
        "--kd-distill-type token", "--naflex-loader", "--train-img-sizes", "--jsd-loss",
        "--task multilabel", "--target-format multihot", "--loss poly", "--sched wsd",
    ):  # fmt: skip
        assert flag in text, flag
    assert any(case.then for case in parity.CASES)


@pytest.mark.slow
@pytest.mark.skipif("TIMM_TRAIN_SCRIPT" not in os.environ, reason="TIMM_TRAIN_SCRIPT is not set")
def test_timms_script_and_ours_agree(parity, capsys):
    status = parity.main(["--timm-script", os.environ["TIMM_TRAIN_SCRIPT"], "--jobs", "2"])
    print(capsys.readouterr().out)
    assert status == 0
