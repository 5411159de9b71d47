"""Models by name and checkpoint, and images to pass through them, for `timm-rdp features`."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.models import get_pretrained_cfg, load_state_dict
from torch import nn
from torch.utils.data import Subset

import timm_rdp
from timm_rdp.errors import UsageError, refused_with
from timm_rdp.training.checkpoint import check_fit, read_checkpoint, weights_of
from timm_rdp.training.dataset import IMG_MODES, make_dataset, prepare_demo
from timm_rdp.training.flags import build_parser
from timm_rdp.training.model import build_model

# Fewer images than this say more about themselves than about the layers.
MIN_IMAGES = 16
# What a checkpoint's model and images are rebuilt from, as its training options call it.
AS_TRAINED = (
    *("model_kwargs", "gp", "num_classes", "img_size", "in_chans", "input_size"),
    *("mean", "std", "crop_pct", "crop_mode", "interpolation"),
)
# How its data set is read.
AS_LOADED = (
    *("task", "data_dir", "val_split", "input_key", "target_key", "target_format"),
    *("num_classes", "val_num_samples"),
)


def check_chosen(options: argparse.Namespace) -> None:
    """Raises UsageError where the images of a data set cannot be chosen one by one."""
    stream = options.dataset.lower().startswith(("tfds/", "wds/", "hfids/"))
    if stream or options.naflex_loader:
        what = f"--dataset {options.dataset}" if stream else "--naflex-loader"
        raise UsageError(f"{what}: cannot be measured (features, --measure), which is a stream")


def choose_images(
    folder: str | None,
    count: int,
    seed: int,
    name: str = "",
    trained: Mapping[str, Any] | None = None,
) -> tuple[Subset, int]:
    """Up to `count` validation images, drawn with a seed, and how many classes they have.

    Args:
        folder: as for training, with a `validation` or `val` folder of class folders, or class
            folders themselves; None for the demo's digits.
        name: of a data set in the folder (see --dataset) that is none of class folders.
        trained: the settings of a checkpoint, which say how that is read and, without a folder,
            where it is.
    """
    options, trained = vars(build_parser().parse_args([])), trained or {}
    if "/" in name:
        options |= {k: trained[k] for k in AS_LOADED if trained.get(k) is not None}
        root = options["data_dir"] = folder or options["data_dir"]
    else:
        root = options["data_dir"] = folder or str(prepare_demo())
    args = argparse.Namespace(**options | {"dataset": name})
    check_chosen(args)
    dataset = make_dataset(args, "RGB", False)
    if "/" not in name and Path(root, "train").is_dir() and Path(dataset.reader.root) == Path(root):
        raise UsageError(
            f"--data-dir {root} has train/ but no validation/ folder; add one, or give a folder "
            "that has class folders only"
        )
    if len(dataset) < MIN_IMAGES:
        raise UsageError(
            f"--data-dir {root} has {len(dataset)} validation images: too few to compare layers "
            f"(CKA); give {MIN_IMAGES} or more"
        )
    images = draw(dataset, count, seed)
    known = getattr(dataset, "classes", None) or getattr(dataset.reader, "class_to_idx", None)
    return images, len(known or ()) or args.num_classes or 0


def draw(dataset: Any, count: int, seed: int) -> Subset:
    """At most `count` samples of a data set, drawn with a seed, in their order."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return Subset(dataset, order[:count].sort().values.tolist())


@dataclass
class Source:
    """Where a network's weights come from, and how it was trained as far as that is known."""

    label: str
    path: str | None = None
    weights: Mapping[str, Any] | None = field(default=None, repr=False)
    settings: dict[str, Any] = field(default_factory=dict)


def read_source(path: str, model: str, use_ema: bool, label: str) -> Source:
    """Read a checkpoint of a model by `train_rdp.py`, by timm's script, or of bare weights.

    Nothing in it is executed.
    """
    what = f"--checkpoint {path}"
    if Path(path).suffix == ".safetensors":
        with refused_with(f"{what}: cannot be read"):
            return Source(label, path, load_state_dict(path))
    # Left on disk until used: optimizer state is never read.
    content = read_checkpoint(path, "--checkpoint", mmap=True)
    known = content if isinstance(content, Mapping) else {}
    if use_ema:
        content = known.get("state_dict_ema") or known.get("model_ema")
        if not content:
            raise UsageError(f"{what}: holds no EMA weights; leave --use-ema out")
    weights = weights_of(content, what)[1]
    settings = known.get("args") or {}
    settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings
    trained = settings.get("model") or known.get("arch")
    if isinstance(trained, str) and trained.split(".")[0] != model.split(".")[0]:
        raise UsageError(
            f"{what}: is of {trained}, not of --model {model}; give --model {trained} or another "
            "checkpoint"
        )
    return Source(label, path, weights, settings)


def build(
    args: argparse.Namespace, source: Source, classes: int
) -> tuple[nn.Module, dict[str, Any], str]:
    """Create a model in eval mode and load the source's weights.

    Args:
        args: model, pretrained, and num_classes, img_size and in_chans, which count before what the
            checkpoint was trained with.
        source: its weights; random, or timm's with `args.pretrained`, where it has none.
        classes: of the images.

    Returns:
        the model, timm's data config and PIL's mode of its images
    """
    options = vars(build_parser().parse_args([])) | {"rank": 0, "distributed": False}
    trained = source.settings
    options |= {name: trained[name] for name in AS_TRAINED if trained.get(name) is not None}
    if args.img_size:
        options["input_size"] = None
    asked = ("model", "pretrained", "num_classes", "img_size", "in_chans")
    options |= {name: getattr(args, name) for name in asked if getattr(args, name) is not None}
    if not (options["num_classes"] or args.pretrained):  # as the weights have, else as the images
        classifier = getattr(get_pretrained_cfg(args.model), "classifier", None) or ()
        layers = (classifier,) if isinstance(classifier, str) else classifier
        weights = [source.weights.get(f"{layer}.weight", ()) for layer in layers if source.weights]
        options["num_classes"] = max(map(len, weights), default=0) or classes
    # The rate counts for nothing in eval mode, but timm makes no DropPath without one.
    options["drop_path"] = 0.1
    model, data = build_model(argparse.Namespace(**options), torch.device("cpu"), None)
    if source.weights is not None:
        check_fit(model, source.weights, f"--checkpoint {source.path}", args.model)
        model.load_state_dict(source.weights)
    channels = data["input_size"][0]
    mode = trained.get("input_img_mode") or IMG_MODES.get(channels)
    if mode is None:
        raise UsageError(f"--in-chans {channels}: images have 1, 3 or 4; give one of these")
    return model.eval(), data, mode


def find_paths(name: str, model: nn.Module, size: tuple) -> tuple[timm_rdp.Path, ...]:
    """The residual paths of a model for images of a size (C, H, W), in call order.

    Blocks whose rate is 0 get a DropPath too: timm leaves an Identity in its place there.
    """
    for module in list(model.modules()):
        for slot, child in module.named_children():
            if slot.startswith("drop_path") and type(child) is nn.Identity:
                setattr(module, slot, DropPath(0.1))
    with refused_with(f"--model {name}"):
        rdp = timm_rdp.ResidualDropPath(model, example_input=torch.zeros(2, *size))
    rdp.detach()
    model.eval()
    return rdp.paths
