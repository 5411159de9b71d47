"""An input like those that a run trains on, for tracing the model's paths."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch
from torch import Tensor, nn


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
    height, width = model.get_patch_size() if hasattr(model, "get_patch_size") else (16, 16)
    shape: tuple[int, ...] = (height * width * channels,)
    if args.naflex_patch_sizes:  # patches of varying size are not flattened
        side = args.naflex_patch_sizes[0]
        first = args.naflex_patchify_channels_first
        shape = (channels, side, side) if first else (side, side, channels)
    length = args.naflex_train_seq_lens[0]
    side = max(1, int(length**0.5))
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side)).view(-1, 2)
    coord = torch.zeros(batch, length, 2, dtype=torch.int64)
    coord[:, : len(grid)] = grid
    valid = torch.zeros(batch, length, dtype=torch.bool)
    valid[:, : len(grid)] = True
    return {
        "patches": torch.zeros(batch, length, *shape),
        "patch_coord": coord,
        "patch_valid": valid,
    }
