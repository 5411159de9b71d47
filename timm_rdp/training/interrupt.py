"""Stopping a run in good order: signals, and ranks that are gone."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A launcher passes on what its scheduler has already sent to every process.
_SAME_SIGNAL_S = 1.0
_WORKER_GRACE_S = 20
_MISSING_AFTER = timedelta(seconds=10)


class Stopped(Exception):
    """The run was asked to stop, and its state can be saved where this is raised."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Interruption:
    """Notes the signals that ask a run to stop, so that all ranks stop at the same place.

    The first one is noted, and `agreed` tells of it; a second one ends the process at once.

    Args:
        distributed: whether there are other ranks to agree with.
    """

    def __init__(self, distributed: bool = False):
        self._signum = 0
        self._time = 0.0
        self._pid = os.getpid()
        self._group: Any = None
        self._work: Any = None
        self._flag: torch.Tensor | None = None
        if distributed:
            # On gloo whatever the backend is, so that nobody waits for an accelerator.
            self._group = dist.new_group(backend="gloo")

    @contextmanager
    def handling(self) -> Iterator[None]:
        """Within this context signals are noted instead of ending the process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, signum: int, _: Any) -> None:
        if os.getpid() != self._pid:
            # A loader's worker process: it is needed to the end of the cycle.
            if signum != signal.SIGINT:
                signal.alarm(_WORKER_GRACE_S)
            return
        now = time.monotonic()
        if not self._signum:
            self._signum, self._time = signum, now
            text = "ending after the cycle in progress; once more ends at once"
            # Not by logging: whatever this interrupts may hold the stream.
            os.write(2, f"\n{signal.Signals(signum).name}: {text}\n".encode())
        elif now - self._time > _SAME_SIGNAL_S:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(self._pid, signum)

    def agreed(self) -> int:
        """The signal that all ranks stop for now, else 0; all ranks must call it equally often.

        With several ranks it answers what was known at the last call, which has had until now to
        go around.
        """
        if self._group is None:
            return self._signum
        decision = 0
        if self._work is not None:
            self._work.wait()
            decision = int(self._flag)
        self._flag = torch.tensor(self._signum)
        self._work = dist.all_reduce(
            self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return decision

    def missing_ranks(self) -> str:
        """Which ranks no longer answer, after an error that may be due to them; '' if all do."""
        if self._group is None:
            return ""
        try:
            dist.monitored_barrier(self._group, timeout=_MISSING_AFTER, wait_all_ranks=True)
        except RuntimeError as error:
            found = re.search(r"[Rr]anks? ([\d, ]+) failed to pass", str(error))
            if found:
                return found.group(1).strip()
            return "0" if dist.get_rank() else "unknown"
        return ""

    def close(self) -> None:
        """Wait for what is under way; before the process group is destroyed."""
        if self._work is not None:
            self._work.wait()
            self._work = None
