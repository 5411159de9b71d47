"""Processes joined by gloo that run what a test hands them, and that cannot hang it."""

import datetime
import multiprocessing
import pickle
import queue
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """Processes on this machine that stay for the next job; each has a process group of its own.

    Args:
        folder: where they meet.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._jobs = 0
        self._processes: list = []

    def run(
        self, function: Callable, *args: Any, size: int = 2, timeout_s: float = 120
    ) -> list[Any]:
        """Results of function(rank, size, *args) on ranks 0 .. size - 1, by rank.

        Raises:
            AssertionError: a rank raised, died or was not done in time.
        """
        self._start(size)
        self._jobs += 1
        # Meeting at a file leaves the choice of free ports to gloo.
        meeting = self._folder / f"job{self._jobs}"
        for rank in range(size):
            self._inboxes[rank].put((function, meeting.as_uri(), rank, size, args, timeout_s))
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        deadline = time.monotonic() + timeout_s
        while missing := [r for r in range(size) if r not in results and r not in errors]:
            try:
                rank, error, result = self._outbox.get(timeout=1)
            except queue.Empty:
                dead = [r for r in missing if not self._processes[r].is_alive()]
                if dead or time.monotonic() > deadline:
                    self.stop()
                    for rank in missing:
                        errors[rank] = "died" if rank in dead else "was not done in time"
                continue
            if error is not None:
                errors[rank] = f"raised\n{error}"
                deadline = min(deadline, time.monotonic() + 5)
            else:
                results[rank] = pickle.loads(result)
        if errors:
            raise AssertionError("\n".join(f"rank {r} {e}" for r, e in errors.items()))
        return [results[rank] for rank in range(size)]

    def stop(self) -> None:
        """End the processes; the next job starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes = []

    def _start(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        if not self._processes:
            self._outbox, self._inboxes = context.Queue(), []
        while len(self._processes) < size:
            self._inboxes.append(context.Queue())
            process = context.Process(
                target=_serve, args=(self._inboxes[-1], self._outbox), daemon=True
            )
            process.start()
            self._processes.append(process)


def _serve(inbox: Any, outbox: Any) -> None:
    torch.set_num_threads(1)
    while True:
        function, meeting, rank, size, args, timeout_s = inbox.get()
        error = result = None
        try:
            dist.init_process_group(
                "gloo",
                init_method=meeting,
                rank=rank,
                world_size=size,
                timeout=datetime.timedelta(seconds=timeout_s),
            )
            # As bytes: a queue would share the tensors' memory, which ends with this process.
            result = pickle.dumps(function(rank, size, *args))
            dist.barrier()
        except BaseException:
            error = traceback.format_exc()
        if dist.is_initialized():
            dist.destroy_process_group()
        outbox.put((rank, error, result))
