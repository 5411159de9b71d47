"""The --rdp options, for any timm-style training script."""

import argparse
import logging
from typing import Any

from torch import nn

from timm_rdp.core.rdp import ResidualDropPath
from timm_rdp.core.skip_dropped import skip_dropped

_logger = logging.getLogger(__name__)


def add_rdp_args(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the option group `ResidualDroppath` to a parser, and return the group."""
    group = parser.add_argument_group("ResidualDroppath")
    group.add_argument(
        "--rdp",
        action="store_true",
        help="train with ResidualDroppath (arXiv 2411.09475)",
    )
    group.add_argument(
        "--rdp-batch",
        choices=("same", "next"),
        default="same",
        help="same: each batch gets a droppath and a complement iteration; "
        "next: batches alternate between them (default: same)",
    )
    group.add_argument(
        "--rdp-every",
        type=int,
        default=1,
        metavar="N",
        help="a complement iteration follows only every N-th droppath iteration (default: 1)",
    )
    group.add_argument(
        "--rdp-start-epoch",
        type=int,
        default=0,
        metavar="N",
        help="train with timm's own DropPath before epoch N (default: 0)",
    )
    group.add_argument(
        "--rdp-seed",
        type=int,
        default=None,
        metavar="N",
        help="seed of the masks (default: --seed)",
    )
    group.add_argument(
        "--skip-dropped",
        action="store_true",
        help="without --rdp: compute what timm's per-sample DropPath keeps, and nothing else",
    )
    return group


def from_args(
    model: nn.Module, args: argparse.Namespace, example_input: Any = None
) -> ResidualDropPath | None:
    """Patch the model as the parsed options say; None without --rdp (see also --skip-dropped).

    Args:
        model: the model to train, not wrapped.
        args: parsed by a parser that went through `add_rdp_args`.
        example_input: see ResidualDropPath.

    Raises:
        ValueError: see ResidualDropPath.
    """
    skip = getattr(args, "skip_dropped", False)
    if skip and args.rdp:
        raise ValueError(
            "--skip-dropped cannot be combined with --rdp, which does not run dropped paths anyway"
        )
    if skip and getattr(args, "torchcompile", None):
        raise ValueError(
            "--skip-dropped cannot be combined with --torchcompile: compiled code runs every path"
        )
    if skip:
        skip_dropped(model, example_input)
    if not args.rdp:
        return None
    seeds = (args.rdp_seed, getattr(args, "seed", None), 0)
    seed = next(s for s in seeds if s is not None)
    rdp = ResidualDropPath(model, seed=seed, every=args.rdp_every, example_input=example_input)
    if rdp.non_residual:
        _logger.info(
            f"ResidualDroppath leaves {len(rdp.non_residual)} of the model's "
            f"{len(rdp.paths) + len(rdp.non_residual)} DropPath calls to timm, because they are "
            f"not around a residual: {', '.join(p.name for p in rdp.non_residual)}"
        )
    return rdp
