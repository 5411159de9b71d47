"""Signals that ask a run to stop, and how all ranks stop at the same place."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A launcher passes on what its scheduler has already sent to every process.
_SAME_SIGNAL_S = 1.0
_WORKER_GRACE_S = 20


class Stopped(Exception):
    """The run was asked to stop, and its state can be saved where this is raised."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignals:
    """Notes the signals that ask a run to stop; a second one ends the process at once.

    Args:
        distributed: whether there are other ranks to agree with.
    """

    def __init__(self, distributed: bool = False):
        self._signum = 0
        self._time = 0.0
        self._pid = os.getpid()
        # On gloo whatever the backend is, so that nobody waits for an accelerator.
        self._group: Any = dist.new_group(backend="gloo") if distributed else None
        self._work: Any = None
        self._largest = torch.zeros((), dtype=torch.int64)

    @contextmanager
    def handled(self) -> Iterator[None]:
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

    def on_any_rank(self) -> int:
        """The signal that all ranks stop for now, else 0; all ranks must call it equally often.

        With several ranks it answers what was known at the last call, so that the answer has had
        the time in between to go around.
        """
        if self._group is None:
            return self._signum
        known = 0
        if self._work is not None:
            self._work.wait()
            known = int(self._largest)
        self._largest = torch.tensor(self._signum)
        self._work = dist.all_reduce(
            self._largest, op=dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return known

    def close(self) -> None:
        """Wait for what is under way; before the process group is destroyed."""
        if self._work is not None:
            self._work.wait()
            self._work = None
