"""Stopping a run in good order: signals, and ranks that are gone."""

from __future__ import annotations

import contextlib
import os
import re
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
_BEAT_S = 1.0
_COMMUNICATION = r"gloo|nccl|connection|socket|broken pipe|timed out|timeout|tcpstore"


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
        self._heart: _Heart | None = None
        if distributed:
            # On gloo whatever the backend is, so that nobody waits for an accelerator.
            self._group = dist.new_group(backend="gloo")
            self._heart = _Heart()

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

    def missing_ranks(self, error: RuntimeError) -> str:
        """Which ranks are gone, where an error is one of communication; '' where it is not."""
        if self._heart is None or not re.search(_COMMUNICATION, str(error), re.IGNORECASE):
            return ""
        return self._heart.stopped_ranks()

    def close(self) -> None:
        """Wait for what is under way; before the process group is destroyed."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._heart is not None:
            self._heart.stop()


class _Heart:
    """Tells the other ranks that this one lives, even while it waits for one that does not.

    An error of communication does not say whom it is about: a rank that lives may have failed for
    the same reason, or have ended because of it.
    """

    def __init__(self):
        # A connection of its own: the process group's may be waiting.
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._stop = threading.Event()
        self._beats = 0
        self._beat()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone, and the run with it
            while not self._stop.wait(_BEAT_S):
                self._beat()

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"timm_rdp/beats/{self._rank}", str(self._beats))

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def stopped_ranks(self) -> str:
        """The ranks whose heart has stopped, as text."""
        try:
            if not self._store.check(["timm_rdp/stopped"]):
                before = self._read()
                time.sleep(4 * _BEAT_S)
                after = self._read()
                stopped = [rank for rank in after if after[rank] == before[rank]]
                if stopped and not self._store.check(["timm_rdp/stopped"]):
                    self._store.set("timm_rdp/stopped", ", ".join(map(str, stopped)))
                # The store may live in this process, and the others are yet to read it.
                time.sleep(2 * _BEAT_S)
            if self._store.check(["timm_rdp/stopped"]):
                return self._store.get("timm_rdp/stopped").decode()
        except RuntimeError:
            return "0"  # which has the store
        return ""

    def _read(self) -> dict[int, bytes]:
        ranks = range(self._world_size)
        return {rank: self._store.get(f"timm_rdp/beats/{rank}") for rank in ranks}
