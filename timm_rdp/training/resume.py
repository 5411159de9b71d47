"""How a signal stops a run, what a checkpoint needs to go on exactly there, and its restoring."""

import argparse
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from timm_rdp.training.batches import (
    DataStream,
    ResumableSampler,
    SamplerPass,
    draw_seed_aside,
    random_state,
    set_random_state,
    update_sizes,
)
from timm_rdp.training.log import Losses
from timm_rdp.training.state import RunState

_logger = logging.getLogger(__name__)

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


def state_of_rank(
    state: RunState,
    device: torch.device,
    sampler: ResumableSampler | None,
    stream: DataStream | None,
    losses: Losses | None = None,
) -> dict[str, Any]:
    """What this process must know to go on; gathered from all of them by `state_of_run`.

    The sampler is that of the training loader, the losses those of the epoch in progress, None
    after its end.
    """
    kept: dict[str, Any] = {"random": random_state(device)}
    if stream is not None:
        kept["data_random"] = stream.state
    if losses is not None:
        kept["losses"] = losses.state_dict()
        current = sampler.current if sampler is not None else None
        if current is not None and current.order is not None:
            ahead = current.yielded - state.batches_done
            kept["order"] = current.order
            kept["ahead"] = list(current.states)[-ahead:] if ahead and current.states else []
    return kept


def state_of_run(
    args: argparse.Namespace,
    state: RunState,
    own_state: dict[str, Any],
    updates: int | None,
    lr_scheduler: Any,
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """The entry `run` of a checkpoint; every rank must call it.

    Args:
        own_state: this process's, from `state_of_rank`.
        updates: how many updates of the epoch are done, None after its end.
    """
    ranks: list[Any] = [own_state]
    if args.distributed:
        ranks = [None] * args.world_size
        dist.all_gather_object(ranks, own_state)
    entry = {
        "updates": updates,
        "batches": state.batches_done,
        "validated": state.validated,
        "batch_size": args.batch_size,
        "world_size": args.world_size,
        "grad_accum_steps": args.grad_accum_steps,
        "ranks": ranks,
    }
    plateau = getattr(lr_scheduler, "lr_scheduler", None)
    if plateau is not None:  # the only schedule that is no function of the epoch
        names = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
        entry["plateau"] = {name: getattr(plateau, name) for name in names}
        entry["restore_lr"] = lr_scheduler.restore_lr
        entry["lr"] = [group["lr"] for group in optimizer.param_groups]
    return entry


def is_exact(args: argparse.Namespace, checkpoint: dict[str, Any]) -> bool:
    """Whether a run goes on exactly where the checkpoint was written.

    Without its optimizer state, or at an epoch of the user's choice, it is another run.
    """
    return bool(checkpoint.get("run")) and not args.no_resume_opt and args.start_epoch is None


def restore_schedule(
    args: argparse.Namespace,
    state: RunState,
    checkpoint: dict[str, Any],
    lr_scheduler: Any,
    optimizer: torch.optim.Optimizer,
    updates_per_epoch: int,
) -> None:
    """Set the learning rate schedule to where the run goes on."""
    entry = checkpoint.get("run") or {}
    if is_exact(args, checkpoint) and "plateau" in entry and hasattr(lr_scheduler, "lr_scheduler"):
        # timm's begins anew, with the first learning rate.
        vars(lr_scheduler.lr_scheduler).update(entry["plateau"])
        lr_scheduler.restore_lr = entry["restore_lr"]
        for group, lr in zip(optimizer.param_groups, entry["lr"], strict=True):
            group["lr"] = lr
        if entry["updates"] is None:
            lr_scheduler.step(state.epoch, checkpoint.get("metric"))
    elif lr_scheduler is not None and (state.epoch > 0 or state.updates_done > 0):
        if args.sched_on_updates:
            lr_scheduler.step_update(state.epoch * updates_per_epoch + state.updates_done)
        else:
            lr_scheduler.step(state.epoch)


def restore_position(
    args: argparse.Namespace,
    state: RunState,
    checkpoint: dict[str, Any],
    device: torch.device,
    loaders: tuple[Any, Any],
    sampler: ResumableSampler | None,
    stream: DataStream | None,
) -> list[dict]:
    """Set position, random states and loaders so that the run goes on where it was saved.

    Args:
        checkpoint: one for which `is_exact` holds.
        loaders: of training and validation.
        sampler: that of the training loader.

    Returns:
        the averages of the losses so far of the epoch in progress, of this rank or of all that
        there were; empty at the beginning of an epoch
    """
    entry = checkpoint["run"]
    same_world = entry["world_size"] == args.world_size
    own = entry["ranks"][args.rank] if same_world else {}
    losses: list[dict] = []
    if entry["updates"] is not None and sampler is not None:
        state.epoch = checkpoint["epoch"]
        state.batches_done, state.updates_done = entry["batches"], entry["updates"]
        same_batches = same_world and entry["batch_size"] == args.batch_size
        if not same_batches or entry["grad_accum_steps"] != args.grad_accum_steps:
            _convert_position(args, state, entry, len(loaders[0]))
        losses = [own["losses"]] if same_world else [r["losses"] for r in entry["ranks"]]
        sampler.replay = SamplerPass(None, state.batches_done, deque())
        if same_batches:
            sampler.replay.order = own["order"]
            ahead = own["ahead"] if sampler.in_process else []
            sampler.replay.states.extend([*ahead, own.get("data_random", own["random"])])
    if same_world:
        set_random_state(own["random"], device)
        state.validated = entry.get("validated", True)
        for loader in loaders if state.validated else loaders[:1]:
            draw_seed_aside(loader)
        if stream is not None and "data_random" in own:
            stream.state = own["data_random"]
    else:
        _logger.warning(
            f"{args.resume} was written by {entry['world_size']} processes, this run has "
            f"{args.world_size}: it goes on at the same sample and cycle, with random states of "
            "its own"
        )
    return losses


def _convert_position(
    args: argparse.Namespace, state: RunState, entry: dict[str, Any], num_batches: int
) -> None:
    """Go on at the whole updates of this run's size that make up the samples used before."""
    samples = entry["batches"] * entry["batch_size"] * entry["world_size"]
    batches = samples // (args.batch_size * args.world_size)
    done = updates = 0
    for size, _, last in update_sizes(num_batches, args.grad_accum_steps):
        if done + size > batches:
            break
        done, updates = done + size, updates + 1
        if last:
            break
    state.batches_done, state.updates_done = done, updates
    _logger.warning(
        f"{args.resume} was written at batch {entry['batches']} of {entry['batch_size']} x "
        f"{entry['world_size']} images; batches of {args.batch_size} x {args.world_size} go on "
        f"with number {done}, at image {done * args.batch_size * args.world_size} of the epoch "
        f"instead of {samples}"
    )
