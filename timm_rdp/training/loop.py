"""One epoch of training and one of validation: batches in, iterations run, losses out."""

import argparse
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, islice, tee
from typing import Any

import torch
import torchvision.utils
from timm import utils
from timm.task import TrainingTask, evaluation_sample_limit
from torch import nn

from timm_rdp import ResidualDropPath
from timm_rdp.core.rdp import COMPLEMENT
from timm_rdp.errors import TrainingError, refused_with
from timm_rdp.training.batches import (
    MicroBatch,
    first_batch,
    random_state,
    set_random_state,
    to_device,
    update_sizes,
)
from timm_rdp.training.data import Data
from timm_rdp.training.log import Display, Losses, mean_lr
from timm_rdp.training.model import example_input, trained_module
from timm_rdp.training.resume import Stopped, StopSignals
from timm_rdp.training.state import RunState

# Forward and backward of a micro-batch, whose loss is divided by a number; then, where the last
# argument says so, the optimizer's step. Returns the detached loss.
TrainBatch = Callable[[MicroBatch, int, bool], torch.Tensor]


def train_one_epoch(
    args: argparse.Namespace,
    state: RunState,
    *,
    task: TrainingTask,
    optimizer: torch.optim.Optimizer,
    rdp: ResidualDropPath | None,
    batches: Iterator[MicroBatch],
    num_batches: int,
    train_batch: TrainBatch,
    losses: Losses,
    lr_scheduler: Any,
    display: Display,
    stop: StopSignals,
    save_recovery: Callable[[], None],
    image_folder: str | None = None,
) -> None:
    """Train on the batches of an epoch, or on what a resumed run has left of them.

    The number of batches is that of the whole epoch, as the loader says. `save_recovery` writes a
    checkpoint between two updates, on every rank; `--save-images` go to the image folder.

    Raises:
        Stopped: the run was asked to stop; a recovery checkpoint has been written.
    """
    num_updates = state.epoch * -(-num_batches // args.grad_accum_steps) + state.updates_done
    sizes = islice(update_sizes(num_batches, args.grad_accum_steps), state.updates_done, None)
    display.start_epoch(state)
    for update, (size, divisor, last) in enumerate(sizes, state.updates_done):
        state.update, load_start = update, time.time()
        first = next(batches, None)
        if first is None:
            break
        data_time = time.time() - load_start
        group = chain([first], islice(batches, size - 1))
        batching = (args.rdp_batch, train_batch, group, size, divisor)
        count, newest = train_on_group(rdp, *batching, losses, update)
        if count < size:  # the loader ended before the length that it told, as in timm
            break
        num_updates, state.updates_done = num_updates + 1, state.updates_done + 1
        display.updated(newest.size * size * args.world_size, data_time)
        task.update_ema(step=num_updates)
        if args.synchronize_step and newest.target.device.type == "cuda":
            torch.cuda.synchronize()
        at_interval = update % args.log_interval == 0 or last
        if at_interval or display.is_due():
            display.show(state, losses, mean_lr(optimizer), last)
        if at_interval and args.save_images and image_folder:
            path = f"{image_folder}/train-batch-{newest.index}.jpg"
            torchvision.utils.save_image(newest.input, path, padding=0, normalize=True)
        if lr_scheduler is not None:
            lr_scheduler.step_update(num_updates=num_updates, metric=losses.first.avg)
        signum = stop.on_any_rank()
        # A cycle that has begun is finished first.
        complement = args.rdp_batch == "next" and rdp and rdp.iteration().phase == COMPLEMENT
        stops = signum and not complement
        if stops or (args.recovery_interval and (update + 1) % args.recovery_interval == 0):
            save_recovery()
        if stops:
            raise Stopped(signum)


def train_on_group(
    rdp: ResidualDropPath | None,
    rdp_batch: str,
    train_batch: TrainBatch,
    group: Iterable[MicroBatch],
    size: int,
    divisor: int,
    losses: Losses,
    update: int,
) -> tuple[int, MicroBatch]:
    """Run every iteration that one group of micro-batches gets; the optimizer steps once in each.

    Returns:
        how many micro-batches there were, and the last of them
    """
    if rdp is None:
        return run_iteration(train_batch, group, size, divisor, losses, update, "", True)
    same = rdp_batch == "same"
    for index, it in enumerate(rdp.cycle() if same else [rdp.iteration()]):
        losses.started(it)
        # The first iteration trains on the micro-batches as they are loaded, the second one on
        # the same tensors again.
        source, group = tee(group) if same else (group, ())
        with it:
            done = run_iteration(
                train_batch, source, size, divisor, losses, update, it.phase, index == 0
            )
    return done


def run_iteration(
    train_batch: TrainBatch,
    group: Iterable[MicroBatch],
    size: int,
    divisor: int,
    losses: Losses,
    update: int,
    phase: str,
    first: bool,
) -> tuple[int, MicroBatch]:
    """Forward and backward of each micro-batch, then one optimizer step.

    Args:
        group: the micro-batches, one or more; with fewer than `size` there is no step.
        phase: "droppath", "complement" or "" for plain training.
        first: whether this is the first iteration that these batches get.

    Returns:
        how many micro-batches there were, and the last of them
    """
    for count, batch in enumerate(group, 1):
        loss = train_batch(batch, divisor, count == size)
        losses.add(loss, divisor, batch.size, update, phase, first)
    return count, batch


def batch_trainer(
    args: argparse.Namespace,
    task: TrainingTask,
    optimizer: torch.optim.Optimizer,
    autocast: Callable[[], AbstractContextManager],
    loss_scaler: Any,
) -> TrainBatch:
    """What trains on one micro-batch (see TrainBatch), with clipping and loss scaling."""
    second_order = getattr(optimizer, "is_second_order", False)

    def clipped() -> Any:
        # A frozen parameter has no gradient, and timm's clipping passes over those.
        if args.clip_grad is None:
            return None
        return task.get_clip_parameters(exclude_head="agc" in args.clip_mode)

    def train_batch(batch: MicroBatch, divisor: int, step: bool) -> torch.Tensor:
        with nullcontext() if step or not args.distributed else task.no_sync():
            with autocast():
                loss = task(batch.input, batch.target)["loss"]
            if divisor > 1:
                loss = loss / divisor
            scaled = loss if batch.loss_scale is None else batch.loss_scale * loss
            if loss_scaler is not None:
                loss_scaler(
                    scaled, optimizer, clip_grad=args.clip_grad, clip_mode=args.clip_mode,
                    parameters=clipped(), create_graph=second_order, need_update=step,
                )  # fmt: skip
            else:
                scaled.backward(create_graph=second_order)
                if step and args.clip_grad is not None:
                    utils.dispatch_clip_grad(clipped(), value=args.clip_grad, mode=args.clip_mode)
                if step:
                    optimizer.step()
        if step:
            optimizer.zero_grad()
        return loss.detach()

    return train_batch


def try_batch(
    args: argparse.Namespace,
    task: TrainingTask,
    data: Data,
    input_size: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype | None,
    autocast: Callable[[], AbstractContextManager],
) -> None:
    """Forward, loss and backward of one real batch, as training does, which leaves no bit changed.

    Raises:
        UsageError: the model does not take such a batch.
    """
    module = trained_module(task)
    if args.torchscript:  # whose first inputs decide how it is optimized
        return
    random, buffers = random_state(device), {b: b.clone() for b in task.buffers()}
    own = getattr(module, "pretrained_cfg", {}).get("input_size")
    hint = f" (its own: {own[1]} x {own[2]})" if own else ""
    try:
        with refused_with("the training data cannot be made into batches"):
            batch = first_batch(args, data, device, dtype)
        if batch is None:
            return
        images = batch[0]["patches"] if isinstance(batch[0], dict) else batch[0]
        shape = " x ".join(map(str, images.shape))
        with refused_with(f"{args.model}{hint} cannot be trained on batches of {shape}"):
            with autocast():
                loss = task.train()(*batch)["loss"]
            loss.backward()
            for flag in ("--train-img-sizes", "--naflex-patch-sizes"):
                for size in getattr(args, flag[2:].replace("-", "_")) or ():
                    example = example_input(args, input_size, module, size, device, images.dtype)
                    with refused_with(f"{flag} {size}"), torch.no_grad(), autocast():
                        module(example)
    finally:
        for parameter in task.parameters():
            parameter.grad = None
        for buffer, before in buffers.items():
            buffer.copy_(before)
        set_random_state(random, device)


def evaluate(
    args: argparse.Namespace,
    task: TrainingTask,
    loader: Any,
    device: torch.device,
    dtype: torch.dtype | None,
    autocast: Callable[[], AbstractContextManager],
    model: nn.Module,
    display: Display,
    stop: StopSignals,
    suffix: str = "",
) -> OrderedDict[str, float]:
    """Run a model over the validation loader, with the task's evaluator.

    Returns:
        timm's metrics of all ranks together: loss, top1 and top5, or map and F1 (in percent)

    Raises:
        Stopped: the run was asked to stop.
    """
    evaluator = task.create_evaluator(max_samples=evaluation_sample_limit(loader))
    last = len(loader) - 1
    model.eval()
    with torch.inference_mode():
        for index, loaded in enumerate(display.watch(loader, f"Validation{suffix}")):
            input, target = to_device(args, loaded, device, dtype)
            with autocast():
                output = model(input)
                if isinstance(output, tuple | list):
                    output = output[0]
                if args.tta > 1:
                    output = output.unfold(0, args.tta, args.tta).mean(dim=2)
                    target = target[0 : target.size(0) : args.tta]
            evaluator.update(output, target)
            if signum := stop.on_any_rank():
                raise Stopped(signum)
            # Numbers are fetched from the device only where they are shown.
            if index == last or index % args.log_interval == 0:
                display.show_validation(suffix, index, last, evaluator.summary)
    return evaluator.compute(distributed=args.distributed)


def check_weights(task: TrainingTask, state: RunState) -> None:
    """A finite loss can still be followed by a step to weights that are not: never save those.

    Raises:
        TrainingError: naming where the run stands.
    """
    tensors = trained_module(task).state_dict().values()
    if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
        raise TrainingError(
            f"a weight is not a finite number after epoch {state.epoch}, update {state.update}: "
            "training stops; try a lower --lr, more --warmup-epochs or --clip-grad 1.0"
        )
