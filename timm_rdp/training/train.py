"""A training run, from the command line to the last checkpoint."""

from __future__ import annotations

import argparse
import copy
import json
import logging
import logging.handlers
import math
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from timm import utils
from timm.layers import set_fast_norm
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from tqdm.contrib.logging import logging_redirect_tqdm

import timm_rdp
from timm_rdp.errors import TrainingError, UsageError
from timm_rdp.training.checkpoint import (
    Saver,
    check_checkpoints,
    check_same_choice,
    find_newest,
    load_ema,
    restore_history,
    resume,
)
from timm_rdp.training.data import check_data, close_data, create_data
from timm_rdp.training.evaluate import evaluate
from timm_rdp.training.inputs import example_input
from timm_rdp.training.interrupt import Interruption, Stopped
from timm_rdp.training.limits import check_limits, check_tta
from timm_rdp.training.loop import (
    Run,
    check_weights,
    save_recovery,
    train_one_epoch,
    update_sizes,
)
from timm_rdp.training.model import build_losses, build_model, build_task, setup_precision
from timm_rdp.training.options import args_text, parse_args
from timm_rdp.training.outputs import (
    Curves,
    Summary,
    create_output,
    experiment_name,
    start_wandb,
)
from timm_rdp.training.position import (
    make_resumable,
    restore_plateau,
    restore_position,
    state_of_rank,
    state_of_run,
)
from timm_rdp.training.progress import Progress, mean_lr
from timm_rdp.training.randomness import DataStream

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
            run = set_up(parse_args(argv))
        return fit(run)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def set_up(args: argparse.Namespace) -> Run:
    """Build everything that a run consists of; its folder comes last.

    Raises:
        UsageError: model, data or checkpoint do not fit the options; nothing was written.
    """
    text = args_text(args)
    check_limits(args)
    check_data(args)
    automatic = args.resume == "auto"
    find_newest(args)
    check_checkpoints(args)
    device = _setup_device(args)
    if automatic:
        check_same_choice(args)

    # The order of what draws random numbers from here on is timm's: model, data, task, epochs.
    utils.random_seed(args.seed, args.rank)
    model_dtype, autocast, loss_scaler = setup_precision(args, device)
    model, data_config = build_model(args, device, model_dtype)
    data = create_data(args, data_config, model, device, model_dtype)
    check_tta(args, data)
    _settle_learning_rate(args, data.batch_size_reference)
    train_loss, eval_loss = build_losses(args, device, data.mixup_active)
    task = build_task(args, model, train_loss, device, model_dtype)
    rdp = _build_rdp(args, task, data_config)
    optimizer = _build_optimizer(args, task)

    checkpoint, resume_epoch = {}, None
    if args.resume:
        checkpoint, resume_epoch = resume(args, task, optimizer, loss_scaler, rdp)
    if args.model_ema:
        task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device="cpu" if args.model_ema_force_cpu else None,
        )
        if args.resume:
            load_ema(args, task, checkpoint)
    _wrap(args, task, rdp, device)

    run = Run(
        args,
        device,
        model_dtype,
        autocast,
        loss_scaler,
        task,
        eval_loss,
        data,
        optimizer,
        rdp,
        Interruption(args.distributed),
    )
    if args.data_seed is not None:
        run.data_stream = DataStream(args.data_seed, args.rank, device)
    run.train_sampler = make_resumable(data.train)
    run.eval_sampler = make_resumable(data.eval, is_continued=False)
    run.lr_scheduler, run.num_epochs = create_scheduler_v2(
        optimizer,
        **scheduler_kwargs(args, decreasing_metric=_eval_metric(run) == "loss"),
        updates_per_epoch=run.updates_per_epoch,
    )
    if args.rdp and args.rdp_start_epoch >= run.num_epochs and utils.is_primary(args):
        _logger.warning(
            f"--rdp-start-epoch {args.rdp_start_epoch}: the run has {run.num_epochs} epochs, so "
            "that ResidualDroppath never begins."
        )
    run.first_epoch = next((e for e in (args.start_epoch, resume_epoch) if e is not None), 0)
    _continue_at(run, checkpoint)
    run.progress = Progress(args)
    if utils.is_primary(args):
        _open_outputs(run, experiment_name(args, data_config), text, checkpoint, automatic)
        if args.resume:
            within = f", update {run.updates_done}" if run.resumed_losses else ""
            _logger.info(
                f"Continuing {args.resume} at epoch {run.first_epoch}/{run.num_epochs}{within}."
            )
    return run


def fit(run: Run) -> int:
    """Train from the run's first epoch to its last.

    Returns:
        exit status: 0, or 128 and the signal's number where a signal stopped the run

    Raises:
        TrainingError: the run cannot go on; the checkpoints from before are kept.
    """
    status = 0
    try:
        with (
            run.interruption.handling(),
            logging_redirect_tqdm() if run.progress.is_bar else nullcontext(),
        ):
            _epochs(run)
            run.interruption.close()
    except Stopped as stopped:
        run.interruption.close()
        status = 128 + stopped.signum
        if utils.is_primary(run.args):
            _logger.info(
                f"{stopped} in epoch {run.epoch}, after {run.updates_done} updates: continue with "
                f"--resume {run.saver.curr_recovery_file}"
            )
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            what = str(error).splitlines()[0]
        elif missing := run.interruption.missing_ranks(error):
            what = f"rank {missing} of {run.args.world_size} no longer answers"
        else:
            raise
        raise TrainingError(
            f"{what} in epoch {run.epoch}, update {run.update}: training stops; the checkpoints "
            "from before are intact, continue with --resume auto"
        ) from error
    finally:
        run.progress.close()
        close_data(run.data)
    if run.args.distributed:
        torch.distributed.destroy_process_group()
    if status == 0:
        _closing_summary(run)
    return status


@contextmanager
def _log_held_back() -> Iterator[None]:
    """Log nothing until the set-up is through: options that are refused are told in one line."""
    handlers = logging.root.handlers[:]
    held = logging.handlers.MemoryHandler(sys.maxsize, flushLevel=sys.maxsize)
    logging.root.handlers[:] = [held]
    refused = False
    try:
        yield
    except UsageError:
        refused = True
        raise
    finally:
        logging.root.handlers[:] = handlers
        for record in [] if refused else held.buffer:
            logging.root.handle(record)


def _epochs(run: Run) -> None:
    args, data, task = run.args, run.data, run.task
    reduce_bn = args.distributed and args.dist_bn in ("broadcast", "reduce")
    for epoch in range(run.first_epoch, run.num_epochs):
        run.epoch, after = epoch, epoch + 1
        _set_loader_epoch(data.train, epoch)
        train_metrics, rdp_metrics = train_one_epoch(run)
        if reduce_bn:
            utils.distribute_bn(
                task.get_trainable_module(), args.world_size, args.dist_bn == "reduce"
            )
        if after % args.val_interval and after != run.num_epochs:
            if run.lr_scheduler is not None:
                run.lr_scheduler.step(after, metric=None)
            continue

        check_weights(run)
        eval_metrics = None
        if data.eval is not None:
            mine = state_of_rank(run, run.losses)
            try:
                eval_metrics = evaluate(run, task.get_eval_model())
                if task.has_ema() and not args.model_ema_force_cpu:
                    ema = task.get_trainable_module(ema=True)
                    if reduce_bn:
                        utils.distribute_bn(ema, args.world_size, args.dist_bn == "reduce")
                    eval_metrics = evaluate(run, task.get_eval_model(ema=True), " (EMA)")
            except Stopped:
                save_recovery(run, mine)
                raise
            if not math.isfinite(eval_metrics["loss"]):
                raise TrainingError(
                    f"the validation loss is {eval_metrics['loss']} after epoch {epoch}: training "
                    "stops, and nothing of this epoch is saved; try a lower --lr or --clip-grad 1.0"
                )
        metric = _eval_metric(run)
        latest = (train_metrics if eval_metrics is None else eval_metrics)[metric]

        run.progress.end_epoch(run, train_metrics, rdp_metrics, eval_metrics)
        run.state = state_of_run(run, state_of_rank(run), updates=None)
        if run.saver is not None:
            row = run.summary.add(epoch, train_metrics, eval_metrics, mean_lr(run), rdp_metrics)
            if run.wandb is not None:
                run.wandb.log(row)
            drawn = run.curves.update(run.summary.rows, last=after == run.num_epochs)
            if not drawn and epoch == run.first_epoch:
                _logger.info("No curves.png: matplotlib is not installed (pip install matplotlib).")
            run.saver.save_checkpoint(epoch, metric=latest)
        if run.lr_scheduler is not None:
            run.lr_scheduler.step(after, latest)
        result = {"epoch": epoch, "train": {**train_metrics}}
        if eval_metrics is not None:
            result["validation"] = {**eval_metrics}
        run.results.append(result)


def _setup_device(args: argparse.Namespace) -> torch.device:
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    args.prefetcher = not args.no_prefetcher
    args.grad_accum_steps = max(1, args.grad_accum_steps)
    device = utils.init_distributed_device(args)
    if args.fuser:
        utils.set_jit_fuser(args.fuser)
    if args.fast_norm:
        set_fast_norm()
    if args.distributed:
        _logger.info(f"Process {args.rank} of {args.world_size}, one device each ({args.device}).")
    else:
        _logger.info(f"Training with a single process on 1 device ({args.device}).")
    return device


def _settle_learning_rate(args: argparse.Namespace, batch_size: float) -> None:
    """Scale `--lr-base` to the batch where `--lr` was not given."""
    if args.lr:
        return
    total = batch_size * args.world_size * args.grad_accum_steps
    ratio = total / args.lr_base_size
    if not args.lr_base_scale:
        adaptive = any(o in args.opt.lower() for o in ("ada", "lamb"))
        args.lr_base_scale = "sqrt" if adaptive else "linear"
    if args.lr_base_scale == "sqrt":
        ratio = ratio**0.5
    args.lr = args.lr_base * ratio
    if utils.is_primary(args):
        _logger.info(
            f"Learning rate {args.lr}: --lr-base {args.lr_base} for a batch of "
            f"{args.lr_base_size}, {args.lr_base_scale} scaling to {total:g}."
        )


def _build_rdp(
    args: argparse.Namespace, task: Any, data_config: dict
) -> timm_rdp.ResidualDropPath | None:
    if not (args.rdp or args.skip_dropped):
        return None
    example = example_input(args, data_config, task.get_eval_model())
    try:
        rdp = timm_rdp.from_args(task.get_trainable_module(), args, example_input=example)
    except ValueError as error:
        option = "--rdp" if args.rdp else "--skip-dropped"
        raise UsageError(f"{option} --model {args.model}: {error}") from error
    if rdp is not None and utils.is_primary(args):
        expected = sum(path.drop_prob for path in rdp.paths)
        _logger.info(
            f"ResidualDroppath over {len(rdp.paths)} residual paths, of which {expected:.2f} are "
            f"dropped in the mean; complement iterations on the {args.rdp_batch} batch; masks from "
            f"seed {rdp.seed}."
        )
    return rdp


def _build_optimizer(args: argparse.Namespace, task: Any) -> torch.optim.Optimizer:
    try:
        optimizer = create_optimizer_v2(
            task.get_trainable_module(), **optimizer_kwargs(cfg=args), **args.opt_kwargs
        )
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"--opt {args.opt} cannot be created with these options: {text}"
        ) from error
    if utils.is_primary(args):
        defaults = copy.deepcopy(optimizer.defaults)
        defaults["weight_decay"] = args.weight_decay  # it is in the groups, not in the defaults
        listed = ", ".join(f"{k}: {v}" for k, v in defaults.items())
        _logger.info(f"Created {type(optimizer).__name__} ({args.opt}) optimizer: {listed}")
    return optimizer


def _wrap(
    args: argparse.Namespace,
    task: Any,
    rdp: timm_rdp.ResidualDropPath | None,
    device: torch.device,
) -> None:
    """Compile and distribute the task, and let RDP know."""
    if args.torchcompile:
        try:
            task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        except RuntimeError as error:
            raise UsageError(f"--torchcompile-mode {args.torchcompile_mode}: {error}") from error
        if task.has_ema():
            task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    if args.distributed:
        devices = None if device.type == "cpu" else [device]
        task.prepare_distributed(device_ids=devices, broadcast_buffers=not args.no_ddp_bb)
    if rdp is not None and task.get_trainable_module() is not rdp.model:
        rdp.follow(task.get_trainable_module())


def _continue_at(run: Run, checkpoint: dict) -> None:
    """Set schedule, random states and position to those of the checkpoint, or to an epoch's."""
    args, state = run.args, checkpoint.get("run")
    # Without its optimizer state, or at an epoch of the user's choice, it is another run.
    exact = bool(state) and not args.no_resume_opt and args.start_epoch is None
    if exact:
        if state["updates"] is not None and run.train_sampler is not None:
            run.first_epoch = checkpoint["epoch"]
        restore_position(run, state, update_sizes)
    if exact and "plateau" in state and hasattr(run.lr_scheduler, "lr_scheduler"):
        restore_plateau(run, checkpoint)
    elif run.lr_scheduler is not None and (run.first_epoch > 0 or run.updates_done > 0):
        if args.sched_on_updates:
            done = run.first_epoch * run.updates_per_epoch + run.updates_done
            run.lr_scheduler.step_update(done)
        else:
            run.lr_scheduler.step(run.first_epoch)
    if utils.is_primary(run.args) and run.lr_scheduler is not None:
        unit = "epoch" if run.lr_scheduler.t_in_epochs else "update"
        _logger.info(f"Scheduled epochs: {run.num_epochs}. LR stepped per {unit}.")


def _open_outputs(run: Run, experiment: str, text: str, checkpoint: dict, automatic: bool) -> None:
    args = run.args
    if args.log_wandb:
        run.wandb = start_wandb(args, experiment)
    run.output_dir = create_output(args, experiment, text)
    run.saver = Saver(
        task=run.task,
        run_state=lambda: _state_of_run(run),
        model=run.task.get_trainable_module(),
        optimizer=run.optimizer,
        args=args,
        amp_scaler=run.loss_scaler,
        checkpoint_dir=run.output_dir,
        recovery_dir=run.output_dir,
        decreasing=_eval_metric(run) == "loss",
        max_history=args.checkpoint_hist,
    )
    if checkpoint:
        restore_history(run.saver, checkpoint, args.resume)
    # What a run left that ended before its first checkpoint is not kept by --resume auto.
    resumed = bool(args.resume) or automatic
    run.summary = Summary(run.output_dir, run.first_epoch, resumed)
    run.curves = Curves(run.output_dir)


def _state_of_run(run: Run) -> dict:
    """What a checkpoint holds beside timm's entries: all that an exact resume needs."""
    state = {} if run.state is None else {"run": run.state}
    return state if run.rdp is None else {**state, "rdp": run.rdp.state_dict()}


def _eval_metric(run: Run) -> str:
    return run.args.eval_metric if run.data.eval is not None else "loss"


def _set_loader_epoch(loader: Any, epoch: int) -> None:
    if hasattr(loader.dataset, "set_epoch"):
        loader.dataset.set_epoch(epoch)
    if hasattr(loader.batch_sampler, "set_epoch"):
        loader.batch_sampler.set_epoch(epoch)
    elif hasattr(loader.sampler, "set_epoch"):
        loader.sampler.set_epoch(epoch)


def _closing_summary(run: Run) -> None:
    if not utils.is_primary(run.args):
        return
    saver, metric = run.saver, _eval_metric(run)
    if saver.best_metric is not None:
        _logger.info(f"*** Best metric: {saver.best_metric} (epoch {saver.best_epoch})")
    _logger.info(f"Outputs are in {run.output_dir}")

    sign = -1 if metric == "loss" else 1

    def merit(result: dict) -> float:
        value = sign * result.get("validation", result["train"]).get(metric, 0)
        return -math.inf if math.isnan(value) else value

    shown = sorted(run.results, key=merit)
    print(f"--result\n{json.dumps(shown[-10:], indent=4)}")
