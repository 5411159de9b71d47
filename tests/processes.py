"""Training runs in processes of their own, that a test can kill."""

import csv
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Processes are forked from one that has imported everything and runs nothing.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["timm_rdp.training.train", "matplotlib.figure"])


class TrainingProcess:
    """The training command in another process; what it prints goes to a file.

    Args:
        argv: the command line.
        log: the file.
        prepare: called in the process before anything else.
        environment: variables to set there.
    """

    def __init__(
        self,
        argv: list[str],
        log: Path,
        prepare: Callable[[], None] | None = None,
        environment: dict[str, str] | None = None,
    ):
        self.log = log
        log.unlink(missing_ok=True)
        self._process = _CONTEXT.Process(
            target=_train, args=(argv, str(log), prepare, environment or {})
        )
        self._process.start()
        self.pid = self._process.pid

    def wait_for(self, pattern: str, timeout_s: float = 60) -> str:
        """Wait until the output matches a pattern; return the match."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = re.search(pattern, self.output())
            if found:
                return found.group()
            assert self._process.is_alive(), f"ended without {pattern!r}:\n{self.output()}"
            time.sleep(0.02)
        raise AssertionError(f"{pattern!r} did not come:\n{self.output()}")

    def signal(self, signum: int) -> None:
        """Send a signal to the process."""
        os.kill(self.pid, signum)

    def status(self, timeout_s: float = 90) -> int:
        """The exit status once it ends; -N where signal N ended it."""
        if not self.ends_within(timeout_s):
            self.kill()
            raise AssertionError(f"did not end in {timeout_s} s:\n{self.output()}")
        return self._process.exitcode

    def ends_within(self, seconds: float) -> bool:
        """Whether it ends within this time."""
        self._process.join(seconds)
        return self._process.exitcode is not None

    def kill(self) -> None:
        """End it as kill -9 does."""
        self._process.kill()
        self._process.join()

    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text() if self.log.exists() else ""

    def errors(self) -> list[str]:
        """The lines that begin with "error: "."""
        return [line for line in self.output().splitlines() if line.startswith("error: ")]


def _train(argv, log, prepare, environment) -> None:
    multiprocessing.set_start_method("fork", force=True)  # Linux's default, for loader workers
    # A group of its own, or whatever is sent to it would reach the test.
    os.setsid()
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    import torch

    from timm_rdp.training import train

    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    status = train.main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)


def check_summary(folder: Path) -> None:
    """No row of summary.csv is torn or doubled."""
    file = folder / "summary.csv"
    if not file.exists():
        return
    text = file.read_text()
    assert text.endswith("\n")
    header, *rows = list(csv.reader(text.splitlines()))
    assert all(len(row) == len(header) for row in rows), text
    assert [int(row[0]) for row in rows] == list(range(len(rows))), text
