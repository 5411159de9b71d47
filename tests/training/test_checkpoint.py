"""Checkpoints: what is in them, going on from them, and what cannot be used."""

import argparse
import errno
import logging
import os
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import timm
import torch
from core_helpers import same_bits
from runs import RESNET, VIT, checkpoint, flags, rows, run

from timm_rdp.training import train
from timm_rdp.training.saver import Saver

RDP = ("--rdp", "--drop-path", "0.7")


def model_of(name="test_vit", **kwargs):
    return timm.create_model(name, num_classes=10, img_size=32, depth=3, **kwargs)


def test_our_checkpoints_load_in_plain_timm_with_strict(digits_folder, tmp_path):
    folder = run(digits_folder, tmp_path, *VIT, *RDP, "--model-ema", "--epochs", 1)
    state = checkpoint(folder)
    model_of().load_state_dict(state["state_dict"], strict=True)
    timm.models.load_checkpoint(model_of(), str(folder / "last.pth.tar"), strict=True)
    assert set(state["state_dict"]) == set(state["state_dict_ema"]) == set(model_of().state_dict())

    model = model_of()
    task = timm.task.ClassificationTask(model, verbose=False)
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=2e-5)
    epoch = timm.task.resume_task_checkpoint(task, str(folder / "last.pth.tar"), optimizer)
    assert epoch == 1
    assert same_bits(model.state_dict(), state["state_dict"])
    assert same_bits(optimizer.state_dict()["state"], state["optimizer"]["state"])


def test_timms_checkpoints_resume_here(digits_folder, tmp_path):
    torch.manual_seed(1)
    model = model_of()
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=2e-5)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(model="test_vit", opt="adamw")
    saver = timm.utils.CheckpointSaver(
        model, optimizer, args, checkpoint_dir=tmp_path, recovery_dir=tmp_path
    )
    saver.save_checkpoint(4, 50.0)
    argv = flags(
        digits_folder, tmp_path, *VIT, *RDP, "--resume", tmp_path / "last.pth.tar", "--epochs", 6
    )
    args = train.parse_args(argv)
    prepared = train.set_up(args)
    assert train.continue_run(args, prepared)[0].epoch == 5
    assert same_bits(prepared.rdp.model.state_dict(), model.state_dict())
    assert same_bits(prepared.optimizer.state_dict()["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize("mode", ["same", "next"])
def test_resume_goes_on_with_the_cycles_and_says_at_which_epoch(
    digits_folder, tmp_path, caplog, mode
):
    more = (*VIT, *RDP, "--rdp-batch", mode, "--epochs", 3)
    whole = run(digits_folder, tmp_path / "whole", *more)
    caplog.set_level(logging.INFO)
    resumed = run(
        digits_folder, tmp_path / "then", *more, "--resume", whole / "checkpoint-1.pth.tar"
    )
    assert checkpoint(resumed)["rdp"] == checkpoint(whole)["rdp"]
    assert checkpoint(whole, "checkpoint-1.pth.tar")["rdp"]["cycle"] > 0
    assert [row["epoch"] for row in rows(resumed)] == ["2"]
    assert rows(resumed)[0]["dropped_paths"] == rows(whole)[2]["dropped_paths"]
    assert any("at epoch 2" in r.message and "Continuing" in r.message for r in caplog.records)


def test_resume_into_the_same_folder_neither_doubles_nor_tears(digits_folder, tmp_path):
    more = (*VIT, *RDP, "--checkpoint-hist", 2)
    folder = run(digits_folder, tmp_path, *more, "--epochs", 3)
    before = rows(folder)
    best = checkpoint(folder, "model_best.pth.tar")["epoch"]
    run(digits_folder, tmp_path, *more, "--epochs", 4, "--resume", folder / "checkpoint-1.pth.tar")
    after = rows(folder)
    assert [row["epoch"] for row in after] == ["0", "1", "2", "3"]
    assert after[:2] == before[:2]
    assert len(list(folder.glob("checkpoint-*.pth.tar"))) == 2
    top = {row["epoch"]: float(row["eval_top1"]) for row in after}
    assert checkpoint(folder, "model_best.pth.tar")["metric"] >= top[str(best)] or best == 2


def test_resume_restores_the_optimizer_and_the_ema(digits_folder, tmp_path):
    more = (*VIT, "--model-ema", "--model-ema-decay", 0.9)
    folder = run(digits_folder, tmp_path, *more, "--epochs", 1)
    last = folder / "last.pth.tar"
    argv = flags(digits_folder, tmp_path, *more, "--resume", last)
    prepared = train.set_up(train.parse_args(argv))
    state = checkpoint(folder)
    assert same_bits(prepared.optimizer.state_dict()["state"], state["optimizer"]["state"])
    ema = prepared.task.get_trainable_module(ema=True).module
    assert same_bits(OrderedDict(ema.state_dict()), state["state_dict_ema"])
    assert not same_bits(state["state_dict_ema"], state["state_dict"])

    torch.save(state["state_dict"], tmp_path / "bare.pth")
    argv[argv.index(str(last))] = str(tmp_path / "bare.pth")
    ema = train.set_up(train.parse_args(argv)).task.get_trainable_module(ema=True).module
    assert same_bits(OrderedDict(ema.state_dict()), state["state_dict"])

    argv += ["--no-resume-opt", "--start-epoch", "0"]
    args = train.parse_args(argv)
    prepared = train.set_up(args)
    assert prepared.optimizer.state_dict()["state"] == {}
    assert train.continue_run(args, prepared)[0].epoch == 0


def test_differing_rdp_options_are_told_in_one_line(digits_folder, tmp_path, caplog):
    folder = run(digits_folder, tmp_path, *VIT, *RDP, "--epochs", 1)
    last = ("--resume", folder / "last.pth.tar")
    set_up = lambda *more: train.set_up(
        train.parse_args(flags(digits_folder, tmp_path / "b", *VIT, *last, *more))
    )
    caplog.set_level(logging.INFO)
    prepared = set_up("--rdp", "--drop-path", 0.3, "--rdp-every", 2, "--rdp-seed", 7)
    (line,) = [r.message for r in caplog.records if "options differ" in r.message]
    for words in ("--drop-path 0.7 -> 0.3", "--rdp-every 1 -> 2", "--rdp-seed None -> 7"):
        assert words in line
    assert (prepared.rdp.every, prepared.rdp.seed) == (2, 7)
    assert prepared.rdp.state_dict()["cycle"] == checkpoint(folder)["rdp"]["cycle"]

    caplog.clear()
    set_up(*RDP)
    assert not [r for r in caplog.records if "options differ" in r.message]
    caplog.clear()
    set_up()
    assert [r for r in caplog.records if "goes on without it" in r.message]


class _Exploit:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (os.mkdir, (self.marker,))


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory, digits_folder):
    folder = tmp_path_factory.mktemp("bad")
    good = run(digits_folder, folder, *VIT, *RDP, "--epochs", 1) / "last.pth.tar"
    content = good.read_bytes()
    (folder / "truncated").write_bytes(content[: len(content) // 2])
    (folder / "empty").write_bytes(b"")
    (folder / "text").write_text("not a checkpoint\n")
    torch.save({"epoch": 3}, folder / "no weights")
    torch.save([1, 2, 3], folder / "a list")
    torch.save({"state_dict": model_of(embed_dim=32).state_dict()}, folder / "other shapes")
    other = timm.create_model("test_resnet", num_classes=10)
    torch.save({"state_dict": other.state_dict()}, folder / "other model")
    torch.save({"state_dict": _Exploit(folder / "marker")}, folder / "exploit")
    torch.save({"state_dict": {"a": _Exploit(folder / "marker")}}, folder / "old exploit",
               _use_new_zipfile_serialization=False)  # fmt: skip
    return folder


FLAGS = {
    "resume": ("--resume",),
    "initial": ("--initial-checkpoint",),
    "pretrained": ("--pretrained", "--pretrained-path"),
}


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "no such file"),
        ("truncated", "truncated or not a checkpoint"),
        ("empty", "truncated or not a checkpoint"),
        ("text", "not a checkpoint"),
        ("no weights", "holds no weights"),
        ("a list", "holds no weights"),
        ("exploit", "nothing was run"),
        ("old exploit", "nothing was run"),
        ("other shapes", ") instead of ("),
        ("other model", ": missing instead of ("),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_named(
    digits_folder, bad_files, refused, flag, name, words
):
    if flag == "pretrained" and name.startswith("other"):
        words = "does not fit"  # timm adapts what it can
    line = refused(
        *VIT, *FLAGS[flag], bad_files / name, "--data-dir", digits_folder, "--num-classes", 10,
        "-j", 0, "-b", 16, "--epochs", 1,
    )  # fmt: skip
    assert str(bad_files / name) in line and words in line
    assert not (bad_files / "marker").exists()


def test_the_exploit_of_these_tests_would_work(bad_files, tmp_path):
    torch.load(bad_files / "exploit", weights_only=False)
    (bad_files / "marker").rmdir()


def test_a_pretrained_path_is_never_ignored(digits_folder, bad_files, refused):
    good = bad_files / "run" / "last.pth.tar"
    line = refused(*VIT, "--pretrained-path", good, "--data-dir", digits_folder)
    assert str(good) in line and "--pretrained" in line


@pytest.mark.parametrize("flag", ["initial", "pretrained"])
def test_weights_to_start_from_are_loaded(digits_folder, tmp_path, flag):
    folder = run(digits_folder, tmp_path, *VIT, "--model-ema", "--epochs", 1)
    argv = (*VIT, *FLAGS[flag], folder / "last.pth.tar")
    prepared = train.set_up(train.parse_args(flags(digits_folder, tmp_path / "b", *argv)))
    loaded = prepared.task.get_eval_model().state_dict()
    expected = checkpoint(folder)["state_dict_ema"]
    body = [name for name in loaded if flag == "initial" or not name.startswith("head.")]
    assert all(torch.equal(loaded[name], expected[name]) for name in body)


def test_the_state_of_another_optimizer_is_refused(digits_folder, tmp_path, refused):
    folder = run(digits_folder, tmp_path / "a", *VIT, "--epochs", 1)
    data = ("--data-dir", digits_folder, "--num-classes", 10, "-j", 0, "-b", 16, "--epochs", 1)
    resume = ("--resume", folder / "last.pth.tar")
    line = refused(*VIT, *data, *resume, "--opt", "sgd")
    assert "--opt adamw" in line and "sgd" in line and "--no-resume-opt" in line
    line = refused(
        *VIT, *data, *resume, "--opt", "adamw", "--weight-decay", 0, "--layer-decay", 0.5
    )
    assert "optimizer state does not fit" in line


def test_the_rdp_state_of_a_model_with_other_paths_is_refused(digits_folder, tmp_path, refused):
    folder = run(digits_folder, tmp_path / "a", *RESNET, *RDP, "--epochs", 1)
    last = folder / "last.pth.tar"
    state = checkpoint(folder)
    state["rdp"]["paths"] = state["rdp"]["paths"][:-1]
    torch.save(state, last)
    data = ("--data-dir", digits_folder, "--num-classes", 10, "-j", 0, "-b", 16, "--epochs", 1)
    line = refused(*RESNET, *RDP, *data, "--opt", "adamw", "--resume", last)
    assert str(last) in line and "residual paths" in line


def _saver(folder, run_state=dict):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Saver(
        task=timm.task.ClassificationTask(model, verbose=False), run_state=run_state, model=model,
        optimizer=optimizer, args=SimpleNamespace(model="linear"), checkpoint_dir=str(folder),
        recovery_dir=str(folder), max_history=2,
    )  # fmt: skip


def test_the_saver_keeps_the_files_that_timms_keeps(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "timm"
    ours.mkdir(), theirs.mkdir()
    saver = _saver(ours, lambda: {"rdp": {"cycle": 3}})
    reference = timm.utils.CheckpointSaver(
        saver.model, saver.optimizer, argparse.Namespace(model="linear"),
        checkpoint_dir=str(theirs), recovery_dir=str(theirs), max_history=2,
    )  # fmt: skip
    saver.args = reference.args
    for epoch, metric in enumerate((10.0, 30.0, 20.0, 5.0, 40.0)):
        assert saver.save_checkpoint(epoch, metric) == reference.save_checkpoint(epoch, metric)
        saver.save_recovery(epoch, 7), reference.save_recovery(epoch, 7)
        names = {path.name for path in ours.iterdir()}
        assert names == {path.name for path in theirs.iterdir()}
    for name in names:
        state, expected = checkpoint(ours, name), checkpoint(theirs, name)
        assert state.pop("rdp") == {"cycle": 3}
        assert state.keys() == expected.keys() and state["epoch"] == expected["epoch"]
        assert same_bits(state["state_dict"], expected["state_dict"])


def test_a_full_disk_leaves_the_last_checkpoint_intact(
    digits_folder, tmp_path, monkeypatch, capsys
):
    saves = []
    original = torch.save

    def save(state, file):
        saves.append(1)
        if len(saves) == 2:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(state, file)

    monkeypatch.setattr(torch, "save", save)
    assert train.main(flags(digits_folder, tmp_path, *VIT, "--epochs", 3)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    folder = tmp_path / "run"
    assert "No space left on device" in line and str(folder / "tmp.pth.tar") in line
    assert checkpoint(folder)["epoch"] == 0
    assert sorted(path.name for path in folder.glob("*.tar")) == [
        "checkpoint-0.pth.tar", "last.pth.tar", "model_best.pth.tar",
    ]  # fmt: skip
