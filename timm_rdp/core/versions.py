"""What differs between the versions of torch and timm that are supported; each named beside it."""

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn


def best_device() -> str:
    """The type of the accelerator that is here, else "cpu"."""
    try:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator.type if accelerator else "cpu"
    except (AttributeError, TypeError):  # before torch 2.7, and without the argument in 2.6
        modules = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.backends.mps}
        return next((k for k, module in modules.items() if module.is_available()), "cpu")


def safe_globals(types: list[Any]) -> AbstractContextManager:
    """A context in which `torch.load(weights_only=True)` also takes these types."""
    context = getattr(torch.serialization, "safe_globals", None)
    if context is not None:
        return context(types)
    torch.serialization.add_safe_globals(types)  # torch 2.4: for good
    return nullcontext()


def not_compiled() -> AbstractContextManager:
    """A context in which compiled modules run as they were written."""
    if hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    if "torch._dynamo" not in sys.modules:  # before torch 2.6
        return nullcontext()
    return sys.modules["torch._dynamo"].config.patch(disable=True)


def allow_graphs(count: int) -> None:
    """Have dynamo make up to `count` graphs of one function; by itself it stops at 8."""
    config = torch._dynamo.config
    # Before torch 2.6 it was named after its cache.
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, name, max(getattr(config, name), count))


def blocks_share_graphs() -> bool:
    """Whether dynamo makes one graph of all blocks that differ in nothing but their parameters."""
    return torch.__version__ >= "2.5"


def guards_on_freezing() -> bool:
    """Whether what is compiled notices by itself that parameters were frozen since."""
    return torch.__version__ >= "2.12"


def input_size(model: nn.Module) -> tuple[int, ...]:
    """Channels, height and width of the images that a timm model takes by default."""
    try:
        from timm.models import get_model_input_config
    except ImportError:  # before timm 1.0.31: that of the weights, whatever the model was told
        config = getattr(model, "pretrained_cfg", {})
        patches = getattr(model, "patch_embed", None)
        channels, *size = config["input_size"] if isinstance(config, Mapping) else (3, 224, 224)
        size = getattr(patches, "img_size", None) or size
        return channels, *size
    return tuple(get_model_input_config(model)["input_size"])
