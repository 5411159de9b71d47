"""Images of several labels: --task multilabel, with and without RDP."""

import math

import pytest
import torch
from conftest import LABELS
from core_helpers import same_bits
from runs import VIT, checkpoint, rows, run, watch_iterations

METRICS = ["eval_loss", "eval_map", "eval_micro_f1", "eval_macro_f1", "eval_sample_f1"]


@pytest.mark.parametrize("mode", ["same", "next"])
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--mixup", 0.8, "--smoothing", 0.1, "--model-ema"),
        ("--target-key", "vector", "--target-format", "multihot", "--loss", "asl"),
        ("--target-key", ",".join(LABELS[:3]), "--num-classes", 3, "--no-prefetcher"),
    ],
    ids=["indices", "mixup", "vectors", "fields"],
)
def test_multilabel_targets_train_with_rdp(labels, digits_folder, tmp_path, more, mode):
    rdp = ("--rdp", "--drop-path", 0.5, "--rdp-batch", mode)
    folder = run(digits_folder, tmp_path, *VIT, *rdp, *labels, *more)
    for row in rows(folder):
        assert [name for name in row if name.startswith("eval_")] == METRICS
        assert all(0 <= float(row[name]) <= 100 for name in METRICS[1:])
        assert math.isfinite(float(row["train_loss_droppath"]))
    assert any(row["train_loss_complement"] for row in rows(folder))
    best = max(rows(folder), key=lambda row: float(row["eval_map"]))
    assert checkpoint(folder, "model_best.pth.tar")["metric"] == float(best["eval_map"])
    assert (folder / "curves.png").stat().st_size > 5000


def test_frozen_is_bitwise_unchanged(labels, digits_folder, tmp_path, monkeypatch):
    checked = []

    def before(run):
        run.bits = {n: p.detach().clone() for n, p in run.rdp.model.named_parameters()}

    def after(run):
        it = run.rdp._active
        for name, parameter in run.rdp.model.named_parameters():
            if name not in it.trainable:
                assert torch.equal(parameter, run.bits[name])
        checked.append(it.phase)

    watch_iterations(monkeypatch, before, after)
    run(digits_folder, tmp_path, *VIT, "--rdp", "--drop-path", 0.5, *labels, "--epochs", 1)
    assert {"droppath", "complement"} == set(checked)


def test_a_stopped_and_resumed_run_ends_bitwise_as_one_never_stopped(
    labels, digits_folder, tmp_path
):
    argv = (*VIT, "--rdp", "--drop-path", 0.5, *labels, "--mixup", 0.5)
    whole = run(digits_folder, tmp_path / "whole", *argv)
    cut = run(digits_folder, tmp_path / "cut", *argv, "--stop-epoch", 1)
    cut = run(digits_folder, tmp_path / "cut", *argv, "--resume", "auto")
    assert (cut / "summary.csv").read_bytes() == (whole / "summary.csv").read_bytes()
    assert same_bits(checkpoint(cut)["state_dict"], checkpoint(whole)["state_dict"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--eval-metric top1", "--eval-metric top1 multilabel map"),
        ("--loss zlpr --mixup 0.5", "--loss zlpr Mixup"),
        ("--loss ce", "--loss ce multi-label"),
        ("--loss db", "--loss db class_counts"),
        ("--loss-pos-weight neg_pos", "class stats"),
        ("--loss-class-weight 1,2,3", "3 entries 4 classes"),
        ("--class-stats /no/such/file", "/no/such/file"),
        ("--loss bce --asl-clip 0.1", "--asl-clip --loss asl"),
        ("--bce-loss --loss asl", "--bce-loss --loss asl combined"),
        ("--multilabel-threshold 1.5", "--multilabel-threshold 1.5 between"),
        ("--kd-model-name resnet18", "--kd-model-name multilabel"),
        ("--target-key nothing", "nothing"),
    ],
)
def test_what_does_not_fit_is_one_line(labels, refused, argv, words):
    line = refused(*VIT, *labels, "-j", 0, "-b", 16, *argv.split())
    for word in words.split():
        assert word in line


def test_class_folders_and_missing_counts_are_refused(digits_folder, refused):
    line = refused(*VIT, "--data-dir", digits_folder, "--task", "multilabel", "--num-classes", 10)
    assert "--task multilabel" in line and "--target-key" in line
    line = refused(*VIT, "--data-dir", digits_folder, "--task", "multilabel")
    assert "--task multilabel" in line and "--num-classes" in line
    line = refused(*VIT, "--data-dir", digits_folder, "--target-format", "multihot")
    assert "--target-format multihot" in line and "--task multilabel" in line
