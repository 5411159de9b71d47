"""The --rdp options, for any timm-style training script, and the parser of our own commands."""

import argparse
import logging
import math
import random
import shlex
from collections.abc import Callable
from typing import Any, NoReturn

from torch import nn

from timm_rdp.core.masks import sample_masks
from timm_rdp.core.rdp import ResidualDropPath
from timm_rdp.core.skip_dropped import SAMPLES, skip_dropped
from timm_rdp.errors import UsageError, nearest

_logger = logging.getLogger(__name__)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError where argparse would print its usage."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            flags = [f for action in self._actions for f in action.option_strings]
            close = nearest(unknown.split(" ")[0].split("=")[0], flags)
            raise UsageError(f"unknown flag or argument: {unknown!r}{close or ' (see --help)'}")
        raise UsageError(message.removeprefix("argument ").replace(": ", " ", 1) + " (see --help)")


def number(
    kind: type[int] | type[float], rule: str = "", holds: Callable[[float], bool] = lambda x: True
) -> Callable[[str], float]:
    """Return a `type=` of argparse: finite numbers, for which `holds` what `rule` says."""
    what = f"a {'whole ' if kind is int else ''}number {rule}".strip()

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (-math.inf < value < math.inf and holds(value)):
            raise argparse.ArgumentTypeError(f"{shlex.quote(text)} must be {what}")
        return value

    return convert


def show_defaults(parser: Parser) -> Parser:
    """Give the flags' help texts their defaults, and N or TEXT where they name no value."""
    for action in parser._actions:
        if len(",".join(action.choices or ())) > 40:  # too long for a line of its usage
            action.metavar = "NAME"
            action.help = f"{action.help}; one of {', '.join(filter(None, action.choices or ()))}"
        if action.nargs != 0 and not (action.choices or action.metavar):
            action.metavar = "N" if action.type else "TEXT"
        if action.nargs != 0 and action.default and "default: " not in str(action.help):
            values = action.default if isinstance(action.default, list) else ()
            typed = " ".join(f"{value:.4g}" for value in values) or "%(default)s"
            action.help = f"{action.help} (default: {typed})"
    return parser


class RandomSecond(ResidualDropPath):
    """Ablation: trains second what as many paths carry, drawn independently of the dropped ones.

    They come from the same rates, given their number, as a pure function of seed and cycle.
    """

    def _second_part(self, dropped: frozenset[str]) -> frozenset[str]:
        rates = [path.drop_prob for path in self.paths]
        for attempt in range(10_000):  # as many as there are paths on average
            kept = sample_masks(self.seed, self.current_cycle, rates, f" second {attempt}")
            if kept.count(False) == len(dropped):
                names = (path.name for path, k in zip(self.paths, kept, strict=True) if not k)
                return self.dropped_part(names)
        # A rare number, or rates that have changed since: any as many, still independently.
        draw = random.Random(f"{self.seed} {self.current_cycle}")
        return self.dropped_part(draw.sample([path.name for path in self.paths], len(dropped)))


class AllSecond(ResidualDropPath):
    """Ablation: trains everything second, wherever something was dropped."""

    def _second_part(self, dropped: frozenset[str]) -> frozenset[str]:
        return frozenset(self._patch.parameters if dropped else ())


# What the second iteration of a cycle trains, by --rdp-second.
SECOND = {"dropped": ResidualDropPath, "random": RandomSecond, "all": AllSecond}


def add_rdp_args(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the option group `ResidualDroppath` to a parser, and return the group."""
    group = parser.add_argument_group("ResidualDroppath")
    add = group.add_argument
    add("--rdp", action="store_true", help="train with ResidualDroppath (arXiv 2411.09475)")
    add(
        "--rdp-batch",
        choices=("same", "next"),
        default="same",
        help="same: each batch gets a droppath and a complement iteration; "
        "next: batches alternate between them (default: same)",
    )
    add(
        "--rdp-every",
        type=number(int, "of at least 1", lambda n: n >= 1),
        default=1,
        metavar="N",
        help="a complement iteration follows only every N-th droppath iteration (default: 1)",
    )
    add(
        "--rdp-start-epoch",
        type=number(int, "of at least 0", lambda n: n >= 0),
        default=0,
        metavar="N",
        help="train with timm's own DropPath before epoch N (default: 0)",
    )
    add(
        "--rdp-second",
        choices=tuple(SECOND),
        default="dropped",
        help="what the second iteration trains; ablations: a random part of that size, or all "
        "(default: dropped)",
    )
    add("--rdp-seed", type=int, metavar="N", help="seed of the masks (default: --seed)")
    add(
        "--skip-dropped",
        nargs="?",
        choices=SAMPLES,
        const=SAMPLES[0],
        help="without --rdp: compute what timm's per-sample DropPath keeps, and nothing else: the "
        "samples that it draws, or a fixed number, which compiles too (default: drawn)",
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
    skip = getattr(args, "skip_dropped", None)
    if skip and args.rdp:
        raise ValueError(
            "--skip-dropped cannot be combined with --rdp, which does not run dropped paths anyway"
        )
    if skip and skip != "fixed" and getattr(args, "torchcompile", None):
        raise ValueError(
            "--skip-dropped cannot be combined with --torchcompile, because compiled code runs "
            "every path: use --skip-dropped fixed"
        )
    if skip:
        skip_dropped(model, example_input, samples=skip)
    if not args.rdp:
        return None
    seeds = (args.rdp_seed, getattr(args, "seed", None), 0)
    seed = next(s for s in seeds if s is not None)
    kind = SECOND[getattr(args, "rdp_second", "dropped")]
    rdp = kind(model, seed=seed, every=args.rdp_every, example_input=example_input)
    if rdp.non_residual:
        _logger.info(
            f"ResidualDroppath leaves {len(rdp.non_residual)} of the model's "
            f"{len(rdp.paths) + len(rdp.non_residual)} DropPath calls to timm, because they are "
            f"not around a residual: {', '.join(p.name for p in rdp.non_residual)}"
        )
    return rdp
