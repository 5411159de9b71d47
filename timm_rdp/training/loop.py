"""One epoch: batches in, iterations run, losses out."""

from __future__ import annotations

import argparse
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torchvision.utils
from timm import utils
from timm.task import TrainingTask
from torch import nn

from timm_rdp import ResidualDropPath
from timm_rdp.core.rdp import COMPLEMENT
from timm_rdp.errors import TrainingError
from timm_rdp.training.checkpoint import Saver, all_finite
from timm_rdp.training.interrupt import Interruption, Stopped
from timm_rdp.training.losses import Losses
from timm_rdp.training.position import ResumableSampler, state_of_rank, state_of_run
from timm_rdp.training.randomness import DataStream

if TYPE_CHECKING:
    from timm_rdp.training.data import Data
    from timm_rdp.training.outputs import Curves, Summary
    from timm_rdp.training.progress import Progress


@dataclass
class Run:
    """Everything that a run consists of once it is set up."""

    args: argparse.Namespace
    device: torch.device
    model_dtype: torch.dtype | None
    autocast: Callable
    loss_scaler: Any
    task: TrainingTask
    eval_loss: nn.Module
    data: Data
    optimizer: torch.optim.Optimizer
    rdp: ResidualDropPath | None
    interruption: Interruption
    data_stream: DataStream | None = None  # of --data-seed
    train_sampler: ResumableSampler | None = None  # None: the loader alone knows its order
    eval_sampler: ResumableSampler | None = None
    num_epochs: int = 0
    first_epoch: int = 0
    lr_scheduler: Any = None
    # Only the primary process has these five.
    saver: Saver | None = None
    output_dir: str | None = None
    summary: Summary | None = None
    curves: Curves | None = None
    wandb: Any = None
    progress: Progress | None = None
    # Where the run stands: the epoch and update in progress, the updates and batches of this epoch
    # that are done, and the batch that came last.
    epoch: int = 0
    update: int = 0
    updates_done: int = 0
    consumed: int = 0
    newest: MicroBatch | None = None
    losses: Losses | None = None
    # Where a resumed run goes on within its first epoch, and what it has to average with.
    resumed_losses: list[dict] | None = None
    state: dict | None = None  # what the checkpoint that is written next holds of it
    results: list[dict] = field(default_factory=list)

    @property
    def updates_per_epoch(self) -> int:
        return -(-len(self.data.train) // self.args.grad_accum_steps)


class MicroBatch(NamedTuple):
    """One batch of the loader, on the device, augmented and mixed."""

    index: int  # within the epoch
    input: Any  # (B, C, H, W), or NaFlex's dict of patches
    target: torch.Tensor
    size: int
    loss_scale: float | torch.Tensor | None


def train_one_epoch(run: Run) -> tuple[OrderedDict, OrderedDict]:
    """Train on every batch of the training loader once.

    The first epoch of a resumed run goes on where that stood.

    Returns:
        timm's metrics (loss), and those of ResidualDroppath (empty without --rdp)

    Raises:
        TrainingError: a loss is not a finite number; what was saved before is not touched.
        Stopped: the run was asked to stop; a recovery checkpoint has been written.
    """
    args, epoch, progress = run.args, run.epoch, run.progress
    _mixup_off(run, epoch)
    run.task.get_trainable_module().train()
    run.optimizer.zero_grad()

    rdp = run.rdp if run.rdp is not None and epoch >= args.rdp_start_epoch else None
    losses = run.losses = Losses(run, epoch)
    if run.resumed_losses is None:
        run.updates_done = run.consumed = 0
    else:
        losses.load_state_dicts(run.resumed_losses)
        run.resumed_losses = None
    num_updates = epoch * run.updates_per_epoch + run.updates_done
    batches = load_batches(run)
    sizes = update_sizes(len(run.data.train), args.grad_accum_steps)
    done = run.updates_done
    progress.start_epoch(run)
    for run.update, (size, divisor, last) in enumerate(islice(sizes, done, None), done):
        load_start = time.time()
        first = next(batches, None)
        if first is None:
            break
        data_time = time.time() - load_start

        group = chain([first], islice(batches, size - 1))
        count = train_on_group(run, rdp, group, size, divisor, losses)
        if (
            count < size
        ):  # the loader ended earlier than its length said: no full update, as in timm
            break
        num_updates += 1
        run.updates_done += 1
        progress.updated(run.newest.size * count * args.world_size, data_time)
        run.task.update_ema(step=num_updates)
        if args.synchronize_step:
            _synchronize(run.device)

        at_interval = run.update % args.log_interval == 0 or last
        if at_interval or progress.is_due():
            progress.show(run, losses, last)
        if at_interval and args.save_images and run.output_dir:
            _save_images(run.newest, run.output_dir)
        if run.lr_scheduler is not None:
            run.lr_scheduler.step_update(num_updates=num_updates, metric=losses.first.avg)
        signum = run.interruption.agreed()
        if signum and not _within_cycle(run, rdp):
            save_recovery(run, state_of_rank(run, losses))
            raise Stopped(signum)
        if args.recovery_interval and (run.update + 1) % args.recovery_interval == 0:
            save_recovery(run, state_of_rank(run, losses))

    if hasattr(run.optimizer, "sync_lookahead"):
        run.optimizer.sync_lookahead()
    run.newest = None
    return losses.of_epoch()


def save_recovery(run: Run, mine: dict) -> None:
    """Write a recovery checkpoint of the epoch in progress; every rank must call it.

    Args:
        run: the run, between two updates.
        mine: what `state_of_rank` returned where the run is to go on.

    Raises:
        TrainingError: a weight is not a finite number, or the file cannot be written.
    """
    check_weights(run)
    resumable = run.train_sampler is not None
    run.state = state_of_run(run, mine, run.updates_done) if resumable else None
    if run.saver is not None:
        run.saver.save_recovery(run.epoch, batch_idx=run.update)


def _within_cycle(run: Run, rdp: ResidualDropPath | None) -> bool:
    if rdp is None or run.args.rdp_batch == "same":
        return False
    return rdp.iteration().phase == COMPLEMENT


def train_on_group(
    run: Run,
    rdp: ResidualDropPath | None,
    group: Iterable[MicroBatch],
    size: int,
    divisor: int,
    losses: Losses,
) -> int:
    """Run every iteration that one group of micro-batches gets; the optimizer steps once in each.

    Returns:
        how many micro-batches there were
    """
    if rdp is None:
        return run_iteration(run, group, size, divisor, losses, "", first=True)
    if run.args.rdp_batch == "next":
        it = rdp.iteration()
        losses.started(it)
        with it:
            return run_iteration(run, group, size, divisor, losses, it.phase, first=True)
    kept: list[MicroBatch] = []
    for it in rdp.cycle():
        losses.started(it)
        first = not kept
        # The first iteration trains on the micro-batches as they are loaded, the second one on
        # the same tensors again.
        with it:
            source = _keep(group, kept) if first else kept
            run_iteration(run, source, size, divisor, losses, it.phase, first)
    return len(kept)


def run_iteration(
    run: Run,
    group: Iterable[MicroBatch],
    size: int,
    divisor: int,
    losses: Losses,
    phase: str,
    first: bool,
) -> int:
    """Forward and backward of each micro-batch, then one optimizer step.

    Args:
        group: the micro-batches.
        size: how many they should be; with fewer there is no step.
        divisor: what their losses are divided by.
        losses: takes the detached losses.
        phase: "droppath", "complement" or "" for plain training.
        first: whether this is the first iteration that these batches get.

    Returns:
        how many micro-batches there were
    """
    count = 0
    for batch in group:
        count += 1
        step = count == size
        with nullcontext() if step or not run.args.distributed else run.task.no_sync():
            with run.autocast():
                loss = run.task(batch.input, batch.target)["loss"]
            if divisor > 1:
                loss = loss / divisor
            _backward(run, loss if batch.loss_scale is None else batch.loss_scale * loss, step)
        losses.add(loss.detach(), divisor, batch.size, run.update, phase, first)
    if count == size:
        run.optimizer.zero_grad()
    return count


def _backward(run: Run, loss: torch.Tensor, step: bool) -> None:
    args = run.args
    # A frozen parameter has no gradient, and timm's clipping passes over those.
    parameters = None
    if args.clip_grad is not None:
        parameters = run.task.get_clip_parameters(exclude_head="agc" in args.clip_mode)
    second_order = getattr(run.optimizer, "is_second_order", False)
    if run.loss_scaler is not None:
        run.loss_scaler(
            loss,
            run.optimizer,
            clip_grad=args.clip_grad,
            clip_mode=args.clip_mode,
            parameters=parameters,
            create_graph=second_order,
            need_update=step,
        )
        return
    loss.backward(create_graph=second_order)
    if step:
        if args.clip_grad is not None:
            utils.dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
        run.optimizer.step()


def load_batches(run: Run) -> Iterator[MicroBatch]:
    """The loader's batches, on the device and mixed; each is loaded when it is asked for."""
    loader = None
    while True:
        with run.data_stream() if run.data_stream is not None else nullcontext():
            if loader is None:
                loader = iter(run.data.train)
            try:
                input, target = next(loader)
            except StopIteration:
                return
            input, target = to_device(run, input, target, run.data.mixup_fn)
        size = (input["patches"] if isinstance(input, dict) else input).shape[0]
        run.newest = MicroBatch(run.consumed, input, target, size, _loss_scale(run, size))
        run.consumed += 1
        yield run.newest


def to_device(
    run: Run, input: Any, target: torch.Tensor, mixup_fn: Callable | None = None
) -> tuple[Any, torch.Tensor]:
    """What timm's prefetcher would have done, where it is not in use; then the memory layout."""
    if not run.args.prefetcher:
        target = target.to(device=run.device)
        if isinstance(input, dict):
            input = {name: _move(run, value) for name, value in input.items()}
        elif isinstance(input, list | tuple):  # augmentation splits, one after the other
            target = target.repeat(len(input))
            input = torch.cat([_move(run, split) for split in input])
        else:
            input = _move(run, input)
        if mixup_fn is not None:
            input, target = mixup_fn(input, target)
    if run.args.channels_last and not isinstance(input, dict):
        input = input.contiguous(memory_format=torch.channels_last)
    return input, target


def _move(run: Run, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value  # NaFlex's sequence length
    return value.to(run.device, run.model_dtype if value.is_floating_point() else None)


def _loss_scale(run: Run, size: int) -> float | torch.Tensor | None:
    """How much a batch counts where batch sizes vary; None where they do not."""
    args, data = run.args, run.data
    if not (data.naflex or data.scheduled):
        return None
    mode = args.naflex_loss_scale if data.naflex else args.variable_batch_loss_scale
    share = size / data.batch_size_reference
    scale = {"none": 1.0, "linear": share, "sqrt": share**0.5}[mode or "none"]
    if data.naflex and args.distributed:
        # Ranks may hold batches of different size: weigh each one by its share of the whole.
        total = torch.tensor(size, device=run.device, dtype=torch.float32)
        scale = scale * args.world_size * size / utils.reduce_tensor(total, 1)
    return scale


def update_sizes(num_batches: int, accumulate: int) -> Iterator[tuple[int, int, bool]]:
    """How timm's script groups the batches of an epoch into updates.

    What is left over at the end of the epoch is divided by its own number, and, in timm, also
    updates wherever the batch number is a multiple of that: 7 batches by 4 make updates of
    4, 2 and 1, the last two divided by 3. Kept, because runs are to agree bit for bit.

    Args:
        num_batches: what the loader says its length is; a longer one goes on in full groups.
        accumulate: batches per update.

    Yields:
        number of batches, divisor of their losses, whether the epoch ends here
    """
    full = num_batches - num_batches % accumulate
    for end in range(accumulate, full + 1, accumulate):
        yield accumulate, accumulate, end == num_batches
    remainder = num_batches - full
    start = full
    for end in range(full + 1, num_batches + 1):
        early = end > full + 1 and end % remainder == 0
        if early or end == num_batches:
            yield end - start, remainder, end == num_batches
            start = end
    while True:
        yield accumulate, accumulate, False


def _keep(group: Iterable[MicroBatch], kept: list[MicroBatch]) -> Iterator[MicroBatch]:
    for batch in group:
        kept.append(batch)
        yield batch


def check_weights(run: Run) -> None:
    """A finite loss can still be followed by a step to weights that are not: never save those.

    Raises:
        TrainingError: naming where the run stands.
    """
    if not all_finite(run.task.get_trainable_module()):
        raise TrainingError(
            f"a weight is not a finite number after epoch {run.epoch}, update {run.update}: "
            "training stops; try a lower --lr, more --warmup-epochs or --clip-grad 1.0"
        )


def _save_images(batch: MicroBatch, folder: str) -> None:
    path = os.path.join(folder, f"train-batch-{batch.index}.jpg")
    torchvision.utils.save_image(batch.input, path, padding=0, normalize=True)


def _mixup_off(run: Run, epoch: int) -> None:
    if not run.args.mixup_off_epoch or epoch < run.args.mixup_off_epoch:
        return
    if run.args.prefetcher and getattr(run.data.train, "mixup_enabled", False):
        run.data.train.mixup_enabled = False
    elif run.data.mixup_fn is not None:
        run.data.mixup_fn.mixup_enabled = False


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "npu":
        torch.npu.synchronize()
