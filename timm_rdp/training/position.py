"""Where a run stands within an epoch: what a checkpoint needs to continue at the very next batch.

The order of an epoch is drawn when its first batch is asked for, and a batch's augmentation when it
is loaded, which may be one batch before it is used (timm's prefetcher). So the loader's batch
sampler notes the random state at both moments; a resumed epoch draws the same order, passes over
the batches that were used without loading them, and loads the others from the same states.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from timm.data.loader import MultiEpochsDataLoader
from torch.utils.data import BatchSampler, DataLoader

from timm_rdp.training.randomness import random_state, set_random_state

if TYPE_CHECKING:
    from timm_rdp.training.loop import Run

_logger = logging.getLogger(__name__)


@dataclass
class Replay:
    """How the next pass over a batch sampler goes on with one that another process began."""

    skip: int = 0  # batches
    order: dict | None = None  # random state from which the order is drawn
    states: deque = field(default_factory=deque)  # set before each of the next batches is loaded


class ResumableSampler:
    """A batch sampler whose passes can be noted and continued; all else is the original's.

    Args:
        sampler: the original: yields lists of indices.
        in_process: whether this process loads the batches (no workers): only then the random states
            before each of them are known.
        is_continued: whether a pass over it may be continued where it was left.
    """

    def __init__(self, sampler: BatchSampler, in_process: bool, is_continued: bool = True):
        self._sampler = sampler
        self.in_process = in_process
        self.is_continued = is_continued
        self.replay: Replay | None = None
        self.undo_base_seed = False
        self.before: dict | None = None
        self.current: _Pass | None = None

    def __iter__(self) -> Iterator[list[int]]:
        # torch draws a seed for the workers when it starts them, which is once where they persist:
        # a resumed run starts them again, and must not draw it a second time. It makes two
        # iterators then, one before it draws.
        if self.undo_base_seed:
            self.undo_base_seed, self.before = False, random_state()
        self.current = _Pass(self)
        return self.current

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        if name == "_sampler":  # not there yet while it is unpickled
            raise AttributeError(name)
        return getattr(self._sampler, name)


class _Pass:
    """One epoch's iterator over a ResumableSampler."""

    def __init__(self, sampler: ResumableSampler):
        self._sampler = sampler
        self._batches = iter(sampler._sampler)
        self._states: deque = deque()
        self.order: dict | None = None
        self.yielded = 0
        self.states: deque = deque(maxlen=8)  # before each of the newest batches was loaded

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        if self.order is None:
            self._begin()
        try:
            indices = next(self._batches)
        except StopIteration:
            if self._states:
                set_random_state(self._states.pop())
            raise
        if self._states:
            set_random_state(self._states.popleft())
        if self._sampler.in_process and self._sampler.is_continued:
            self.states.append(random_state())
        self.yielded += 1
        return indices

    def _begin(self) -> None:
        sampler, replay = self._sampler, self._sampler.replay or Replay()
        start = replay.order or sampler.before
        sampler.replay = sampler.before = None
        if start is not None:
            set_random_state(start)
        self.order = random_state()
        for _ in islice(self._batches, replay.skip):
            pass
        self.yielded, self._states = replay.skip, replay.states


def make_resumable(loader: Any, is_continued: bool = True) -> ResumableSampler | None:
    """Put a ResumableSampler into a loader of timm's; None where there is no batch sampler.

    Args:
        loader: a DataLoader, or timm's prefetcher around one.
        is_continued: whether a pass over it may be continued where it was left; one that always
            begins anew need not note where it is.
    """
    inner = getattr(loader, "loader", loader)
    if not isinstance(inner, DataLoader) or inner.batch_sampler is None:
        return None  # an iterable data set: it alone knows its order
    if isinstance(inner.batch_sampler, ResumableSampler):
        return inner.batch_sampler
    if isinstance(inner, MultiEpochsDataLoader):
        return None  # one pass without an end, of which it always takes a full epoch
    sampler = ResumableSampler(inner.batch_sampler, inner.num_workers == 0, is_continued)
    # DataLoader refuses to have it replaced, though nothing but iter() has looked at it so far.
    vars(inner)["batch_sampler"] = sampler
    return sampler


def state_of_rank(run: Run, losses: Any = None) -> dict:
    """What this process must know to go on; gathered from all of them by `state_of_run`."""
    state = {"random": random_state(run.device)}
    if run.data_stream is not None:
        state["data_random"] = run.data_stream.state
    current = run.train_sampler.current if run.train_sampler is not None else None
    if losses is not None:
        state["losses"] = losses.state_dict()
        if current is not None and current.order is not None:
            ahead = current.yielded - run.consumed
            state["order"] = current.order
            state["ahead"] = list(current.states)[-ahead:] if ahead and current.states else []
    return state


def state_of_run(run: Run, mine: dict, updates: int | None) -> dict:
    """The entry `run` of a checkpoint; every rank must call it.

    Args:
        run: the run.
        mine: this process's, from `state_of_rank`.
        updates: how many updates of the epoch are done, None after its end.
    """
    args = run.args
    ranks = [mine]
    if args.distributed:
        ranks = [None] * args.world_size
        torch.distributed.all_gather_object(ranks, mine)
    state = {
        "updates": updates,
        "batches": run.consumed,
        "batch_size": args.batch_size,
        "world_size": args.world_size,
        "grad_accum_steps": args.grad_accum_steps,
        "ranks": ranks,
    }
    plateau = getattr(run.lr_scheduler, "lr_scheduler", None)
    if plateau is not None:  # the only schedule that is no function of the epoch
        names = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
        state["plateau"] = {name: getattr(plateau, name) for name in names}
        state["restore_lr"] = run.lr_scheduler.restore_lr
        state["lr"] = [group["lr"] for group in run.optimizer.param_groups]
    return state


def restore_plateau(run: Run, checkpoint: dict) -> None:
    """Set a plateau schedule to where it stood; timm's begin anew, with the first learning rate."""
    state, schedule = checkpoint["run"], run.lr_scheduler
    vars(schedule.lr_scheduler).update(state["plateau"])
    schedule.restore_lr = state["restore_lr"]
    for group, lr in zip(run.optimizer.param_groups, state["lr"], strict=True):
        group["lr"] = lr
    if state["updates"] is None:
        schedule.step(run.first_epoch, checkpoint.get("metric"))


def restore_position(run: Run, state: dict, update_sizes: Any) -> None:
    """Set random states, sampler and losses so that the run goes on where `state` was taken.

    Args:
        run: the run, set up and not yet begun.
        state: the entry `run` of its checkpoint.
        update_sizes: loop.update_sizes.
    """
    args = run.args
    same_world = state["world_size"] == args.world_size
    same_batches = same_world and state["batch_size"] == args.batch_size
    mine = state["ranks"][args.rank] if same_world else {}
    sampler = run.train_sampler
    in_process = sampler is not None and sampler.in_process
    within = state["updates"] is not None and sampler is not None

    # A loader that keeps its iterator has drawn the seed of its workers in the first epoch.
    for loader_sampler in (sampler, run.eval_sampler):
        if loader_sampler is not None and not loader_sampler.in_process:
            loader_sampler.undo_base_seed = True
    loader = getattr(run.data.train, "loader", run.data.train)
    if isinstance(loader, MultiEpochsDataLoader) and loader.num_workers == 0:
        loader.iterator = DataLoader.__iter__(loader)
    if within:
        skip, updates = state["batches"], state["updates"]
        if not same_batches or state["grad_accum_steps"] != args.grad_accum_steps:
            skip, updates = _converted(run, state, update_sizes)
        run.updates_done, run.consumed = updates, skip
        run.resumed_losses = (
            [mine["losses"]] if same_world else [r["losses"] for r in state["ranks"]]
        )
        replay = Replay(skip)
        if same_batches:
            replay.order = mine["order"]
            ahead = mine["ahead"] if in_process else []
            replay.states = deque([*ahead, mine.get("data_random", mine["random"])])
        sampler.replay = replay
    if same_world:
        set_random_state(mine["random"], run.device)
        if run.data_stream is not None and "data_random" in mine:
            run.data_stream.state = mine["data_random"]
    else:
        _logger.warning(
            f"{args.resume} was written by {state['world_size']} processes, this run has "
            f"{args.world_size}: it goes on at the same sample and cycle, with random states of "
            "its own"
        )


def _converted(run: Run, state: dict, update_sizes: Any) -> tuple[int, int]:
    """Batches and whole updates of this run's size that make up the samples used before."""
    args = run.args
    samples = state["batches"] * state["batch_size"] * state["world_size"]
    batches = samples // (args.batch_size * args.world_size)
    done = updates = 0
    for size, _, last in update_sizes(len(run.data.train), args.grad_accum_steps):
        if done + size > batches:
            break
        done, updates = done + size, updates + 1
        if last:
            break
    _logger.warning(
        f"{args.resume} was written at batch {state['batches']} of {state['batch_size']} x "
        f"{state['world_size']} images; batches of {args.batch_size} x {args.world_size} go on "
        f"with number {done}, at image {done * args.batch_size * args.world_size} of the epoch "
        f"instead of {samples}"
    )
    return done, updates
