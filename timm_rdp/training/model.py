"""The model, its numeric precision, its loss and its task, all from timm's factories."""

import argparse
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import timm
import torch
from timm import loss as losses
from timm import task as tasks
from timm import utils
from timm.data import resolve_data_config
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.models import safe_model_name
from torch import nn

from timm_rdp.errors import UsageError, nearest, one_line, refused_with
from timm_rdp.training.checkpoint import check_pretrained, load_initial_weights
from timm_rdp.training.inputs import img_size_kwargs

_logger = logging.getLogger(__name__)

# What a model constructor that does not know a keyword calls it, and the flag that it came from.
_FLAGS = {
    "drop_rate": "--drop",
    "drop_block_rate": "--drop-block",
    "global_pool": "--gp",
    "bn_momentum": "--bn-momentum",
    "bn_eps": "--bn-eps",
    "in_chans": "--in-chans",
    "img_size": "--img-size",
}


def setup_precision(
    args: argparse.Namespace, device: torch.device
) -> tuple[torch.dtype | None, Callable[[], Any], utils.NativeScaler | None]:
    """The model's dtype (None: float32), the autocast context and the loss scaler (or None)."""
    model_dtype = getattr(torch, args.model_dtype) if args.model_dtype else None
    if not args.amp:
        return model_dtype, suppress, None
    amp_dtype = getattr(torch, args.amp_dtype)
    autocast = partial(torch.autocast, device_type=device.type, dtype=amp_dtype)
    # bfloat16 has float32's range: nothing underflows, nothing needs scaling.
    scaled = device.type == "cuda" and amp_dtype == torch.float16
    return model_dtype, autocast, utils.NativeScaler(device=device.type) if scaled else None


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """Create a model with timm.

    Args:
        name: of the model.
        kwargs: as those of `timm.create_model`.

    Raises:
        UsageError: timm cannot create it; what does not fit, and the way out.
    """
    try:
        return timm.create_model(name, **kwargs)
    except Exception as error:  # whatever a constructor raises for arguments that it cannot take
        raise UsageError(_explain(name, one_line(error))) from error


def no_such_model(name: str) -> str:
    """Say that timm has no model of this name, and which ones it may have been meant for."""
    close = nearest(name.partition(".")[0], timm.list_models()) or "; timm.list_models() lists them"
    return f"--model {name}: timm has no such model{close}"


def _explain(name: str, text: str) -> str:
    keyword = re.search(r"unexpected keyword argument '(\w+)'", text)
    if keyword is None:
        known = not text.startswith("Unknown model")
        return f"--model {name} cannot be created: {text}" if known else no_such_model(name)
    unknown = keyword.group(1)
    if unknown == "drop_path_rate":
        return (
            f"--model {name} takes no drop_path_rate and so has no paths: choose a model with "
            "stochastic depth, such as vit_small_patch16_224 or resnet50 (to train this one all "
            "the same, leave --drop-path out)"
        )
    flag = _FLAGS.get(unknown, f"--model-kwargs {unknown}=...")
    return f"--model {name} takes no {unknown}: leave {flag} out or choose another --model"


def build_model(
    args: argparse.Namespace, device: torch.device, model_dtype: torch.dtype | None
) -> tuple[nn.Module, dict]:
    """Create the model on its device and settle what its images look like.

    Sets `args.num_classes` to the model's own where it was not given.

    Returns:
        the model and timm's data config (input_size, mean, std, interpolation, crop_pct)

    Raises:
        UsageError: timm cannot build this model with these options.
    """
    model: Any = _create(args)
    if args.pretrained_path:
        check_pretrained(model, args.pretrained_path, args.model)
    if args.initial_checkpoint:
        load_initial_weights(model, args.initial_checkpoint, args.model)
    _init_head(model, args)
    if args.num_classes is None:
        with refused_with(f"--model {args.model} has no class count of its own: --num-classes N"):
            args.num_classes = model.num_classes
    if args.grad_checkpointing:
        with refused_with(f"--grad-checkpointing: not supported by --model {args.model}"):
            model.set_grad_checkpointing(enable=True)

    count = sum(p.numel() for p in model.parameters())
    if utils.is_primary(args):
        _logger.info(f"Model {safe_model_name(args.model)} created, param count:{count}")
    data_config = resolve_data_config(vars(args), model=model, verbose=utils.is_primary(args))

    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    model.to(device=device, dtype=model_dtype)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.distributed and args.sync_bn:
        args.dist_bn = ""  # statistics are already those of the whole world
        model = convert_sync_batchnorm(model)
    if args.torchscript:
        model = torch.jit.script(model)
    return model, data_config


def _create(args: argparse.Namespace) -> nn.Module:
    in_chans = args.in_chans
    if in_chans is None:
        in_chans = args.input_size[0] if args.input_size is not None else 3
    kwargs = {**args.model_kwargs, **img_size_kwargs(args)}
    if args.pretrained_path:
        # num_classes=-1 has timm fit the classifier to ours instead of loading the file's
        kwargs["pretrained_cfg_overlay"] = dict(file=args.pretrained_path, num_classes=-1)
    try:
        with refused_with(f"--model {args.model} --model-kwargs"):  # a keyword given twice
            return create_model(
                args.model,
                pretrained=args.pretrained,
                in_chans=in_chans,
                num_classes=args.num_classes,
                drop_rate=args.drop,
                drop_path_rate=args.drop_path,
                drop_block_rate=args.drop_block,
                global_pool=args.gp,
                bn_momentum=args.bn_momentum,
                bn_eps=args.bn_eps,
                scriptable=args.torchscript,
                **kwargs,
            )
    except UsageError as error:
        if not args.pretrained_path:
            raise
        fit = "does not fit: " if "state_dict" in str(error) else ""
        raise UsageError(f"--pretrained-path {args.pretrained_path}: {fit}{error}") from error


def _init_head(model: Any, args: argparse.Namespace) -> None:
    scale, bias = args.head_init_scale, args.head_init_bias
    if scale is None and bias is None:
        return
    with refused_with(f"--head-init-scale and --head-init-bias with --model {args.model}"):
        head = model.get_classifier()
        if scale is not None:
            with torch.no_grad():
                head.weight.mul_(scale)
                head.bias.mul_(scale)
        if bias is not None:
            nn.init.constant_(head.bias, bias)


def build_loss(args: argparse.Namespace, device: torch.device, mixup_active: bool) -> nn.Module:
    """The training loss; validation takes that of the task's evaluator."""
    bce = partial(
        losses.BinaryCrossEntropy,
        target_threshold=args.bce_target_thresh,
        sum_classes=args.bce_sum,
        pos_weight=args.bce_pos_weight,
    )
    if args.jsd_loss:
        train_loss = losses.JsdCrossEntropy(num_splits=args.aug_splits, smoothing=args.smoothing)
    elif mixup_active:  # mixup smooths the targets itself
        train_loss = bce() if args.bce_loss else losses.SoftTargetCrossEntropy()
    elif args.smoothing:
        smoothed = bce if args.bce_loss else losses.LabelSmoothingCrossEntropy
        train_loss = smoothed(smoothing=args.smoothing)
    else:
        train_loss = nn.CrossEntropyLoss()
    return train_loss.to(device=device)


def build_task(
    args: argparse.Namespace,
    model: nn.Module,
    train_loss: nn.Module,
    device: torch.device,
    model_dtype: torch.dtype | None,
) -> tasks.TrainingTask:
    """timm's task: the model with its loss, and with a teacher where one was asked for.

    Raises:
        UsageError: the teacher cannot be created, or does not fit the student.
    """
    common: dict[str, Any] = dict(
        criterion=train_loss, device=device, dtype=model_dtype, verbose=utils.is_primary(args)
    )
    if args.kd_model_name is None:
        return tasks.ClassificationTask(model=model, **common)
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


def trained_module(task: tasks.TrainingTask, ema: bool = False) -> nn.Module:
    """The module whose parameters the task trains, as it is wrapped, or its moving average."""
    module = task.get_trainable_module(ema=ema)
    assert module is not None
    return module


def evaluated_module(task: tasks.TrainingTask, ema: bool = False) -> nn.Module:
    """The module that validation runs: the network itself."""
    module = task.get_eval_model(ema=ema)
    assert module is not None
    return module
