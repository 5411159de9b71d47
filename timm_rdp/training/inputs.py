"""The inputs of a run's model: its image size, an example of them, and whether it takes them."""

import argparse
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from timm_rdp.errors import refused_with


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
    args: argparse.Namespace, data_config: Mapping, model: nn.Module
) -> Tensor | dict[str, Tensor]:
    """Images (B, C, H, W) without memory behind them, or NaFlex's dict of patches.

    Args:
        args: the options.
        data_config: timm's, for the image size.
        model: asked for its patch size.
    """
    batch = 2 * max(2, args.aug_splits)  # split BatchNorm takes only multiples of its splits
    if not args.naflex_loader:
        return torch.empty((batch, *data_config["input_size"]), device="meta")

    channels = data_config["input_size"][0]
    height, width = patch_size(model)
    shape: tuple[int, ...] = (height * width * channels,)
    if args.naflex_patch_sizes:  # patches of varying size are not flattened
        side = args.naflex_patch_sizes[0]
        first = args.naflex_patchify_channels_first
        shape = (channels, side, side) if first else (side, side, channels)
    length = args.naflex_train_seq_lens[0]
    side = max(1, int(length**0.5))
    coord = torch.zeros(batch, length, 2, dtype=torch.int64)
    coord[:, : side**2] = torch.cartesian_prod(torch.arange(side), torch.arange(side)).view(-1, 2)
    valid = (torch.arange(length) < side**2).repeat(batch, 1)
    patches = torch.zeros(batch, length, *shape)
    return {"patches": patches, "patch_coord": coord, "patch_valid": valid}


def patch_size(model: Any) -> tuple[int, int]:
    """Height and width of a model's patches; 16 x 16 as in timm's script where it has none."""
    return model.get_patch_size() if hasattr(model, "get_patch_size") else (16, 16)


def check_model_takes(args: argparse.Namespace, data_config: Mapping, model: nn.Module) -> None:
    """Try the model on the sizes that the options ask for, before the first epoch does.

    Raises:
        UsageError: the model fails with one of the sizes, or with patch sequences.
    """
    if isinstance(model, torch.jit.ScriptModule):  # its first inputs decide how it is optimized
        return
    channels, *size = data_config["input_size"]
    tried: dict[str, Any] = {}
    if args.naflex_loader:
        sizes = " ".join(map(str, args.naflex_patch_sizes or ()))
        given = f"--naflex-patch-sizes {sizes}" if sizes else "--naflex-loader"
        tried[given] = example_input(args, data_config, model)
    elif args.input_size or args.img_size:
        given = f"--input-size {' '.join(map(str, args.input_size or ()))}"
        given = given if args.input_size else f"--img-size {args.img_size}"
        own = getattr(model, "pretrained_cfg", {}).get("input_size")
        given += f" (the model's own: {own[1]} x {own[2]})" if own else ""
        tried[given] = torch.zeros(2, channels, *size)
    for side in args.train_img_sizes or ():
        tried[f"--train-img-sizes {side}"] = torch.zeros(2, channels, side, side)

    parameter = next(model.parameters())
    was_training = model.training
    for given, example in tried.items():
        with refused_with(f"{given} does not suit {args.model}"), torch.no_grad():
            model.eval()(_moved(example, parameter))
    model.train(was_training)


def _moved(example: Any, parameter: Tensor) -> Any:
    if isinstance(example, dict):
        return {name: _moved(tensor, parameter) for name, tensor in example.items()}
    return example.to(parameter.device, parameter.dtype if example.is_floating_point() else None)
