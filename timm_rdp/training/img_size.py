"""Whether a model takes the images that a run feeds it, and how to make it take them."""

import argparse
from copy import deepcopy
from typing import Any

import timm
import torch
from timm.models import get_model_input_config

from timm_rdp.errors import UsageError
from timm_rdp.training.example import example_input


def img_size_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Return what to tell `timm.create_model` so that the model takes images of the asked size.

    timm's script sizes only the images, so that a model of fixed input size (ViT, Swin, ...) fails
    at its first batch. Whether a model is of fixed size, and whether it can be made for another
    one, is asked of the model itself, built on torch's meta device.

    Args:
        args: the options; img_size, input_size, in_chans, model and model_kwargs count.

    Returns:
        {"img_size": (height, width)}, or {} where the model needs no telling.

    Raises:
        UsageError: the model cannot be made for that size.
    """
    if args.input_size:
        size = tuple(args.input_size[1:])
    elif args.img_size:
        size = (args.img_size, args.img_size)
    else:
        return {}
    if {"img_size", "dynamic_img_size", "strict_img_size"} & set(args.model_kwargs):
        return {}
    in_chans = args.input_size[0] if args.input_size else args.in_chans or 3
    try:
        model = _meta_model(args, in_chans)
    except Exception:  # whatever is wrong with it has nothing to do with the size
        return {}
    own = get_model_input_config(model)
    own_size = tuple(own["input_size"][1:])
    if not own["fixed_input_size"] or size == own_size:
        return {}
    try:
        _try_forward(_meta_model(args, in_chans, img_size=size), in_chans, size)
    except Exception as error:
        if not _fails(model, in_chans, own_size):
            asked = " ".join(map(str, args.input_size)) if args.input_size else size[0]
            given = "--input-size" if args.input_size else "--img-size"
            given = f"{given} {asked} (the model's own: {own_size[0]} x {own_size[1]})"
            raise UsageError(_unsuitable(given, args, error)) from None
    return {"img_size": size}


def check_model_takes(
    args: argparse.Namespace, data_config: dict[str, Any], model: torch.nn.Module
) -> None:
    """Check that the model takes the batches of `--train-img-sizes` and `--naflex-loader`.

    Raises:
        UsageError: the model fails with one of the sizes, or with patch sequences.
    """
    if args.train_img_sizes and not isinstance(model, torch.jit.ScriptModule):
        copy = deepcopy(model).to("meta").eval()
        for size in args.train_img_sizes:
            try:
                _try_forward(copy, data_config["input_size"][0], (size, size))
            except Exception as error:
                raise UsageError(_unsuitable(f"--train-img-sizes {size}", args, error)) from None
    if args.naflex_loader:
        # NaFlex models read sizes off the values of their input, which meta tensors do not have.
        parameter = next(model.parameters())
        batch = {
            name: tensor.to(
                parameter.device, parameter.dtype if tensor.is_floating_point() else None
            )
            for name, tensor in example_input(args, data_config, model).items()
        }
        was_training = model.training
        try:
            with torch.no_grad():
                model.eval()(batch)
        except Exception as error:
            sizes = " ".join(map(str, args.naflex_patch_sizes or ()))
            given = f"--naflex-patch-sizes {sizes}" if sizes else "--naflex-loader"
            raise UsageError(_unsuitable(given, args, error)) from None
        finally:
            model.train(was_training)


def _unsuitable(given: str, args: argparse.Namespace, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{given} does not suit {args.model}: {reason}"


def _meta_model(args: argparse.Namespace, in_chans: int, **kwargs: Any) -> torch.nn.Module:
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return timm.create_model(args.model, in_chans=in_chans, **kwargs, **args.model_kwargs)


def _try_forward(model: torch.nn.Module, in_chans: int, size: tuple[int, int]) -> None:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model(torch.empty(2, in_chans, *size, device="meta"))


def _fails(model: torch.nn.Module, in_chans: int, size: tuple[int, int]) -> bool:
    try:
        _try_forward(model, in_chans, size)
    except Exception:
        return True
    return False
