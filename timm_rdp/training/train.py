"""A training run, from the command line to the last checkpoint."""

import argparse
import json
import logging
import logging.handlers
import math
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from timm import utils
from tqdm.contrib.logging import logging_redirect_tqdm

from timm_rdp.errors import TrainingError, UsageError, report
from timm_rdp.training.batches import load_batches, random_state, set_random_state
from timm_rdp.training.data import close_data
from timm_rdp.training.log import Display, Losses
from timm_rdp.training.loop import batch_trainer, check_weights, evaluate, train_one_epoch
from timm_rdp.training.model import evaluated_module, trained_module
from timm_rdp.training.options import args_text, parse_args
from timm_rdp.training.outputs import Outputs, open_outputs, save_epoch, save_recovery
from timm_rdp.training.resume import Stopped, is_exact, restore_position, restore_schedule
from timm_rdp.training.setup import Parts, set_up
from timm_rdp.training.state import RunState

_logger = logging.getLogger("timm_rdp.training")


def main(argv: list[str] | None = None) -> int:
    """Train a model as the command line says.

    Args:
        argv: the command line without the program, None for that of this process.

    Returns:
        exit status: 0, 1 for a run that failed, 2 for options or data that cannot be used, 128 and
        the signal's number for a run that was stopped
    """
    if not logging.root.handlers:
        utils.setup_default_logging()
    try:
        with _log_held_back():
            args = parse_args(argv)
            text, automatic = args_text(args), args.resume == "auto"
            parts = set_up(args)
            state, losses_so_far = continue_run(args, parts)
            # The run's folder comes last: what was refused until here has written nothing.
            outputs = None
            if utils.is_primary(args):
                outputs = open_outputs(args, parts, state, text, automatic)
        return fit(args, parts, state, losses_so_far, outputs)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (UsageError, TrainingError) as error:
        return report(error)


@contextmanager
def _log_held_back() -> Iterator[None]:
    """Log nothing until the set-up is through: options that are refused are told in one line."""
    handlers = logging.root.handlers[:]
    held = logging.handlers.MemoryHandler(sys.maxsize, flushLevel=sys.maxsize)
    logging.root.handlers[:] = [held]
    try:
        yield
    except UsageError:
        held.buffer.clear()
        raise
    finally:
        logging.root.handlers[:] = handlers
        for record in held.buffer:
            logging.root.handle(record)


def continue_run(args: argparse.Namespace, parts: Parts) -> tuple[RunState, list[dict]]:
    """Where the run begins: at the start, at an epoch, or exactly where a checkpoint was written.

    Random states, the loader's position and the schedule are set to it.

    Returns:
        the position, and the losses so far of an epoch that goes on
    """
    checkpoint = parts.checkpoint
    epochs = (args.start_epoch, parts.resume_epoch, 0)
    state = RunState(epoch=next(e for e in epochs if e is not None))
    losses: list[dict] = []
    if is_exact(args, checkpoint):
        losses = restore_position(
            args,
            state,
            checkpoint,
            parts.device,
            (parts.data.train, parts.data.eval),
            parts.sampler,
            parts.stream,
        )
    lr_scheduler = parts.lr_scheduler
    restore_schedule(
        args, state, checkpoint, lr_scheduler, parts.optimizer, parts.updates_per_epoch
    )
    if utils.is_primary(args):
        if lr_scheduler is not None:
            unit = "epoch" if lr_scheduler.t_in_epochs else "update"
            _logger.info(f"Scheduled epochs: {parts.last_epoch}. LR stepped per {unit}.")
        if args.rdp and args.rdp_start_epoch >= parts.last_epoch:
            _logger.warning(
                f"--rdp-start-epoch {args.rdp_start_epoch}: the run has {parts.last_epoch} epochs, "
                "so that ResidualDroppath never begins."
            )
    return state, losses


def fit(
    args: argparse.Namespace,
    parts: Parts,
    state: RunState,
    losses_so_far: list[dict],
    outputs: Outputs | None,
) -> int:
    """Train to the last epoch.

    Args:
        state: where the run begins or goes on.
        losses_so_far: of an epoch that goes on.
        outputs: those of the primary process.

    Returns:
        exit status: 0, or 128 and the signal's number where a signal stopped the run

    Raises:
        TrainingError: the run cannot go on; the checkpoints from before are kept.
    """
    display = Display(
        parts.last_epoch, parts.updates_per_epoch, utils.is_primary(args), args.distributed
    )
    status, results = 0, []
    redirected = logging_redirect_tqdm() if display.is_bar else nullcontext()
    try:
        with parts.stop.handled(), redirected:
            results = _epochs(args, parts, state, losses_so_far, outputs, display)
    except Stopped as stopped:
        status = 128 + stopped.signum
        if outputs is not None:
            folder, name = (
                shlex.quote(part) for part in os.path.split(os.path.normpath(outputs.folder))
            )
            _logger.info(
                f"{stopped} in epoch {state.epoch}, after {state.updates_done} updates: continue "
                f"with --output {folder} --experiment {name} --resume auto"
            )
    except (RuntimeError, OSError) as error:
        reason = _reason_to_stop(error, args.distributed)
        if reason is None:
            raise
        raise TrainingError(
            f"{reason} in epoch {state.epoch}, update {state.update}: training stops; the "
            "checkpoints from before are intact, continue with --resume auto"
        ) from error
    finally:
        display.close()
        close_data(parts.data)
    if args.distributed:
        parts.stop.close()
        torch.distributed.destroy_process_group()
    if status == 0 and outputs is not None:
        _tell_results(outputs, results, parts.eval_metric)
    return status


def _reason_to_stop(error: RuntimeError | OSError, distributed: bool) -> str | None:
    """What an error from outside this process is about; None where it is another one."""
    first_line = str(error).partition("\n")[0]
    if "DataLoader worker" in first_line:
        return first_line
    if "Too many open files" in first_line or "ancdata" in first_line:
        return "too many open files (raise the limit with ulimit -n, or use fewer --workers)"
    communication = ("gloo", "nccl", "connection", "socket", "broken pipe", "timed out", "timeout")
    if distributed and any(word in str(error).lower() for word in communication):
        return f"another rank no longer answers ({first_line})"
    return None


def _epochs(
    args: argparse.Namespace,
    parts: Parts,
    state: RunState,
    losses_so_far: list[dict],
    outputs: Outputs | None,
    display: Display,
) -> list[dict]:
    """Load, step, log, validate, save, epoch by epoch; returns the metrics of each."""
    task, lr_scheduler, results = parts.task, parts.lr_scheduler, []
    train_batch = batch_trainer(args, task, parts.optimizer, parts.autocast, parts.loss_scaler)
    for epoch in range(state.epoch, parts.last_epoch):
        losses = Losses(epoch, parts.rdp, parts.device, args.world_size * args.distributed)
        if losses_so_far:
            losses.load_state_dicts(losses_so_far)
        else:
            state.updates_done = state.batches_done = 0
        state.epoch, losses_so_far = epoch, []
        _start_epoch(args, parts, epoch)
        train_one_epoch(
            args,
            state,
            task=task,
            optimizer=parts.optimizer,
            rdp=parts.rdp if epoch >= args.rdp_start_epoch else None,
            batches=load_batches(
                args, state, parts.data, parts.device, parts.dtype, parts.stream or nullcontext
            ),
            num_batches=len(parts.data.train),
            train_batch=train_batch,
            losses=losses,
            lr_scheduler=lr_scheduler,
            display=display,
            stop=parts.stop,
            save_recovery=partial(save_recovery, args, parts, state, outputs, losses),
            image_folder=outputs.folder if outputs is not None else None,
        )
        getattr(parts.optimizer, "sync_lookahead", lambda: None)()
        train_metrics, rdp_metrics = losses.summary()
        _distribute_statistics(args, trained_module(task))
        latest, done = None, epoch + 1
        if not done % args.val_interval or done in (parts.last_epoch, *(args.save_epochs or ())):
            check_weights(task, state)
            before_validation = random_state(parts.device)
            try:
                eval_metrics = _validate(args, parts, display, epoch)
            except Stopped:
                set_random_state(before_validation, parts.device)
                save_recovery(args, parts, state, outputs, losses)
                raise
            state.validated = True
            display.end_epoch(state, train_metrics, rdp_metrics, eval_metrics)
            latest = (eval_metrics or train_metrics)[parts.eval_metric]
            metrics = (train_metrics, eval_metrics, rdp_metrics)
            save_epoch(args, parts, state, outputs, metrics, latest)
            result = {"epoch": epoch, "train": {**train_metrics}}
            results.append({**result, "validation": {**eval_metrics}} if eval_metrics else result)
        if lr_scheduler is not None:
            lr_scheduler.step(epoch + 1, metric=latest)
    return results


def _start_epoch(args: argparse.Namespace, parts: Parts, epoch: int) -> None:
    trained_module(parts.task).train()
    is_dropping = (epoch < parts.num_epochs / 2) is (args.drop_path_schedule == "early")
    for module, rate in parts.drop_rates.items():  # which is read anew in each forward
        module.drop_prob = rate if is_dropping else 0.0
    parts.optimizer.zero_grad()
    loader = parts.data.train
    samplers = [s for s in (loader.batch_sampler, loader.sampler) if hasattr(s, "set_epoch")]
    for part in (loader.dataset, *samplers[:1]):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
    if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
        if args.prefetcher and getattr(loader, "mixup_enabled", False):
            loader.mixup_enabled = False
        elif parts.data.mixup_fn is not None:
            parts.data.mixup_fn.mixup_enabled = False


def _distribute_statistics(args: argparse.Namespace, module: torch.nn.Module) -> None:
    if args.distributed and args.dist_bn in ("broadcast", "reduce"):
        utils.distribute_bn(module, args.world_size, args.dist_bn == "reduce")


def _validate(
    args: argparse.Namespace, parts: Parts, display: Display, epoch: int
) -> dict[str, float] | None:
    """Metrics of the validation set, those of the moving average where there is one.

    Raises:
        Stopped: the run was asked to stop.
        TrainingError: the loss is not a finite number.
    """
    task, loader = parts.task, parts.data.eval
    if loader is None:
        return None
    run = partial(evaluate, args, task, loader, parts.device, parts.dtype, parts.autocast)
    metrics = run(evaluated_module(task), display, parts.stop)
    if task.has_ema() and not args.model_ema_force_cpu:
        _distribute_statistics(args, trained_module(task, ema=True))
        metrics = run(evaluated_module(task, ema=True), display, parts.stop, " (EMA)")
    if not math.isfinite(metrics["loss"]):
        raise TrainingError(
            f"the validation loss is {metrics['loss']} after epoch {epoch}: training stops, and "
            "nothing of this epoch is saved; try a lower --lr or --clip-grad 1.0"
        )
    return metrics


def _tell_results(outputs: Outputs, results: list[dict], metric: str) -> None:
    saver = outputs.saver
    if saver.best_metric is not None:
        best = f"{saver.best_metric:.{4 if metric == 'loss' else 2}f}"
        _logger.info(f"*** Best metric: {best} (epoch {saver.best_epoch})")
    _logger.info(f"Outputs are in {outputs.folder}")

    def merit(result: dict) -> float:
        value = result.get("validation", result["train"]).get(metric, 0)
        return -math.inf if math.isnan(value) else -value if metric == "loss" else value

    print(f"--result\n{json.dumps(sorted(results, key=merit)[-10:], indent=4)}")
