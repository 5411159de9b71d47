"""Models by name and checkpoint, for the study."""

import argparse
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import DropPath
from timm.models import clean_state_dict, get_pretrained_cfg, load_state_dict
from torch import nn

import timm_rdp
from timm_rdp.errors import UsageError
from timm_rdp.training.checkpoint import read_checkpoint
from timm_rdp.training.inputs import img_size_kwargs

# What timm's data config and constructor need to know of how a checkpoint was trained.
SETTINGS = ("num_classes", "img_size", "input_size", "in_chans", "model_kwargs", "gp")
DATA_SETTINGS = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
EMA_KEYS = ("state_dict_ema", "model_ema")


@dataclass
class Source:
    """Where a network's weights come from, and how it was trained as far as that is known."""

    label: str
    path: str | None = None
    weights: Mapping[str, torch.Tensor] | None = field(default=None, repr=False)
    settings: dict[str, Any] = field(default_factory=dict)


def one_line(error: Exception | str) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())


def check_model_name(name: str) -> None:
    """Raises UsageError with the nearest names where timm has no such model."""
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) or timm.is_model(name):
        return
    near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3, cutoff=0.5)
    advice = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them all"
    raise UsageError(f"--model {name}: timm has no such model; {advice}")


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
        try:
            return Source(label, path, load_state_dict(path))
        except Exception as error:
            raise UsageError(
                f"--checkpoint {path}: cannot be read ({one_line(error) or 'no such file'}); "
                "use another file"
            ) from error
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
    keys = EMA_KEYS if use_ema else ("state_dict", "model")
    key = next((k for k in keys if isinstance(content.get(k), Mapping)), None)
    if use_ema and key is None:
        raise UsageError(f"--checkpoint {path}: holds no EMA weights; leave --use-ema out")
    weights = clean_state_dict(content[key] if key else content)
    if not weights or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise UsageError(
            f"--checkpoint {path}: holds no weights (no 'state_dict' of tensors); "
            "use a training run's checkpoint"
        )
    return Source(label, path, weights, settings)


def class_count(source: Source, model: str, asked: int | None, of_data: int) -> int | None:
    """How many outputs to build the model with; None: as many as its pretrained weights have."""
    if asked:
        return asked
    if source.settings.get("num_classes"):
        return source.settings["num_classes"]
    if source.weights is None:
        return of_data
    classifier = getattr(get_pretrained_cfg(model), "classifier", None)
    names = (classifier,) if isinstance(classifier, str) else classifier or ()
    for name in names:
        if f"{name}.weight" in source.weights:
            return len(source.weights[f"{name}.weight"])
    return of_data


def build(name: str, source: Source, settings: dict[str, Any], pretrained: bool) -> nn.Module:
    """Create a model in eval mode, with a DropPath on every path, and load the source's weights.

    Args:
        name: timm's name of the model.
        source: its weights; random, or timm's with `pretrained`, where it has none.
        settings: num_classes, img_size, input_size, in_chans, model_kwargs, gp.

    Raises:
        UsageError: timm cannot build it so, it takes no drop path rate, or the weights do not fit.
    """
    kwargs = dict(settings["model_kwargs"] or {})
    kwargs |= img_size_kwargs(argparse.Namespace(model=name, **settings | {"model_kwargs": kwargs}))
    in_chans = settings["in_chans"] or (settings["input_size"] or [3])[0]
    try:
        # The rate counts for nothing in eval mode, but timm makes no DropPath without one.
        model = timm.create_model(
            name,
            pretrained=pretrained,
            num_classes=settings["num_classes"],
            in_chans=in_chans,
            global_pool=settings["gp"],
            drop_path_rate=0.1,
            **kwargs,
        )
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise UsageError(f"--model {name}: cannot be built: {one_line(error)}") from error
        raise UsageError(
            f"--model {name}: takes no drop path rate and so has no paths; use a model with "
            "stochastic depth, e.g. vit_tiny_patch16_224"
        ) from error
    except Exception as error:
        raise UsageError(f"--model {name}: cannot be built: {one_line(error)}") from error
    if source.weights is not None:
        _load(model, source, name)
        source.weights = None
    fill_drop_path_slots(model)
    return model.eval()


def _load(model: nn.Module, source: Source, name: str) -> None:
    own, weights = model.state_dict(), source.weights
    wrong = [k for k in own if k not in weights] + [k for k in weights if k not in own]
    wrong += [k for k in own if k in weights and own[k].shape != weights[k].shape]
    if wrong:
        raise UsageError(
            f"--checkpoint {source.path}: does not fit --model {name}: {len(wrong)} entries are "
            f"missing, unknown or of another shape, e.g. {wrong[0]}; give the model, "
            "--num-classes and --img-size that it was trained with"
        )
    model.load_state_dict(weights)


def fill_drop_path_slots(model: nn.Module) -> None:
    """Give a DropPath to blocks whose own rate is 0: timm leaves an Identity in its place there."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if name.startswith("drop_path") and type(child) is nn.Identity:
                setattr(module, name, DropPath(0.1))


def trace(name: str, model: nn.Module, size: tuple[int, int, int]) -> tuple[timm_rdp.Path, ...]:
    """The model's residual paths, in call order.

    Args:
        name: timm's name of the model.
        model: with a DropPath on every path.
        size: of its images, (C, H, W).

    Raises:
        UsageError: it has none.
    """
    try:
        rdp = timm_rdp.ResidualDropPath(model, example_input=torch.zeros(2, *size))
    except ValueError as error:
        raise UsageError(f"--model {name}: {one_line(error)}") from error
    paths = rdp.paths
    rdp.detach()
    model.eval()
    return paths
