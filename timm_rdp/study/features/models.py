"""Models by name and checkpoint, for `timm-rdp features`."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.drop import DropPath
from timm.models import clean_state_dict, get_pretrained_cfg, load_state_dict
from torch import nn

import timm_rdp
from timm_rdp.errors import UsageError, one_line, refused_with
from timm_rdp.study.options import refused_model
from timm_rdp.training.checkpoint import read_checkpoint
from timm_rdp.training.model import img_size_kwargs


@dataclass
class Source:
    """Where a network's weights come from, and how it was trained as far as that is known."""

    label: str
    path: str | None = None
    weights: Mapping[str, Any] | None = field(default=None, repr=False)
    settings: dict[str, Any] = field(default_factory=dict)


def read_source(path: str, model: str, use_ema: bool, label: str) -> Source:
    """Read a checkpoint of `train_rdp.py`, of timm's script, or of bare weights.

    Args:
        path: .pth, .pth.tar, .pt or .safetensors. Nothing in it is executed.
        model: the model that it is expected to be of.
        use_ema: take the averaged weights.
        label: what the figures call it.

    Raises:
        UsageError: missing, unreadable, without weights, or of another model.
    """
    if Path(path).suffix == ".safetensors":
        with refused_with(f"--checkpoint {path}: cannot be read"):
            return Source(label, path, load_state_dict(path))
    # Left on disk until used: optimizer state is never read.
    content = read_checkpoint(path, "--checkpoint", mmap=True)
    if not isinstance(content, Mapping):
        raise UsageError(f"--checkpoint {path}: holds no weights; use a training run's checkpoint")
    settings = content.get("args") or {}
    settings = vars(settings) if isinstance(settings, argparse.Namespace) else dict(settings)
    trained = settings.get("model") or content.get("arch")
    if isinstance(trained, str) and trained.split(".")[0] != model.split(".")[0]:
        raise UsageError(
            f"--checkpoint {path}: is of {trained}, not of --model {model}; "
            f"give --model {trained} or another checkpoint"
        )
    keys = ("state_dict_ema", "model_ema") if use_ema else ("state_dict", "model")
    key = next((k for k in keys if isinstance(content.get(k), Mapping)), None)
    if use_ema and key is None:
        raise UsageError(f"--checkpoint {path}: holds no EMA weights; leave --use-ema out")
    weights = clean_state_dict(dict(content[key] if key else content))
    if not weights or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise UsageError(
            f"--checkpoint {path}: holds no weights (no 'state_dict' of tensors); "
            "use a training run's checkpoint"
        )
    return Source(label, path, weights, settings)


def class_count(source: Source, model: str, asked: int | None, of_data: int) -> int:
    """How many outputs to build the model with: as asked, as trained, or as the data have."""
    known = asked or source.settings.get("num_classes")
    if known:
        return known
    classifier = getattr(get_pretrained_cfg(model), "classifier", None) or ()
    for name in (classifier,) if isinstance(classifier, str) else classifier:
        if source.weights and f"{name}.weight" in source.weights:
            return len(source.weights[f"{name}.weight"])
    return of_data


def build(
    args: argparse.Namespace, source: Source, classes: int
) -> tuple[nn.Module, dict[str, Any]]:
    """Create a model in eval mode, with a DropPath on every path, and load the source's weights.

    Args:
        args: model, pretrained, and num_classes, img_size and in_chans, which count before what the
            checkpoint was trained with.
        source: its weights; random, or timm's with `args.pretrained`, where it has none.
        classes: how many the images have.

    Returns:
        the model, and what timm's data config needs to know of its images

    Raises:
        UsageError: timm cannot build it so, it takes no drop path rate, or the weights do not fit.
    """
    trained = source.settings
    sizes = {name: getattr(args, name) or trained.get(name) for name in ("img_size", "in_chans")}
    sizes["input_size"] = None if args.img_size else trained.get("input_size")
    outputs = None
    if not args.pretrained or args.num_classes:
        outputs = class_count(source, args.model, args.num_classes, classes)
    kwargs = dict(trained.get("model_kwargs") or {})
    with refused_model(args.model):
        asked = argparse.Namespace(model=args.model, model_kwargs=kwargs, **sizes)
        # The rate counts for nothing in eval mode, but timm makes no DropPath without one.
        model = timm.create_model(
            args.model,
            pretrained=args.pretrained,
            num_classes=outputs,
            in_chans=sizes["in_chans"] or (sizes["input_size"] or [3])[0],
            global_pool=trained.get("gp"),
            drop_path_rate=0.1,
            **kwargs | img_size_kwargs(asked),
        )
    if source.weights is not None:
        try:
            model.load_state_dict(source.weights)
        except RuntimeError as error:  # it lists all names
            raise UsageError(
                f"--checkpoint {source.path}: does not fit --model {args.model} with these "
                f"--num-classes and --img-size: {one_line(error)[:300]}"
            ) from error
        source.weights = None
    fill_drop_path_slots(model)
    return model.eval(), sizes


def fill_drop_path_slots(model: nn.Module) -> None:
    """Give a DropPath to blocks whose own rate is 0: timm leaves an Identity in its place there."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if name.startswith("drop_path") and type(child) is nn.Identity:
                setattr(module, name, DropPath(0.1))


def trace(name: str, model: nn.Module, size: tuple[int, int, int]) -> tuple[timm_rdp.Path, ...]:
    """The model's residual paths, in call order; its images have the size (C, H, W).

    Raises:
        UsageError: it has none.
    """
    with refused_model(name):
        rdp = timm_rdp.ResidualDropPath(model, example_input=torch.zeros(2, *size))
    paths = rdp.paths
    rdp.detach()
    model.eval()
    return paths
