"""What a checkpoint needs to continue at the very next batch, and how it is restored.

The order of an epoch is drawn when its first batch is asked for, and a batch's augmentation when it
is loaded, which may be one batch before it is used (timm's prefetcher). So the loader's batch
sampler notes the random state at both moments; a resumed epoch draws the same order, passes over
the batches that were used without loading them, and loads the others from the same states.
"""

import argparse
import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from timm.data.loader import MultiEpochsDataLoader
from torch.utils.data import DataLoader

from timm_rdp.training.batches import DataStream, random_state, set_random_state, update_sizes
from timm_rdp.training.log import Losses
from timm_rdp.training.state import RunState

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

    def __init__(self, sampler: Any, in_process: bool, is_continued: bool = True):
        self._sampler = sampler
        self.in_process = in_process
        self.is_continued = is_continued
        self.replay: Replay | None = None
        self.workers_are_seeded = False
        self.before: dict | None = None
        self.current: _Pass | None = None

    def __iter__(self) -> Iterator[list[int]]:
        # torch draws the seed of a loader's workers when it starts them: once, where they persist.
        # A resumed run starts them a second time, so what that draws is taken back. torch asks for
        # two iterators then, the first one before it draws.
        if self.workers_are_seeded:
            self.workers_are_seeded, self.before = False, random_state()
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
        self._replayed: deque = deque()
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
            if self._replayed:
                set_random_state(self._replayed.pop())
            raise
        if self._replayed:
            set_random_state(self._replayed.popleft())
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
        self.yielded, self._replayed = replay.skip, replay.states


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


def state_of_rank(
    state: RunState,
    device: torch.device,
    sampler: ResumableSampler | None,
    stream: DataStream | None,
    losses: Losses | None = None,
) -> dict[str, Any]:
    """What this process must know to go on; gathered from all of them by `state_of_run`.

    Args:
        state: where the run stands.
        device: of the model.
        sampler: of the training loader.
        stream: of `--data-seed`.
        losses: of the epoch in progress; None after its end.
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
    mine: dict[str, Any],
    updates: int | None,
    lr_scheduler: Any,
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """The entry `run` of a checkpoint; every rank must call it.

    Args:
        mine: this process's, from `state_of_rank`.
        updates: how many updates of the epoch are done, None after its end.
    """
    ranks: list[Any] = [mine]
    if args.distributed:
        ranks = [None] * args.world_size
        torch.distributed.all_gather_object(ranks, mine)
    entry = {
        "updates": updates,
        "batches": state.batches_done,
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


def is_exact(args: argparse.Namespace, checkpoint: dict[str, Any]) -> bool:
    """Whether a run goes on exactly where the checkpoint was written.

    Without its optimizer state, or at an epoch of the user's choice, it is another run.
    """
    return bool(checkpoint.get("run")) and not args.no_resume_opt and args.start_epoch is None


def restore_position(
    args: argparse.Namespace,
    state: RunState,
    checkpoint: dict[str, Any],
    device: torch.device,
    loader: Any,
    samplers: tuple[ResumableSampler | None, ResumableSampler | None],
    stream: DataStream | None,
) -> list[dict]:
    """Set random states, sampler and position so that the run goes on where it was saved.

    Args:
        args: the options.
        state: gets the position.
        checkpoint: one for which `is_exact` holds.
        device: of the model.
        loader: of the training data.
        samplers: of the training and of the validation loader.
        stream: of `--data-seed`.

    Returns:
        the averages of the losses so far of the epoch in progress, of this rank or of all that
        there were; empty at the beginning of an epoch
    """
    entry = checkpoint["run"]
    same_world = entry["world_size"] == args.world_size
    mine = entry["ranks"][args.rank] if same_world else {}
    sampler = samplers[0]
    losses: list[dict] = []

    # A loader that keeps its iterator has drawn the seed of its workers in the first epoch.
    for other in samplers:
        if other is not None and not other.in_process:
            other.workers_are_seeded = True
    inner = getattr(loader, "loader", loader)
    if isinstance(inner, MultiEpochsDataLoader) and inner.num_workers == 0:
        inner.iterator = DataLoader.__iter__(inner)
    if entry["updates"] is not None and sampler is not None:
        state.epoch = checkpoint["epoch"]
        state.batches_done, state.updates_done = entry["batches"], entry["updates"]
        same_batches = same_world and entry["batch_size"] == args.batch_size
        if not same_batches or entry["grad_accum_steps"] != args.grad_accum_steps:
            _convert_position(args, state, entry, len(loader))
        losses = [mine["losses"]] if same_world else [r["losses"] for r in entry["ranks"]]
        sampler.replay = Replay(state.batches_done)
        if same_batches:
            sampler.replay.order = mine["order"]
            ahead = mine["ahead"] if sampler.in_process else []
            sampler.replay.states = deque([*ahead, mine.get("data_random", mine["random"])])
    if same_world:
        set_random_state(mine["random"], device)
        if stream is not None and "data_random" in mine:
            stream.state = mine["data_random"]
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
