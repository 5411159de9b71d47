"""The model, its inputs and its numeric precision, from timm's factories."""

import argparse
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
from timm import task as tasks
from timm import utils
from timm.data import resolve_data_config
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.models import get_model_input_config, safe_model_name
from timm.task.evaluator import ClassificationEvaluator, MultiLabelClassificationEvaluator
from torch import Tensor, nn

from timm_rdp.errors import UsageError, nearest, one_line, refused_with
from timm_rdp.training.checkpoint import check_pretrained, load_initial_weights

_logger = logging.getLogger(__name__)

EVALUATORS = {
    "classification": ClassificationEvaluator,
    "multilabel": MultiLabelClassificationEvaluator,
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
    """Create a model with `timm.create_model`.

    Raises:
        UsageError: timm cannot create it; what does not fit, and the way out.
    """
    try:
        return timm.create_model(name, **kwargs)
    except Exception as error:  # whatever a constructor raises for arguments that it cannot take
        text = one_line(error)
        why = f"--model {name} cannot be created: {text}"
        if text.startswith("Unknown model"):
            why = no_such_model(name)
        elif keyword := re.search(r"unexpected keyword argument '(\w+)'", text):
            given = _FLAGS.get(keyword[1], f"--model-kwargs {keyword[1]}=...")
            why = f"--model {name} takes no {keyword[1]}: leave {given} out"
            if keyword[1] == "drop_path_rate":
                why = (
                    f"--model {name} takes no drop_path_rate and so has no paths: choose a model "
                    "with stochastic depth, such as vit_small_patch16_224 or resnet50 (to train "
                    "this one all the same, leave --drop-path out)"
                )
        raise UsageError(why) from error


# The flags that a model constructor may not know.
_FLAGS = {
    **dict(drop_path_rate="--drop-path", drop_rate="--drop", drop_block_rate="--drop-block"),
    **dict(global_pool="--gp", bn_momentum="--bn-momentum", bn_eps="--bn-eps"),
    **dict(in_chans="--in-chans", img_size="--img-size"),
}


def no_such_model(name: str) -> str:
    """Say that timm has no model of this name, and which ones it may have been meant for."""
    close = nearest(name.partition(".")[0], timm.list_models()) or "; timm.list_models() lists them"
    return f"--model {name}: timm has no such model{close}"


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
    given, channels = len(data_config["mean"]), _channels(args)
    data_config["input_size"] = (channels, *data_config["input_size"][1:])
    if given != channels:
        # As in timm's prefetcher.
        for name in ("mean", "std"):
            data_config[name] = (np.mean(data_config[name]).item(),) * channels
        if utils.is_primary(args):
            _logger.warning(
                f"The model's mean and std are of {given} channels, the images have {channels}: "
                "their averages are taken; --mean and --std set others"
            )

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


def _channels(args: argparse.Namespace) -> int:
    return args.in_chans or (args.input_size[0] if args.input_size else 3)


def _create(args: argparse.Namespace) -> nn.Module:
    overlay = {**args.pretrained_cfg_overlay}
    if args.pretrained_path:
        # num_classes=-1 has timm fit the classifier to ours instead of loading the file's
        overlay = dict(file=args.pretrained_path, num_classes=-1) | overlay
    kwargs = {**args.model_kwargs, **img_size_kwargs(args)}
    if overlay:
        kwargs["pretrained_cfg_overlay"] = overlay
    try:
        with refused_with(f"--model {args.model} --model-kwargs"):  # a keyword given twice
            return create_model(
                args.model,
                pretrained=args.pretrained,
                in_chans=_channels(args),
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


def img_size_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Return what to tell `timm.create_model` so that the model takes images of the asked size.

    timm's script sizes only the images, so that a model of fixed input size (ViT, Swin, ...) fails
    at its first batch. Whether a model is of fixed size is asked of the model itself, on torch's
    meta device.

    Args:
        args: the options; img_size, input_size, model and model_kwargs count.

    Returns:
        {"img_size": (height, width)}, or {} where the model needs no telling.
    """
    told = {"img_size", "dynamic_img_size", "strict_img_size"} & set(args.model_kwargs)
    if told or not (args.input_size or args.img_size):
        return {}
    size = tuple(args.input_size[1:]) if args.input_size else (args.img_size, args.img_size)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            own = get_model_input_config(timm.create_model(args.model, **args.model_kwargs))
    except Exception:  # creating the model for good will say what is wrong with it
        return {}
    if not own["fixed_input_size"] or size == tuple(own["input_size"][1:]):
        return {}
    return {"img_size": size}


def example_input(
    args: argparse.Namespace,
    input_size: Sequence[int],
    model: nn.Module,
    side: int | None = None,
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.float32,
) -> Tensor | dict[str, Tensor]:
    """Zeros that the model takes: images (B, C, H, W), or NaFlex's dict of patches.

    Args:
        input_size: C, H, W of the images.
        side: another size of the images or, with --naflex-patch-sizes, of the patches.
    """
    batch = 2 * max(2, args.aug_splits)  # split BatchNorm takes only multiples of its splits
    if not args.naflex_loader:
        height, width = (side, side) if side else input_size[1:]
        return torch.zeros((batch, input_size[0], height, width), dtype=dtype, device=device)

    channels = input_size[0]
    device = "cpu" if device == "meta" else device  # positions have to have values
    height, width = patch_size(model)
    shape: tuple[int, ...] = (height * width * channels,)
    if args.naflex_patch_sizes:  # patches of varying size are not flattened
        edges = [side or args.naflex_patch_sizes[0]] * 2
        first = args.naflex_patchify_channels_first
        shape = (channels, *edges) if first else (*edges, channels)
    length = args.naflex_train_seq_lens[0]
    edge = max(1, int(length**0.5))
    coord = torch.zeros(batch, length, 2, dtype=torch.int64, device=device)
    coord[:, : edge**2] = torch.cartesian_prod(*[torch.arange(edge)] * 2)
    valid = (torch.arange(length, device=device) < edge**2).repeat(batch, 1)
    patches = torch.zeros(batch, length, *shape, dtype=dtype, device=device)
    return {"patches": patches, "patch_coord": coord, "patch_valid": valid}


def patch_size(model: Any) -> tuple[int, int]:
    """Height and width of a model's patches; 16 x 16 as in timm's script where it has none."""
    return model.get_patch_size() if hasattr(model, "get_patch_size") else (16, 16)


def mixup_active(args: argparse.Namespace) -> bool:
    """Whether the options ask for mixup or cutmix."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def eval_metric(args: argparse.Namespace) -> str:
    """What a run's epochs are ranked by: --eval-metric, else the default of its task.

    Raises:
        UsageError: the task has no such metric.
    """
    evaluator = EVALUATORS[args.task]
    if args.eval_metric not in (None, *evaluator.metric_names):
        raise UsageError(
            f"--eval-metric {args.eval_metric} is not measured with --task {args.task}; choose "
            f"from {', '.join(evaluator.metric_names)}"
        )
    return args.eval_metric or evaluator.default_metric


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
