"""The runs of a comparison: each a training process with a folder of its own."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from timm_rdp.errors import UsageError
from timm_rdp.training.files import write_atomically
from timm_rdp.training.outputs import SUMMARY

VARIANTS = ("plain", "droppath", "droppath-batch", "droppath-matched", "rdp", "rdp-next")
RDP_VARIANTS = ("rdp", "rdp-next")
MATCHED = "droppath-matched"
RECIPE = "recipe.yaml"

DONE, FAILED, DIVERGED, INTERRUPTED = "done", "failed", "diverged", "interrupted"

_NAME = re.compile(rf"({'|'.join(VARIANTS)})(?:-([0-9][0-9.e-]*))?-seed(\d+)")
# How the training command says that numbers ran away, see losses.py, loop.py and train.py.
_RAN_AWAY = re.compile(r"error: (the (training|validation) loss is|a weight is not a finite)")
_NEVER = 1_000_000_000  # cycles until a complement iteration, of which there are to be none
_POLL = 0.2  # seconds
_SAME_SIGNAL = 1.0  # seconds within which a second signal is taken for the same one
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Exit statuses of a run that somebody else stopped, before or after it could save what it has.
_STOPPED = (0, *(128 + number for number in _SIGNALS), *(-number for number in _SIGNALS))


@dataclass(frozen=True)
class Run:
    """One cell of the grid; `drop_path` is None for plain."""

    variant: str
    drop_path: float | None
    seed: int

    @property
    def name(self) -> str:
        rate = "" if self.drop_path is None else f"-{self.drop_path}"
        return f"{self.variant}{rate}-seed{self.seed}"


@dataclass(frozen=True)
class Job:
    """A run to do: the flags that make it differ from the recipe, and how many epochs it takes."""

    run: Run
    flags: tuple[str, ...]
    epochs: int


@dataclass
class _Attempt:
    job: Job
    process: subprocess.Popen
    started: float
    first: bool  # there was nothing before
    log_start: int
    epochs: int


def run_of_name(name: str) -> Run | None:
    """The run that a folder of this name holds; None for any other folder."""
    match = _NAME.fullmatch(name)
    if not match or (match[1] == "plain") != (match[2] is None):
        return None
    try:
        return Run(match[1], match[2] and float(match[2]), int(match[3]))
    except ValueError:
        return None


def all_runs(output: Path, asked: Iterable[str] = ()) -> list[Run]:
    """Every run that was asked for by name or that the folder has something of, in fixed order."""
    names = {path.name.removesuffix(".json") for path in (output / "runs").glob("*-seed*")}
    names.update(asked)
    runs = [run for name in names if (run := run_of_name(name)) is not None]
    return sorted(runs, key=lambda r: (r.drop_path or 0.0, VARIANTS.index(r.variant), r.seed))


def variant_flags(
    variant: str, drop_path: float | None, rdp_options: Sequence[str] = ()
) -> list[str]:
    """The training flags of a variant; `rdp_options` are for the RDP variants alone."""
    flags = ["--drop-path", str(drop_path or 0.0)]
    if variant == "droppath-batch":
        flags += ["--rdp", "--rdp-every", str(_NEVER)]
    if variant in RDP_VARIANTS:
        flags += ["--rdp", *rdp_options]
    if variant == "rdp-next":
        flags += ["--rdp-batch", "next"]
    return flags


def read_record(output: Path, run: Run) -> dict[str, Any]:
    """What is known of a run: status, seconds, epochs, error.

    Status "" is a run that has not begun, or whose folder was removed.

    Raises:
        UsageError: what there is of it is damaged.
    """
    file, folder = output / "runs" / f"{run.name}.json", output / "runs" / run.name
    status = INTERRUPTED if folder.is_dir() else ""
    epochs = epochs_done(folder)
    unfinished = {"status": status, "seconds": None, "epochs": epochs, "error": ""}
    try:
        record = json.loads(file.read_text())
        if record.keys() != unfinished.keys() or record["status"] not in (DONE, DIVERGED, FAILED):
            raise ValueError("it is no record of a run")
    except FileNotFoundError:
        return unfinished
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{file} cannot be read ({error}): delete it, and the comparison's command goes on "
            "with that run"
        ) from None
    if record["status"] != DONE or record["epochs"] == epochs:
        return record
    if not status:
        return unfinished
    raise damaged(folder, f"holds {epochs} of the {record['epochs']} epochs that the run did")


def damaged(folder: Path, what: str) -> UsageError:
    """The error of a run whose summary.csv is not what the run wrote."""
    return UsageError(
        f"{folder / SUMMARY} {what}: delete {folder}, and the comparison's command trains that run "
        "again"
    )


def summary_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's summary.csv.

    Raises:
        UsageError: it is damaged.
    """
    try:
        text = (folder / SUMMARY).read_text()
    except UnicodeDecodeError as error:
        raise damaged(folder, f"is no text ({error.reason})") from None
    except OSError:
        return []
    return list(csv.DictReader(text.splitlines()))


def epochs_done(folder: Path) -> int:
    """How many epochs a run's summary.csv goes up to.

    Raises:
        UsageError: it is damaged.
    """
    rows = summary_rows(folder)
    try:
        return int(rows[-1]["epoch"]) + 1 if rows else 0
    except (KeyError, TypeError, ValueError):
        raise damaged(folder, "has no column of epochs") from None


def slot_environments(jobs: int, device: str) -> list[dict[str, str]]:
    """What each of several runs side by side finds in its environment: its cores, its GPU.

    Args:
        jobs: how many there are at a time.
        device: the recipe's.
    """
    environments = [dict(os.environ) for _ in range(jobs)]
    if jobs == 1:
        return environments
    if device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        allowed = getattr(os, "sched_getaffinity", None)
        cores = len(allowed(0)) if allowed else os.cpu_count() or 1
        for environment in environments:
            environment["OMP_NUM_THREADS"] = str(max(1, cores // jobs))
    if device == "cuda":
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = (
            listed.split(",") if listed else [str(i) for i in range(torch.cuda.device_count())]
        )
        for i, environment in enumerate(environments):
            environment["CUDA_VISIBLE_DEVICES"] = devices[i % len(devices)]
    return environments


class Progress:
    """A bar over the epochs of all runs, and a line for each run that ends.

    Args:
        jobs: all that there are to do.
        output: the folder of the comparison.
    """

    def __init__(self, jobs: Sequence[Job], output: Path):
        self._runs, self._ended, self._started = len(jobs), 0, time.monotonic()
        left = sum(max(0, j.epochs - epochs_done(output / "runs" / j.run.name)) for j in jobs)
        self.bar = tqdm(total=left, unit="epoch", smoothing=0, disable=None, dynamic_ncols=True)
        self._done, self._total, self._drawn = 0, left, 0.0
        self._describe()

    def _describe(self) -> None:
        self.bar.set_description(f"{self._ended}/{self._runs} runs")

    def more_epochs(self, count: int) -> None:
        """There are `count` epochs more to do than was thought."""
        self._total += count
        self.bar.total = self._total
        self.bar.refresh()

    def epochs(self, count: int) -> None:
        """`count` epochs were done; also brings the clock up to date."""
        self._done += count
        self.bar.update(count)
        if time.monotonic() - self._drawn > 1:
            self._drawn = time.monotonic()
            self.bar.refresh()

    def ended(self, job: Job, record: Mapping, log: Path, seen: int) -> None:
        """A run ended; `seen` of its epochs have been reported by `epochs`."""
        self._ended += 1
        self.more_epochs(min(0, seen - job.epochs))  # those that will not come
        self._describe()
        elapsed = time.monotonic() - self._started
        left = elapsed / max(1, self._done) * (self._total - self._done)
        text = record["status"] or INTERRUPTED
        if record["seconds"] is not None:
            text += f" in {record['seconds']:.0f} s"
        if record["error"]:
            text += f": {record['error']} (see {log})"
        when = f"; {tqdm.format_interval(left)} left" if self._ended < self._runs else ""
        tqdm.write(f"[{self._ended}/{self._runs}] {job.run.name} {text}{when}", file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


def run_jobs(
    jobs: Sequence[Job],
    output: Path,
    environments: Sequence[Mapping[str, str]],
    progress: Progress,
    lock: int,
) -> int:
    """Do the jobs, one process each, as many at a time as there are environments.

    Signals that ask to stop are passed on to the runs, which save what they have, and no more are
    begun; a second signal kills them.

    Args:
        jobs: in the order in which they begin.
        output: the folder of the comparison.
        environments: one per process at a time.
        progress: is told how far they are.
        lock: file descriptor that the processes keep open as long as they live.

    Returns:
        the signal that stopped them, else 0
    """
    waiting, stop, stopped_at = deque(jobs), 0, 0.0
    active: dict[int, _Attempt] = {}

    def forward(number: int, _: Any) -> None:
        nonlocal stop, stopped_at
        if stop and time.monotonic() - stopped_at < _SAME_SIGNAL:
            return
        for attempt in active.values():
            attempt.process.send_signal(signal.SIGKILL if stop else _passed_on(number))
        stop, stopped_at = stop or number, stopped_at or time.monotonic()

    previous = {number: signal.signal(number, forward) for number in _SIGNALS}
    try:
        while active or (waiting and not stop):
            for slot, environment in enumerate(environments):
                if slot not in active and waiting and not stop:
                    active[slot] = _start(waiting.popleft(), output, environment, lock)
                    if stop:  # it came while the process was made
                        active[slot].process.send_signal(_passed_on(stop))
            for slot, attempt in list(active.items()):
                ended = attempt.process.poll() is not None
                _follow(attempt, output, progress)
                if ended:
                    del active[slot]
                    _finish(attempt, output, progress, stopped=bool(stop))
            time.sleep(_POLL)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for attempt in active.values():  # something went wrong here
            attempt.process.terminate()
    return stop


def training_command(job: Job, output: Path) -> list[str]:
    """The command line of a run."""
    command = [sys.executable, "-m", "timm_rdp.cli", "train", "-c", str(output / RECIPE)]
    command += ["--output", str(output / "runs"), "--experiment", job.run.name]
    return [*command, "--resume", "auto", *job.flags]


def _passed_on(number: int) -> int:
    return number if number == signal.SIGINT else signal.SIGTERM


def _start(job: Job, output: Path, environment: Mapping[str, str], lock: int) -> _Attempt:
    folder, log = output / "runs" / job.run.name, output / "runs" / f"{job.run.name}.log"
    (output / "runs" / f"{job.run.name}.json").unlink(missing_ok=True)
    first = not folder.exists()
    with log.open("ab") as file:
        start = file.tell()
        process = subprocess.Popen(
            training_command(job, output),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            pass_fds=(lock,),
            start_new_session=True,  # Ctrl-C on the terminal reaches it once, through us
        )
    return _Attempt(job, process, time.time(), first, start, epochs_done(folder))


def _follow(attempt: _Attempt, output: Path, progress: Progress) -> None:
    epochs = epochs_done(output / "runs" / attempt.job.run.name)
    # A resumed run may have gone back by an epoch.
    progress.epochs(max(0, epochs - attempt.epochs))
    attempt.epochs = max(epochs, attempt.epochs)


def _finish(attempt: _Attempt, output: Path, progress: Progress, stopped: bool) -> None:
    job, code = attempt.job, attempt.process.returncode
    epochs = epochs_done(output / "runs" / job.run.name)
    log = output / "runs" / f"{job.run.name}.log"
    seconds = _seconds(attempt, output / "runs" / job.run.name)
    record = {"seconds": seconds, "epochs": epochs, "error": ""}
    if code == 0 and epochs >= job.epochs:
        record["status"] = DONE
    elif stopped or code in _STOPPED:
        record |= {"status": "", "seconds": None}
    else:
        record["error"] = _error(log, attempt.log_start, code)
        ran_away = code == 1 and _RAN_AWAY.match(record["error"])
        record["status"] = DIVERGED if ran_away else FAILED
    if record["status"]:
        text = json.dumps(record, indent=2) + "\n"
        write_atomically(str(output / "runs" / f"{job.run.name}.json"), text.encode())
    progress.ended(job, record, log, attempt.epochs)


def _seconds(attempt: _Attempt, folder: Path) -> float | None:
    """Time that training and validation took; None where only part of it was measured.

    Without the process's start: it takes as long for every variant, and in short runs most of it.
    """
    if not attempt.first:
        return None
    try:
        began = (folder / "args.yaml").stat().st_mtime  # written when all is set up
    except OSError:
        began = attempt.started
    return round(max(0.0, time.time() - began), 2)


def _error(log: Path, start: int, code: int) -> str:
    """The last error that a run's log tells of, or else what there is to say."""
    with log.open("rb") as file:
        file.seek(start)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error: ")]
    if told:
        return told[-1]
    if code < 0:
        return f"killed by signal {-code}"
    return lines[-1].strip()[:300] if lines else f"exit status {code}"
