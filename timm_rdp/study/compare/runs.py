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

from timm_rdp.errors import refused_with
from timm_rdp.training.outputs import SUMMARY, write_atomically

VARIANTS = ("plain", "droppath", "droppath-batch", "droppath-matched", "rdp", "rdp-next")
RDP_VARIANTS = frozenset({"rdp", "rdp-next"})
MATCHED = "droppath-matched"
RECIPE = "recipe.yaml"

DONE, FAILED, DIVERGED, INTERRUPTED = "done", "failed", "diverged", "interrupted"

_NAME = re.compile(rf"({'|'.join(VARIANTS)})(?:-([0-9][0-9.e-]*))?-seed(\d+)")
# How the training command says that numbers ran away.
_RAN_AWAY = re.compile(r"error: (the (training|validation) loss is|a weight is not a finite)")
_NEVER = 1_000_000_000  # droppath iterations until a complement iteration
_POLL = 0.2  # seconds
_SAME_SIGNAL = 1.0  # seconds within which a second signal is taken for the same one
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Exit statuses of a run that somebody else stopped, before or after it could save what it has.
_STOPPED = (0, *(128 + number for number in _SIGNALS), *(-number for number in _SIGNALS))


@dataclass(frozen=True)
class Cell:
    """One cell of the grid; `drop_path` is None for plain."""

    variant: str
    drop_path: float | None
    seed: int

    @property
    def name(self) -> str:
        rate = "" if self.drop_path is None else f"-{self.drop_path}"
        return f"{self.variant}{rate}-seed{self.seed}"


@dataclass(frozen=True)
class Training:
    """A cell to train: the flags that it has beside the recipe, and how many epochs it takes."""

    cell: Cell
    flags: tuple[str, ...]
    epochs: int


@dataclass
class _Attempt:
    training: Training
    process: subprocess.Popen
    first: bool  # there was nothing before
    log_start: int
    epochs: int  # seen so far


def cell_of_name(name: str) -> Cell | None:
    """The cell that a folder of this name holds; None for any other folder."""
    match = _NAME.fullmatch(name)
    if not match or (match[1] == "plain") != (match[2] is None):
        return None
    try:
        return Cell(match[1], match[2] and float(match[2]), int(match[3]))
    except ValueError:
        return None


def all_cells(output: Path, asked: Iterable[str] = ()) -> list[Cell]:
    """Every cell that was asked for by name or that the folder has something of, in fixed order."""
    names = {path.name.removesuffix(".json") for path in (output / "runs").glob("*-seed*")}
    cells = [cell for name in names.union(asked) if (cell := cell_of_name(name)) is not None]
    return sorted(cells, key=lambda c: (c.drop_path or 0.0, VARIANTS.index(c.variant), c.seed))


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


def read_record(output: Path, cell: Cell) -> dict[str, Any]:
    """What is known of a run: status, seconds, epochs, error.

    Status "" is a run that has not begun, or whose folder was removed.

    Raises:
        UsageError: what there is of it is damaged.
    """
    file, folder = output / "runs" / f"{cell.name}.json", output / "runs" / cell.name
    begun, epochs = folder.is_dir(), epochs_done(folder)
    unfinished = {
        "status": INTERRUPTED if begun else "",
        "seconds": None,
        "epochs": epochs,
        "error": "",
    }
    if not file.exists():
        return unfinished
    with refused_with(f"{file} is damaged, delete it"):
        record = json.loads(file.read_text())
        if record.keys() != unfinished.keys() or record["status"] not in (DONE, DIVERGED, FAILED):
            raise ValueError("not the record of a run")
    if record["status"] != DONE:
        return record
    if not begun:
        return unfinished
    with refused_with(damaged(folder)):
        if record["epochs"] != epochs:
            raise ValueError(f"{epochs} of {record['epochs']} epochs")
    return record


def damaged(folder: Path) -> str:
    """What is said of a run whose summary.csv is not what the run wrote."""
    return f"{folder / SUMMARY} is damaged, delete {folder}"


def summary_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's summary.csv, none where there is no such file.

    Raises:
        UsageError: it is damaged.
    """
    with refused_with(damaged(folder)):
        if not (folder / SUMMARY).exists():
            return []
        return list(csv.DictReader((folder / SUMMARY).read_text().splitlines()))


def epochs_done(folder: Path) -> int:
    """How many epochs a run's summary.csv goes up to.

    Raises:
        UsageError: it is damaged.
    """
    rows = summary_rows(folder)
    with refused_with(damaged(folder)):
        return int(rows[-1]["epoch"]) + 1 if rows else 0


def slot_environments(jobs: int, device: str) -> list[dict[str, str]]:
    """What each of several runs side by side finds in its environment: its cores, its GPU.

    Args:
        jobs: how many there are at a time.
        device: the recipe's.
    """
    environments = [dict(os.environ) for _ in range(jobs)]
    if jobs > 1 and device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        allowed = getattr(os, "sched_getaffinity", None)
        cores = len(allowed(0)) if allowed else os.cpu_count() or 1
        for environment in environments:
            environment["OMP_NUM_THREADS"] = str(max(1, cores // jobs))
    if jobs > 1 and device == "cuda":
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = listed.split(",") if listed else [str(i) for i in range(torch.cuda.device_count())]
        for i, environment in enumerate(environments):
            environment["CUDA_VISIBLE_DEVICES"] = gpus[i % len(gpus)]
    return environments


def train_all(
    trainings: Sequence[Training],
    output: Path,
    environments: Sequence[Mapping[str, str]],
    lock: int,
) -> int:
    """Train, one process each, as many at a time as there are environments.

    Signals that ask to stop are passed on to the runs, which save what they have, and no more are
    begun; a second signal kills them.

    Args:
        trainings: in the order in which they begin.
        output: the folder of the comparison.
        environments: one per process at a time.
        lock: file descriptor that the processes keep open as long as they live.

    Returns:
        the signal that stopped them, else 0
    """
    waiting, stop, stopped_at = deque(trainings), 0, 0.0
    active: dict[int, _Attempt] = {}

    def forward(number: int, _: Any) -> None:
        nonlocal stop, stopped_at
        if stop and time.monotonic() - stopped_at < _SAME_SIGNAL:
            return
        for attempt in active.values():
            attempt.process.send_signal(signal.SIGKILL if stop else _passed_on(number))
        stop, stopped_at = stop or number, stopped_at or time.monotonic()

    left = sum(max(0, t.epochs - epochs_done(output / "runs" / t.cell.name)) for t in trainings)
    bar = tqdm(total=left, unit="epoch", smoothing=0, disable=None, dynamic_ncols=True)
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
                _follow(attempt, output, bar)
                if ended:
                    del active[slot]
                    text = _finish(attempt, output, stopped=bool(stop))
                    ended_runs = len(trainings) - len(waiting) - len(active)
                    bar.write(f"[{ended_runs}/{len(trainings)}] {text}", file=sys.stderr)
                    bar.total -= attempt.training.epochs - attempt.epochs  # they will not come
            time.sleep(_POLL)
    finally:
        bar.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
        for attempt in active.values():  # something went wrong here
            attempt.process.terminate()
    return stop


def training_command(training: Training, output: Path) -> list[str]:
    """The command line of a run."""
    command = [sys.executable, "-m", "timm_rdp.cli", "train", "-c", str(output / RECIPE)]
    command += ["--output", str(output / "runs"), "--experiment", training.cell.name]
    return [*command, "--resume", "auto", *training.flags]


def _passed_on(number: int) -> int:
    return number if number == signal.SIGINT else signal.SIGTERM


def _start(training: Training, output: Path, environment: Mapping[str, str], lock: int) -> _Attempt:
    folder = output / "runs" / training.cell.name
    Path(f"{folder}.json").unlink(missing_ok=True)
    first = not folder.exists()
    with open(f"{folder}.log", "ab") as file:
        start = file.tell()
        process = subprocess.Popen(
            training_command(training, output),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            pass_fds=(lock,),
            start_new_session=True,  # Ctrl-C on the terminal reaches it once, through us
        )
    return _Attempt(training, process, first, start, epochs_done(folder))


def _follow(attempt: _Attempt, output: Path, bar: tqdm) -> None:
    # A resumed run may have gone back by an epoch.
    epochs = max(attempt.epochs, epochs_done(output / "runs" / attempt.training.cell.name))
    bar.update(epochs - attempt.epochs)
    attempt.epochs = epochs


def _finish(attempt: _Attempt, output: Path, stopped: bool) -> str:
    """Record what became of a run, and say it in a line."""
    folder, code = output / "runs" / attempt.training.cell.name, attempt.process.returncode
    record = {"seconds": None, "epochs": epochs_done(folder), "error": ""}
    if code == 0 and record["epochs"] >= attempt.training.epochs:
        record["status"] = DONE
    elif stopped or code in _STOPPED:
        return f"{folder.name} {INTERRUPTED}"
    else:
        record["error"] = _error(Path(f"{folder}.log"), attempt.log_start, code)
        ran_away = code == 1 and _RAN_AWAY.match(record["error"])
        record["status"] = DIVERGED if ran_away else FAILED
    # Without the process's start, which takes as long for every variant: args.yaml is written when
    # all is set up. Of a resumed run only a part was measured.
    if attempt.first and (folder / "args.yaml").exists():
        record["seconds"] = round(max(0.0, time.time() - (folder / "args.yaml").stat().st_mtime), 2)
    write_atomically(f"{folder}.json", (json.dumps(record, indent=2) + "\n").encode())
    took = "" if record["seconds"] is None else f" in {record['seconds']:.0f} s"
    error = f": {record['error']} (see {folder}.log)" if record["error"] else ""
    return f"{folder.name} {record['status']}{took}{error}"


def _error(log: Path, start: int, code: int) -> str:
    """The last error that a run's log tells of, or else what there is to say."""
    lines = [x for x in log.read_bytes()[start:].decode(errors="replace").splitlines() if x.strip()]
    told = [line for line in lines if line.startswith("error: ")]
    if told:
        return told[-1]
    if code < 0:
        return f"killed by signal {-code}"
    return lines[-1].strip()[:300] if lines else f"exit status {code}"
