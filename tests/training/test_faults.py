"""What befalls a run: signals, kills, full disks, dead ranks and workers, bad data."""

import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import write_digits
from processes import TrainingProcess, check_summary
from runs import VIT, checkpoint, flags, run
from test_resume import assert_same_end, final_state

RECIPE = (*VIT, "--rdp", "--drop-path", 0.5, "--model-ema", "--mixup", 0.3, "--epochs", 4)
ENDLESS = (*VIT, "--rdp", "--drop-path", 0.5, "--epochs", 100000, "--checkpoint-hist", 1)
TRAINING = r"Train: \d+ \["

pytestmark = pytest.mark.xdist_group("faults")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture
def start(tmp_path):
    """Start training processes; none survives the test."""
    started = []

    def begin(*argv: object, **kwargs) -> TrainingProcess:
        log = tmp_path / f"log{len(started)}"
        started.append(TrainingProcess([str(arg) for arg in argv], log, **kwargs))
        return started[-1]

    yield begin
    for process in started:
        process.kill()


@pytest.mark.parametrize("signum", [signal.SIGTERM, *map(slow, (signal.SIGINT, signal.SIGUSR1))])
def test_a_signal_ends_the_run_after_the_cycle_with_a_checkpoint(
    signum, digits_folder, tmp_path, start, fault
):
    process = start(*flags(digits_folder, tmp_path, *ENDLESS, "--workers", 1))
    process.wait_for(TRAINING)
    process.signal(signum)
    assert process.status() == 128 + signum
    (file,) = (tmp_path / "run").glob("recovery-*")
    assert checkpoint(tmp_path / "run", file.name)["run"]["updates"]
    where = f"--output {file.parent.parent} --experiment {file.parent.name}"
    assert f"continue with {where} --resume auto" in process.output()
    check_summary(tmp_path / "run")
    fault(f"{signal.Signals(signum).name}, once")


@pytest.mark.slow
def test_a_second_signal_ends_the_run_at_once(digits_folder, tmp_path, start, fault):
    slow = ("--model", "vit_base_patch16_224", "-b", 10, "--rdp")
    process = start(*flags(digits_folder, tmp_path, *slow))
    process.wait_for("Scheduled epochs")
    time.sleep(1)
    process.signal(signal.SIGTERM)
    process.wait_for("SIGTERM: ending after the cycle")
    process.signal(signal.SIGTERM)  # what a launcher sends on is not a second one
    assert not process.ends_within(1.2)
    process.signal(signal.SIGTERM)
    assert process.ends_within(3)
    assert process.status() == -signal.SIGTERM
    assert not list((tmp_path / "run").glob("*.tar"))
    fault("SIGTERM, twice")


@pytest.mark.slow
def test_a_signal_during_validation_does_not_wait_for_its_end(
    digits_folder, tmp_path, start, fault
):
    argv = flags(digits_folder, tmp_path, *RECIPE, "--resume", "auto")
    process = start(*argv, prepare=_signal_in_validation)
    assert process.status() == 128 + signal.SIGTERM
    assert "Test" not in process.output().split("SIGTERM: ending")[1].split("continue with")[0]
    assert start(*argv).status() == 0
    whole = run(digits_folder, tmp_path / "whole", *RECIPE)
    assert_same_end(final_state(tmp_path / "run"), final_state(whole))
    fault("SIGTERM in validation")


def _signal_in_validation() -> None:
    from timm_rdp.training import train

    original = train._validate

    def validate(args, parts, display, epoch):
        if epoch == 1:
            signal.raise_signal(signal.SIGTERM)
        return original(args, parts, display, epoch)

    train._validate = validate


@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_bitwise_as_one_never_killed(
    kills, digits_folder, tmp_path, start, fault
):
    recipe = (*RECIPE, "--recovery-interval", 2)
    whole = final_state(run(digits_folder, tmp_path / "whole", *recipe))
    argv = flags(digits_folder, tmp_path, *recipe, "--resume", "auto")
    begin = time.monotonic()
    assert start(*argv).status() == 0
    duration = time.monotonic() - begin
    assert_same_end(final_state(tmp_path / "run"), whole)
    shutil.rmtree(tmp_path / "run")

    moments = random.Random(kills)
    done = ends = 0
    while done < kills or not ends:
        fresh, begin = not (tmp_path / "run").exists(), time.monotonic()
        process = start(*argv)
        if done < kills and not process.ends_within(moments.uniform(0.1, 0.9) * duration):
            process.kill()
            done += 1
            check_summary(tmp_path / "run")
            continue
        assert process.status() == 0, process.output()
        assert_same_end(final_state(tmp_path / "run"), whole)
        assert (tmp_path / "run" / "model_best.pth.tar").exists()
        shutil.rmtree(tmp_path / "run")
        ends += 1
        if fresh:  # the machine may have been busy when it was measured
            duration = min(duration, time.monotonic() - begin)
    fault("kill -9", done)


def test_a_truncated_newest_checkpoint_is_passed_over(digits_folder, tmp_path, start, fault):
    argv = flags(digits_folder, tmp_path, *RECIPE, "--resume", "auto", "--recovery-interval", 2)
    process = start(*argv)
    process.wait_for(r"Train: 2 \[")
    process.kill()
    folder = tmp_path / "run"
    # A file that was being written when the process died has no name yet, and is never tried.
    named = [path for path in folder.glob("*.tar") if "tmp" not in path.name]
    newest = max(named, key=lambda path: path.stat().st_mtime_ns)
    content = newest.read_bytes()
    newest.unlink()  # other names of it stay whole
    newest.write_bytes(content[: len(content) // 2])
    process = start(*argv)
    assert process.status() == 0
    assert f"{newest}: cannot be read (it is truncated" in process.output()
    whole = final_state(run(digits_folder, tmp_path / "whole", *RECIPE))
    ours = final_state(folder)
    del ours["saver"], whole["saver"]
    assert_same_end(ours, whole)
    fault("truncated checkpoint")


def test_a_full_disk_stops_the_run_and_keeps_what_is_there(digits_folder, tmp_path, start, fault):
    argv = flags(digits_folder, tmp_path, *RECIPE, "--resume", "auto")
    assert start(*argv, "--epochs", 4, "--sched", "none", prepare=_small_disk).status() == 1
    folder = tmp_path / "run"
    assert not list(folder.glob("*.tar"))

    process = start(*argv)
    process.wait_for(TRAINING)
    assert process.status() == 0
    before = {path: path.read_bytes() for path in folder.glob("*.tar")}
    longer = (*argv, "--epochs", 6)
    process = start(*longer, prepare=_small_disk)
    assert process.status() == 1
    (line,) = process.errors()
    assert f"{folder}/tmp.pth.tar" in line and "File too large" in line and "make room" in line
    assert {path: path.read_bytes() for path in folder.glob("*.tar")} == before
    assert start(*longer).status() == 0
    assert checkpoint(folder)["epoch"] == 5
    check_summary(folder)
    fault("disk full", 2)


def _small_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def _ranks(count: int) -> list[dict[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


@pytest.mark.parametrize("dead", [0, 2])
def test_when_a_rank_dies_the_others_stop_and_say_so(dead, digits_folder, tmp_path, start, fault):
    argv = flags(digits_folder, tmp_path, *ENDLESS, "-b", 8)
    processes = [start(*argv, environment=rank) for rank in _ranks(4)]
    processes[0].wait_for(r"Train: 1 \[")
    processes[dead].kill()
    for rank, process in enumerate(processes):
        if rank == dead:
            continue
        assert process.status(timeout_s=60) == 1, process.output()
        (line,) = process.errors()
        assert "--resume auto" in line and "no longer answers" in line
    assert checkpoint(tmp_path / "run")["epoch"] >= 0
    fault("a rank dies")


def test_a_signal_to_one_rank_stops_all_of_them_at_the_same_update(
    digits_folder, tmp_path, start, fault
):
    recipe = (*RECIPE, "-b", 8, "--epochs", 3)
    argv = flags(digits_folder, tmp_path, *recipe, "--resume", "auto")
    prepare = [None, _signal_in_validation]
    processes = [
        start(*argv, environment=rank, prepare=p)
        for rank, p in zip(_ranks(2), prepare, strict=True)
    ]
    assert [p.status() for p in processes] == [128 + signal.SIGTERM] * 2
    again = [start(*argv, environment=rank) for rank in _ranks(2)]
    assert [p.status() for p in again] == [0, 0]

    whole = flags(digits_folder, tmp_path / "whole", *recipe)
    assert [p.status() for p in [start(*whole, environment=r) for r in _ranks(2)]] == [0, 0]
    assert_same_end(final_state(tmp_path / "run"), final_state(tmp_path / "whole" / "run"))
    fault("SIGTERM to one of two ranks")


@pytest.mark.parametrize("before, after", [(2, 1), slow(1, 2), slow(2, 3)])
def test_a_checkpoint_of_another_world_size_goes_on_at_the_same_sample_and_says_so(
    before, after, digits_folder, tmp_path, start, fault
):
    recipe = (*VIT, "--rdp", "--drop-path", 0.5, "-b", 8, "--epochs", 2, "--resume", "auto")
    argv = flags(digits_folder, tmp_path, *recipe)
    processes = [
        start(*argv, environment=rank, prepare=_signal_in_update_2) for rank in _ranks(before)
    ]
    assert [p.status() for p in processes] == [128 + signal.SIGTERM] * before
    (file,) = (tmp_path / "run").glob("recovery-*")
    state = checkpoint(tmp_path / "run", file.name)
    processes = [start(*argv, environment=rank) for rank in _ranks(after)]
    assert [p.status() for p in processes] == [0] * after, processes[0].output()
    samples = state["run"]["batches"] * 8 * before
    done = samples // (8 * after)
    output = processes[0].output()
    assert f"was written by {before} processes, this run has {after}" in output
    assert f"with number {done}, at image {done * 8 * after} of the epoch" in output
    assert f"at epoch 0/2, update {done}" in output
    end = checkpoint(tmp_path / "run")
    cycles = state["rdp"]["cycle"]
    assert end["rdp"]["cycle"] == cycles + 80 // (8 * after) - done + 80 // (8 * after)
    check_summary(tmp_path / "run")
    fault("resumed by another number of ranks")


def _signal_in_update_2() -> None:
    from timm_rdp.training import loop

    original = loop.run_iteration

    def run_iteration(*args):
        losses, update = args[4:6]
        if (losses.epoch, update) == (0, 2):
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    loop.run_iteration = run_iteration


def _torchrun(argv: list[str], folder: Path) -> tuple[subprocess.Popen, Path]:
    script = Path(__file__).parents[2] / "train_rdp.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    log = folder / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*command, "--nproc_per_node", "2", str(script), *argv],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    return process, log


def _wait_for_epoch_1(process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 90
    while "Train: 1 [" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


@pytest.mark.slow
def test_under_torchrun_a_signal_ends_all_ranks_with_a_checkpoint(digits_folder, tmp_path, fault):
    process, log = _torchrun(flags(digits_folder, tmp_path, *ENDLESS, "-b", 8), tmp_path)
    try:
        _wait_for_epoch_1(process, log)
        process.terminate()
        assert process.wait(60) != 0
    finally:
        process.kill()
    (file,) = (tmp_path / "run").glob("recovery-*")
    assert f"SIGTERM in epoch {checkpoint(tmp_path / 'run', file.name)['epoch']}" in log.read_text()
    fault("SIGTERM to torchrun")


@pytest.mark.slow
def test_torchrun_names_the_rank_that_died(digits_folder, tmp_path, fault):
    argv = flags(digits_folder, tmp_path, *ENDLESS, "-b", 8)
    process, log = _torchrun(argv, tmp_path)
    try:
        _wait_for_epoch_1(process, log)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = {_environment(int(child)).get("RANK"): int(child) for child in children}
        os.kill(ranks["1"], signal.SIGKILL)
        assert process.wait(60) != 0
    finally:
        process.kill()
    text = log.read_text()
    assert re.search(r"first observed failure\)?:(.|\n)*?rank +: 1 ", text), text
    assert checkpoint(tmp_path / "run")["epoch"] >= 0
    fault("torchrun: a rank dies")


def _environment(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def test_a_killed_loader_worker_is_named_and_the_checkpoint_kept(
    digits_folder, tmp_path, start, fault
):
    process = start(*flags(digits_folder, tmp_path, *ENDLESS, "--workers", 2))
    process.wait_for(r"Train: 1 \[")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert process.status() == 1, process.output()
    (line,) = process.errors()
    assert "DataLoader worker" in line and children[-1] in line and "intact" in line
    assert checkpoint(tmp_path / "run")["epoch"] >= 0
    fault("a loader's worker is killed")


@pytest.mark.parametrize("what", ["an unreadable image", "a vanished folder"])
def test_data_that_goes_bad_is_named_and_the_checkpoint_kept(what, tmp_path, start, fault):
    data = tmp_path / "digits"
    write_digits(data, range(10))
    process = start(*flags(data, tmp_path, *ENDLESS))
    process.wait_for(r"Train: 1 \[")
    if what == "a vanished folder":
        data.rename(tmp_path / "elsewhere")
    else:
        for image in (data / "train" / "3").iterdir():
            image.write_bytes(image.read_bytes()[:40])
    assert process.status() == 2
    (line,) = process.errors()
    assert str(data) in line and "cannot be read" in line
    assert checkpoint(tmp_path / "run")["epoch"] >= 0
    fault(what)


def test_resume_auto_begins_afresh_where_there_is_nothing(digits_folder, tmp_path, start, fault):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tmp.pth.tar").write_bytes(b"what a killed save leaves")
    process = start(*flags(digits_folder, tmp_path, *RECIPE, "--resume", "auto"))
    assert process.status() == 0
    assert "there is no checkpoint in" in process.output()
    fault("killed in the first save")


def test_resume_auto_needs_a_name(digits_folder, refused):
    line = refused(*VIT, "--data-dir", digits_folder, "--num-classes", 10, "--resume", "auto")
    assert "--resume auto" in line and "--experiment" in line


def test_ranks_that_see_different_checkpoints_are_refused(digits_folder, tmp_path, start):
    one = run(digits_folder, tmp_path / "seen", *VIT, "--epochs", 1)
    argv = [*VIT, "-b", 8, "--resume", "auto"]
    processes = [
        start(*flags(digits_folder, tmp_path / name, *argv), environment=rank)
        for name, rank in zip(("seen", "unseen"), _ranks(2), strict=True)
    ]
    assert [p.status() for p in processes] == [2, 2]
    for process in processes:
        (line,) = process.errors()
        assert f"({one / 'last.pth.tar'}, none)" in line and "share" in line
    assert not (tmp_path / "unseen" / "run").exists()
