"""The model, its numeric precision, its loss and its task, all from timm's factories."""

from __future__ import annotations

import argparse
import logging
import re
from contextlib import suppress
from functools import partial

import timm
import torch
from timm import utils
from timm.data import resolve_data_config
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.loss import (
    BinaryCrossEntropy,
    JsdCrossEntropy,
    LabelSmoothingCrossEntropy,
    SoftTargetCrossEntropy,
)
from timm.models import safe_model_name
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import nn

from timm_rdp.errors import UsageError
from timm_rdp.training.checkpoint import check_pretrained, load_initial_weights
from timm_rdp.training.img_size import img_size_kwargs

_logger = logging.getLogger(__name__)

# What a model constructor that does not know a keyword calls it, and the flag that it came from.
_FLAGS = {
    "drop_rate": "--drop",
    "drop_path_rate": "--drop-path",
    "drop_block_rate": "--drop-block",
    "global_pool": "--gp",
    "bn_momentum": "--bn-momentum",
    "bn_eps": "--bn-eps",
    "in_chans": "--in-chans",
    "img_size": "--img-size",
}


def setup_precision(args: argparse.Namespace, device: torch.device) -> tuple:
    """The model's dtype (None: float32), the autocast context and the loss scaler (or None)."""
    model_dtype = getattr(torch, args.model_dtype) if args.model_dtype else None
    if model_dtype == torch.float16:
        _logger.warning("--model-dtype float16 rarely trains well; bfloat16 is the safer half.")
    if not args.amp:
        return model_dtype, suppress, None
    if model_dtype not in (None, torch.float32):
        raise UsageError(
            f"--amp keeps the weights in float32, but --model-dtype is {args.model_dtype}: "
            "drop one of the two"
        )
    amp_dtype = getattr(torch, args.amp_dtype)
    autocast = partial(torch.autocast, device_type=device.type, dtype=amp_dtype)
    # bfloat16 has float32's range: nothing underflows, nothing needs scaling.
    scaled = device.type == "cuda" and amp_dtype == torch.float16
    return model_dtype, autocast, utils.NativeScaler(device=device.type) if scaled else None


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
    model = _create(args)
    if args.pretrained_path:
        check_pretrained(model, args.pretrained_path, args.model)
    if args.initial_checkpoint:
        load_initial_weights(model, args.initial_checkpoint, args.model)
    _init_head(model, args)
    if args.num_classes is None:
        if not hasattr(model, "num_classes"):
            raise UsageError(f"--model {args.model} has no class count of its own: --num-classes N")
        args.num_classes = model.num_classes
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing(enable=True)
        except (AttributeError, AssertionError) as error:
            raise UsageError(
                f"--grad-checkpointing: {args.model} does not support it; leave the flag out"
            ) from error

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
    kwargs = dict(args.model_kwargs)
    kwargs.update(img_size_kwargs(args))
    if args.pretrained_path:
        # num_classes=-1 has timm fit the classifier to ours instead of loading the file's
        kwargs["pretrained_cfg_overlay"] = dict(file=args.pretrained_path, num_classes=-1)
    try:
        return timm.create_model(
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
    except Exception as error:
        raise UsageError(_explain(args, error)) from error


def _explain(args: argparse.Namespace, error: Exception) -> str:
    """One line for a model that timm refuses to build: what does not fit, and the way out."""
    keyword = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if keyword is None:
        text = " ".join(str(error).split()) or type(error).__name__
        if args.pretrained_path and "state_dict" in text:
            return f"--pretrained-path {args.pretrained_path}: does not fit {args.model}: {text}"
        return f"--model {args.model} cannot be created with these options: {text}"
    name = keyword.group(1)
    if name == "drop_path_rate":
        fix = (
            "choose a model with stochastic depth for --rdp, e.g. vit_small_patch16_224 or resnet50"
            if args.rdp
            else "leave --drop-path out or choose another --model"
        )
        return f"--model {args.model} takes no drop_path_rate (it has no stochastic depth): {fix}"
    flag = _FLAGS.get(name, f"--model-kwargs {name}=...")
    return f"--model {args.model} takes no {name}: leave {flag} out or choose another --model"


def _init_head(model: nn.Module, args: argparse.Namespace) -> None:
    if args.head_init_scale is None and args.head_init_bias is None:
        return
    head = model.get_classifier()
    if getattr(head, "weight", None) is None or getattr(head, "bias", None) is None:
        raise UsageError(
            f"--head-init-scale and --head-init-bias need one linear classifier with a bias; "
            f"{args.model} has none: leave them out"
        )
    if args.head_init_scale is not None:
        with torch.no_grad():
            head.weight.mul_(args.head_init_scale)
            head.bias.mul_(args.head_init_scale)
    if args.head_init_bias is not None:
        nn.init.constant_(head.bias, args.head_init_bias)


def build_losses(
    args: argparse.Namespace, device: torch.device, mixup_active: bool
) -> tuple[nn.Module, nn.Module]:
    """The training and the validation loss."""
    bce = dict(
        target_threshold=args.bce_target_thresh,
        sum_classes=args.bce_sum,
        pos_weight=args.bce_pos_weight,
    )
    if args.jsd_loss:
        train_loss = JsdCrossEntropy(num_splits=args.aug_splits, smoothing=args.smoothing)
    elif mixup_active:  # mixup smooths the targets itself
        train_loss = BinaryCrossEntropy(**bce) if args.bce_loss else SoftTargetCrossEntropy()
    elif args.smoothing and args.bce_loss:
        train_loss = BinaryCrossEntropy(smoothing=args.smoothing, **bce)
    elif args.smoothing:
        train_loss = LabelSmoothingCrossEntropy(smoothing=args.smoothing)
    else:
        train_loss = nn.CrossEntropyLoss()
    return train_loss.to(device=device), nn.CrossEntropyLoss().to(device=device)


def build_task(
    args: argparse.Namespace,
    model: nn.Module,
    train_loss: nn.Module,
    device: torch.device,
    model_dtype: torch.dtype | None,
) -> TrainingTask:
    """timm's task: the model with its loss, and with a teacher where one was asked for.

    Raises:
        UsageError: the teacher cannot be created, or does not fit the student.
    """
    common = dict(
        criterion=train_loss, device=device, dtype=model_dtype, verbose=utils.is_primary(args)
    )
    if args.kd_model_name is None:
        return ClassificationTask(model=model, **common)
    common.update(
        student_model=model,
        teacher_model=args.kd_model_name,
        distill_loss_weight=args.distill_loss_weight,
        task_loss_weight=args.task_loss_weight,
    )
    try:
        if args.kd_distill_type == "logit":
            return LogitDistillationTask(
                loss_type=args.kd_loss_type, temperature=args.kd_temperature, **common
            )
        if args.kd_distill_type == "feature":
            return FeatureDistillationTask(
                student_feature_dim=args.kd_student_feature_dim,
                teacher_feature_dim=args.kd_teacher_feature_dim,
                **common,
            )
        return TokenDistillationTask(
            distill_type=args.kd_token_distill_type, temperature=args.kd_temperature, **common
        )
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"--kd-model-name {args.kd_model_name} ({args.kd_distill_type} distillation into "
            f"{args.model}): {text}"
        ) from error
