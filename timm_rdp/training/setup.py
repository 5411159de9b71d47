"""Everything that a run consists of, built in timm's order."""

import argparse
import copy
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm import utils
from timm.layers import set_fast_norm
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import TrainingTask

from timm_rdp import ResidualDropPath, from_args
from timm_rdp.errors import refused_with
from timm_rdp.training.batches import DataStream
from timm_rdp.training.checkpoint import (
    check_checkpoints,
    check_same_choice,
    find_newest,
    load_ema,
    resume,
)
from timm_rdp.training.checks import check_limits, check_tta
from timm_rdp.training.data import Data, check_data, create_data
from timm_rdp.training.inputs import example_input
from timm_rdp.training.interrupt import StopSignals
from timm_rdp.training.model import (
    build_loss,
    build_model,
    build_task,
    evaluated_module,
    setup_precision,
    trained_module,
)
from timm_rdp.training.resume import ResumableSampler, make_resumable

_logger = logging.getLogger("timm_rdp.training")


class Parts(NamedTuple):
    """What a run consists of once it is set up."""

    device: torch.device
    dtype: torch.dtype | None
    autocast: Callable
    loss_scaler: Any
    task: TrainingTask
    data: Data
    data_config: dict[str, Any]
    accumulate: int  # batches per update
    eval_metric: str  # what the best checkpoint is best in
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    num_epochs: int
    rdp: ResidualDropPath | None
    stop: StopSignals
    stream: DataStream | None  # of --data-seed
    samplers: tuple[ResumableSampler | None, ResumableSampler | None]  # training, validation
    checkpoint: dict[str, Any]  # that the run continues; {} for a new one
    resume_epoch: int | None

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps on one batch or group of batches each."""
        return -(-len(self.data.train) // self.accumulate)


def set_up(args: argparse.Namespace) -> Parts:
    """Build everything that a run consists of.

    Raises:
        UsageError: model, data or checkpoint do not fit the options; nothing was written.
    """
    check_limits(args)
    check_data(args)
    automatic = args.resume == "auto"
    find_newest(args)
    check_checkpoints(args)
    device = _set_up_device(args)
    if automatic:
        check_same_choice(args)

    # The order of what draws random numbers from here on is timm's: model, data, task, epochs.
    utils.random_seed(args.seed, args.rank)
    dtype, autocast, loss_scaler = setup_precision(args, device)
    model, data_config = build_model(args, device, dtype)
    data = create_data(args, data_config, model, device, dtype)
    check_tta(args, data)
    _set_learning_rate(args, data.batch_size_reference)
    train_loss = build_loss(args, device, data.mixup_active)
    task = build_task(args, model, train_loss, device, dtype)
    rdp = _patch_model(args, task, data_config)
    optimizer = _create_optimizer(args, task)

    # Weights are loaded before the moving average copies them and before anything wraps them.
    checkpoint, resume_epoch = {}, None
    if args.resume:
        checkpoint, resume_epoch = resume(args, task, optimizer, loss_scaler, rdp)
    if args.model_ema:
        ema_device = torch.device("cpu") if args.model_ema_force_cpu else None
        task.setup_ema(args.model_ema_decay, args.model_ema_warmup, ema_device)
        if args.resume:
            load_ema(args, task, checkpoint)
    _compile_and_distribute(args, task, rdp, device)

    stream = None if args.data_seed is None else DataStream(args.data_seed, args.rank, device)
    samplers = (make_resumable(data.train), make_resumable(data.eval, is_continued=False))
    eval_metric = args.eval_metric if data.eval is not None else "loss"
    schedule: dict[str, Any] = scheduler_kwargs(args, decreasing_metric=eval_metric == "loss")
    lr_scheduler, num_epochs = create_scheduler_v2(
        optimizer,
        **schedule,
        updates_per_epoch=-(-len(data.train) // args.grad_accum_steps),
    )
    return Parts(
        device, dtype, autocast, loss_scaler, task, data, data_config, args.grad_accum_steps,
        eval_metric, optimizer, lr_scheduler, num_epochs, rdp, StopSignals(args.distributed),
        stream, samplers, checkpoint, resume_epoch,
    )  # fmt: skip


def _set_up_device(args: argparse.Namespace) -> torch.device:
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
    _logger.info(
        f"Process {args.rank} of {args.world_size}, one device each ({args.device})."
        if args.distributed
        else f"Training with a single process on 1 device ({args.device})."
    )
    return device


def _set_learning_rate(args: argparse.Namespace, batch_size: float) -> None:
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


def _patch_model(
    args: argparse.Namespace, task: TrainingTask, data_config: dict[str, Any]
) -> ResidualDropPath | None:
    if not (args.rdp or args.skip_dropped):
        return None
    example = example_input(args, data_config, evaluated_module(task))
    with refused_with(f"{'--rdp' if args.rdp else '--skip-dropped'} --model {args.model}"):
        rdp = from_args(trained_module(task), args, example_input=example)
    if rdp is not None and utils.is_primary(args):
        expected = sum(path.drop_prob for path in rdp.paths)
        _logger.info(
            f"ResidualDroppath over {len(rdp.paths)} residual paths, of which {expected:.2f} are "
            f"dropped on average; complement iterations on the {args.rdp_batch} batch; masks from "
            f"seed {rdp.seed}."
        )
    return rdp


def _create_optimizer(args: argparse.Namespace, task: TrainingTask) -> torch.optim.Optimizer:
    with refused_with(f"--opt {args.opt} cannot be created with these options"):
        optimizer = create_optimizer_v2(
            trained_module(task), **optimizer_kwargs(cfg=args), **args.opt_kwargs
        )
    if utils.is_primary(args):
        defaults = copy.deepcopy(optimizer.defaults)
        defaults["weight_decay"] = args.weight_decay  # it is in the groups, not in the defaults
        listed = ", ".join(f"{k}: {v}" for k, v in defaults.items())
        _logger.info(f"Created {type(optimizer).__name__} ({args.opt}) optimizer: {listed}")
    return optimizer


def _compile_and_distribute(
    args: argparse.Namespace,
    task: TrainingTask,
    rdp: ResidualDropPath | None,
    device: torch.device,
) -> None:
    if args.torchcompile:
        with refused_with(f"--torchcompile-mode {args.torchcompile_mode}"):
            task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        if task.has_ema():
            task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    if args.distributed:
        devices = None if device.type == "cpu" else [device]
        task.prepare_distributed(device_ids=devices, broadcast_buffers=not args.no_ddp_bb)
    if rdp is not None and trained_module(task) is not rdp.model:
        rdp.follow(trained_module(task))
