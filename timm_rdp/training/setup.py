"""Everything that a run consists of, built in timm's order."""

import argparse
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from timm import task as tasks
from timm import utils
from timm.layers import DropPath, set_fast_norm
from timm.loss import create_classification_loss, load_class_stats, resolve_class_weights
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch import nn

from timm_rdp import ResidualDropPath, from_args
from timm_rdp.errors import UsageError, refused_with
from timm_rdp.training.batches import DataStream, ResumableSampler, make_resumable
from timm_rdp.training.checkpoint import check_weights_files, find_newest, resume
from timm_rdp.training.data import Data, create_data
from timm_rdp.training.dataset import check_data
from timm_rdp.training.loop import try_batch
from timm_rdp.training.model import (
    build_model,
    eval_metric,
    evaluated_module,
    example_input,
    mixup_active,
    setup_precision,
    trained_module,
)
from timm_rdp.training.resume import StopSignals

_logger = logging.getLogger("timm_rdp.training")


class Parts(NamedTuple):
    """What a run consists of once it is set up."""

    device: torch.device
    dtype: torch.dtype | None
    autocast: Callable
    loss_scaler: Any
    task: tasks.TrainingTask
    data: Data
    data_config: dict[str, Any]
    updates_per_epoch: int  # optimizer steps on one batch or group of batches each
    eval_metric: str  # what the best checkpoint is best in
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    last_epoch: int  # that is trained, counted from 1
    num_epochs: int  # of the schedule
    drop_rates: dict[DropPath, float]  # of the DropPaths, where --drop-path-schedule varies them
    rdp: ResidualDropPath | None
    stop: StopSignals
    stream: DataStream | None  # of --data-seed
    sampler: ResumableSampler | None  # of the training loader
    checkpoint: dict[str, Any]  # that the run continues; {} for a new one
    resume_epoch: int | None


def set_up(args: argparse.Namespace) -> Parts:
    """Build everything that a run consists of.

    Raises:
        UsageError: model, data or checkpoint do not fit the options; nothing was written.
    """
    check_data(args)
    with refused_with(f"--loss {args.loss}" if args.loss else "the loss"):
        loss = create_loss(args)
    check_weights_files(args)
    device = _set_up_device(args)
    find_newest(args)

    # The order of what draws random numbers from here on is timm's: model, data, task, epochs.
    utils.random_seed(args.seed, args.rank)
    dtype, autocast, loss_scaler = setup_precision(args, device)
    model, data_config = build_model(args, device, dtype)
    data = create_data(args, data_config, model, device, dtype)
    _check_tta(args, data)
    _set_learning_rate(args, data.batch_size_reference)
    task = build_task(args, model, loss, device, dtype)
    if not args.resume:
        try_batch(args, task, data, data_config["input_size"], device, dtype, autocast)
    drop_rates = _scheduled_rates(args, evaluated_module(task))
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
            tasks.load_task_ema_checkpoint(task, args.resume)
    _compile_and_distribute(args, task, rdp, device)

    stream = None if args.data_seed is None else DataStream(args.data_seed, args.rank, device)
    sampler = make_resumable(data.train)
    metric = eval_metric(args) if data.eval is not None else "loss"
    updates_per_epoch = -(-len(data.train) // args.grad_accum_steps)
    schedule: dict[str, Any] = scheduler_kwargs(args, decreasing_metric=metric == "loss")
    with refused_with(f"--sched {args.sched}"):
        lr_scheduler, num_epochs = create_scheduler_v2(
            optimizer, **schedule, updates_per_epoch=updates_per_epoch
        )
    last_epoch = num_epochs if args.stop_epoch is None else args.stop_epoch
    if not 1 <= last_epoch <= num_epochs and args.stop_epoch is not None:
        raise UsageError(
            f"--stop-epoch {last_epoch} must be between 1 and {num_epochs}, the schedule's epochs"
        )
    return Parts(
        device, dtype, autocast, loss_scaler, task, data, data_config, updates_per_epoch,
        metric, optimizer, lr_scheduler, last_epoch, num_epochs, drop_rates, rdp,
        StopSignals(args.distributed), stream, sampler, checkpoint, resume_epoch,
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


def _check_tta(args: argparse.Namespace, data: Data) -> None:
    """Refuse validation batches that `--tta` cannot average over."""
    if args.tta < 2 or data.eval is None:
        return
    batch = args.validation_batch_size or args.batch_size
    images = len(data.eval.dataset)
    if batch % args.tta or images % args.tta:
        raise UsageError(
            f"--tta {args.tta} averages that many validation samples in a row: the validation "
            f"batch size ({batch}) and the number of samples ({images}) must be multiples of it"
        )


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


def create_loss(args: argparse.Namespace) -> nn.Module:
    """The training loss by timm's factory; validation takes that of the task's evaluator.

    Raises:
        ValueError, OSError: timm's, for options that do not fit each other and for missing files.
    """
    stats = load_class_stats(args.class_stats)
    weigh = partial(
        resolve_class_weights,
        class_stats=stats,
        power=args.loss_weight_power,
        beta=args.loss_weight_beta,
        max_weight=args.loss_weight_max,
    )
    own = {k: v for k, v in vars(args).items() if k.startswith((f"{args.loss}_", "bce_t", "bce_s"))}
    if args.loss == "jsd":
        own = dict(jsd_splits=args.aug_splits)
    elif args.loss == "db" and stats is not None:
        own |= dict(class_counts=stats[0], num_samples=stats[1])
    for former in ("bce_loss", "jsd_loss", "bce_pos_weight"):
        own.pop(former, None)
    return create_classification_loss(
        args.loss,
        multi_label=args.task == "multilabel",
        smoothing=args.smoothing,
        soft_targets=mixup_active(args),  # which mixup smooths itself
        class_weight=weigh(args.loss_class_weight, "class_weight"),
        pos_weight=weigh(args.loss_pos_weight, "pos_weight"),
        **own,
    )


def build_task(
    args: argparse.Namespace,
    model: nn.Module,
    loss: nn.Module,
    device: torch.device,
    model_dtype: torch.dtype | None,
) -> tasks.TrainingTask:
    """timm's task: the model with its loss, and with a teacher where one was asked for.

    Raises:
        UsageError: the loss' weights or the teacher do not fit the model, or it cannot be created.
    """
    for name, values in loss.named_buffers():
        if values.numel() not in (1, args.num_classes):
            raise UsageError(
                f"--loss {args.loss}: its {name} has {values.numel()} entries but the model has "
                f"{args.num_classes} classes"
            )
    common: dict[str, Any] = dict(
        criterion=loss, device=device, dtype=model_dtype, verbose=utils.is_primary(args)
    )
    if args.task == "multilabel":
        with refused_with(f"--multilabel-threshold {args.multilabel_threshold}"):
            return tasks.MultiLabelClassificationTask(
                model, threshold=args.multilabel_threshold, **common
            )
    if args.kd_model_name is None:
        return tasks.ClassificationTask(model, **common)
    common |= dict(
        student_model=model,
        teacher_model=args.kd_model_name,
        distill_loss_weight=args.distill_loss_weight,
        task_loss_weight=args.task_loss_weight,
    )
    kind = args.kd_distill_type
    with refused_with(f"--kd-model-name {args.kd_model_name} ({kind} distillation)"):
        if kind == "logit":
            return tasks.LogitDistillationTask(
                loss_type=args.kd_loss_type, temperature=args.kd_temperature, **common
            )
        if kind == "feature":
            return tasks.FeatureDistillationTask(
                student_feature_dim=args.kd_student_feature_dim,
                teacher_feature_dim=args.kd_teacher_feature_dim,
                **common,
            )
        return tasks.TokenDistillationTask(
            distill_type=args.kd_token_distill_type, temperature=args.kd_temperature, **common
        )


def _scheduled_rates(args: argparse.Namespace, model: nn.Module) -> dict[DropPath, float]:
    if args.drop_path_schedule == "constant":
        return {}
    rates = {m: float(m.drop_prob) for m in model.modules() if isinstance(m, DropPath)}
    if not any(rates.values()):
        raise UsageError(
            f"--drop-path-schedule {args.drop_path_schedule}: {args.model} drops no path; give "
            "--drop-path 0.1"
        )
    return rates


def _patch_model(
    args: argparse.Namespace, task: tasks.TrainingTask, data_config: dict[str, Any]
) -> ResidualDropPath | None:
    if not (args.rdp or args.skip_dropped):
        return None
    example = example_input(args, data_config["input_size"], evaluated_module(task))
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


def _create_optimizer(args: argparse.Namespace, task: tasks.TrainingTask) -> torch.optim.Optimizer:
    with refused_with(f"--opt {args.opt} cannot be created with these options"):
        optimizer = create_optimizer_v2(
            trained_module(task), **optimizer_kwargs(cfg=args), **args.opt_kwargs
        )
    if utils.is_primary(args):
        # That of the weights is in their groups, not among the defaults.
        defaults = {**optimizer.defaults, "weight_decay": args.weight_decay}
        listed = ", ".join(f"{k}: {v}" for k, v in defaults.items())
        _logger.info(f"Created {type(optimizer).__name__} ({args.opt}) optimizer: {listed}")
    return optimizer


def _compile_and_distribute(
    args: argparse.Namespace,
    task: tasks.TrainingTask,
    rdp: ResidualDropPath | None,
    device: torch.device,
) -> None:
    if args.torchcompile:
        how = {"backend": args.torchcompile, "mode": args.torchcompile_mode}
        mode = f" --torchcompile-mode {args.torchcompile_mode}" if args.torchcompile_mode else ""
        with refused_with(f"--torchcompile {args.torchcompile}{mode}"):
            task.compile(**how) if rdp is None else rdp.compile(**how)
        if task.has_ema():
            task.compile_ema(**how)
    if args.distributed:
        devices = None if device.type == "cpu" else [device]
        task.prepare_distributed(device_ids=devices, broadcast_buffers=not args.no_ddp_bb)
    if rdp is not None and trained_module(task) is not rdp.model:
        rdp.follow(trained_module(task))
