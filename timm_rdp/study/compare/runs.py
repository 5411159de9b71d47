"""The runs of a comparison: each a training process with a folder of its own."""

import argparse
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
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from timm_rdp.errors import refused_with
from timm_rdp.training.flags import flag
from timm_rdp.training.outputs import SUMMARY
from timm_rdp.training.resume import SIGNALS
from timm_rdp.training.saver import write_atomically

VARIANTS = (
    *("plain", "droppath", "droppath-batch", "droppath-matched", "rdp", "rdp-next"),
    *("rdp-random", "rdp-unfrozen", "droppath-early", "droppath-late"),
)
NEVER = 1_000_000_000  # droppath iterations until a complement iteration
# Their flags beside those of their kind.
OWN = {
    "rdp": [],
    "rdp-next": ["--rdp-batch", "next"],
    "rdp-random": ["--rdp-second", "random"],
    "rdp-unfrozen": ["--rdp-second", "all"],
    "droppath-batch": ["--rdp", "--rdp-every", str(NEVER)],
    **{f"droppath-{half}": ["--drop-path-schedule", half] for half in ("early", "late")},
}
RDP_VARIANTS = frozenset(name for name in OWN if name.startswith("rdp"))
FOR_RDP = ("rdp_every", "rdp_start_epoch")
MATCHED = "droppath-matched"
RECIPE = "recipe.yaml"

DONE, FAILED, DIVERGED = "done", "failed", "diverged"
INTERRUPTED, NOT_BEGUN = "interrupted", "not begun"

# How the training command says that numbers ran away.
_RAN_AWAY = re.compile(r"error: (the (training|validation) loss is|a weight is not a finite)")
_POLL = 0.2  # seconds
_SIGNALS = (*SIGNALS, signal.SIGHUP)
# Exit statuses of a run that somebody else stopped, before or after it could save what it has.
_STOPPED = (*(128 + number for number in _SIGNALS), *(-number for number in _SIGNALS))


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


@dataclass
class Training:
    """A run to do: its folder, and its flags beside those of the recipe."""

    folder: Path
    flags: list[str]
    is_resumed: bool


def cells_of(names: Iterable[str]) -> list[Cell]:
    """The cells of these names, in the order of the tables."""
    cells = []
    for name in names:
        variant, rate, seed = re.findall(r"(.+?)(?:-(\d.*))?-seed(\d+)", name)[0]
        cells.append(Cell(variant, float(rate) if rate else None, int(seed)))
    return sorted(cells, key=lambda c: (c.drop_path or 0.0, VARIANTS.index(c.variant), c.seed))


def training_of(
    cell: Cell, output: Path, options: argparse.Namespace, grid: Mapping[str, Any]
) -> Training:
    """What to train for a cell; FOR_RDP of the options go to the RDP variants alone."""
    flags = ["--seed", str(cell.seed), "--data-seed", str(cell.seed)]
    flags += ["--drop-path", str(cell.drop_path or 0.0)]
    if cell.variant == MATCHED:
        flags += ["--epochs", str(grid["matched_epochs"][str(cell.drop_path)])]
    if cell.variant in RDP_VARIANTS:
        values = {flag(name): str(getattr(options, name)) for name in FOR_RDP}
        flags += ["--rdp", *chain.from_iterable(values.items())]
    flags += OWN.get(cell.variant, [])
    folder = output / "runs" / cell.name
    return Training(folder, flags, folder.exists())


def read_record(folder: Path) -> dict[str, Any]:
    """What became of a run: seconds (None where part was not measured), epochs, error, status."""
    status = INTERRUPTED if folder.is_dir() else NOT_BEGUN
    epochs, _ = read_summary(folder)
    unfinished = {"seconds": None, "epochs": epochs, "error": "", "status": status}
    file = Path(f"{folder}.json")
    if not file.exists():
        return unfinished
    with refused_with(f"{file} is damaged, delete it"):
        record = {name: json.loads(file.read_text())[name] for name in unfinished}
    return unfinished if record["status"] == DONE and status == NOT_BEGUN else record


def damage_named(folder: Path) -> AbstractContextManager[None]:
    """Names a run's summary.csv in one line where it is not what the run wrote."""
    return refused_with(f"{folder / SUMMARY} is damaged, delete {folder}")


def read_summary(folder: Path) -> tuple[int, list[dict[str, str]]]:
    """How many epochs a run's summary.csv goes up to, and its rows; none without the file."""
    with damage_named(folder):
        text = (folder / SUMMARY).read_text() if (folder / SUMMARY).exists() else ""
        rows = list(csv.DictReader(text.splitlines()))  # one a validation, see --val-interval
        return max((int(row["epoch"]) + 1 for row in rows), default=0), rows


def slot_environments(jobs: int, device: str) -> list[dict[str, str]]:
    """What each of `jobs` runs side by side finds in its environment: its cores, its GPU."""
    environments = [dict(os.environ) for _ in range(jobs)]
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    allowed = getattr(os, "sched_getaffinity", None)
    cores = len(allowed(0)) if allowed else os.cpu_count() or 1
    for i, environment in enumerate(environments if jobs > 1 else ()):
        if device == "cpu":
            environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // jobs)))
        if device == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = gpus[i % len(gpus)]
    return environments


def train_all(
    trainings: Sequence[Training], environments: Sequence[Mapping[str, str]], lock: int
) -> int:
    """Train, one process each, as many at a time as there are environments.

    Signals that ask to stop are passed on to the runs, which save what they have, and no more are
    begun; a second one ends them at once. They keep the file descriptor `lock` open while they
    live. Returns the signal that stopped them, else 0.
    """
    waiting, stop = deque(trainings), 0
    active: dict[int, tuple[Training, subprocess.Popen]] = {}

    def forward(number: int, _: Any) -> None:
        nonlocal stop
        stop = stop or number
        for _, process in active.values():
            process.send_signal(_passed_on(number))

    bar = tqdm(total=len(trainings), unit="run", smoothing=0, disable=None, dynamic_ncols=True)
    previous = {number: signal.signal(number, forward) for number in _SIGNALS}
    try:
        while active or (waiting and not stop):
            for slot, environment in enumerate(environments):
                if slot not in active and waiting and not stop:
                    training = waiting.popleft()
                    active[slot] = training, _start(training, environment, lock)
                    if stop:  # it came while the process was made
                        active[slot][1].send_signal(_passed_on(stop))
            for slot, (training, process) in list(active.items()):
                if process.poll() is not None:
                    del active[slot]
                    ended = len(trainings) - len(waiting) - len(active)
                    what = _finish(training, process.returncode, stopped=bool(stop))
                    bar.write(f"[{ended}/{len(trainings)}] {what}", file=sys.stderr)
                    bar.update()
            time.sleep(_POLL)
    finally:
        bar.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
        for _, process in active.values():  # something went wrong here
            process.terminate()
    return stop


def _passed_on(number: int) -> int:
    return signal.SIGTERM if number == signal.SIGHUP else number  # which runs do not catch


def training_command(training: Training) -> list[str]:
    """The command line of a run."""
    runs = training.folder.parent
    command = [sys.executable, "-m", "timm_rdp.cli", "train", "-c", str(runs.parent / RECIPE)]
    command += ["--output", str(runs), "--experiment", training.folder.name]
    return [*command, "--resume", "auto", *training.flags]


def _start(training: Training, environment: Mapping[str, str], lock: int) -> subprocess.Popen:
    Path(f"{training.folder}.json").unlink(missing_ok=True)
    with open(f"{training.folder}.log", "wb") as log:
        return subprocess.Popen(
            training_command(training),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            pass_fds=(lock,),
            start_new_session=True,  # Ctrl-C on the terminal reaches it once, through us
        )


def _finish(training: Training, code: int, stopped: bool) -> str:
    """Record what became of a run, and say it in a line."""
    folder = training.folder
    status, error, seconds, epochs = DONE, "", None, read_summary(folder)[0]
    if code:
        if stopped or code in _STOPPED:
            return f"{folder.name} {INTERRUPTED}"
        log = Path(f"{folder}.log").read_text(errors="replace")
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        told = [line for line in lines if line.startswith("error: ")]
        killed = [f"killed by signal {-code}"] if code < 0 else []
        error = [f"exit status {code}", *lines[-1:], *killed, *told[-1:]][-1][:300]
        status = DIVERGED if code == 1 and _RAN_AWAY.match(error) else FAILED
    # Without the process's start, which takes as long for every variant: args.yaml is written when
    # all is set up. Of a resumed run only a part was measured.
    if (folder / "args.yaml").exists() and not training.is_resumed:
        seconds = round(max(0.0, time.time() - (folder / "args.yaml").stat().st_mtime), 2)
    record = {"seconds": seconds, "epochs": epochs, "error": error, "status": status}
    write_atomically(f"{folder}.json", (json.dumps(record, indent=2) + "\n").encode())
    return f"{folder.name} {status}" + (f": {error} (see {folder}.log)" if error else "")
