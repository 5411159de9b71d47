"""`timm-rdp paths`: a model's paths, and what each one carries, as a table."""

import argparse
import json
import math
import sys
from collections.abc import Iterable
from typing import Any

import timm
import torch
from torch import nn

from timm_rdp.core.rdp import ResidualDropPath
from timm_rdp.errors import UsageError, nearest
from timm_rdp.training.inputs import img_size_kwargs

# Heading and text of each column of the table; a row is one of describe()'s "paths".
COLUMNS = (
    ("path", lambda row: row["name"]),
    ("drop prob", lambda row: f"{row['drop_prob']:.4f}"),
    ("dropped", lambda row: "computed" if row["run_when_dropped"] else "not run"),
    ("parameters", lambda row: f"{row['elements']:,}"),
    ("tensors", lambda row: f"{row['tensors']}"),
    ("share", lambda row: f"{row['share']:.2%}"),
)


def main(argv: list[str] | None = None) -> int:
    """Print the table that the command line asks for, and return the exit status."""
    args = _parser().parse_args(argv)
    try:
        model, example_input = _create(args)
        try:
            rdp = ResidualDropPath(model, example_input=example_input)
        except ValueError as error:
            raise UsageError(f"--model {args.model}: {error}") from None
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = {"model": args.model, "drop_path": args.drop_path, **describe(rdp)}
    print(json.dumps(table, indent=2) if args.json else as_text(table))
    return 0


def describe(rdp: ResidualDropPath) -> dict[str, Any]:
    """Count what the paths of a patched model carry.

    Args:
        rdp: the controller of the model; the model may be on the meta device.

    Returns:
        plain values that JSON takes; "elements" counts numbers, "tensors" parameters, and "share"
        is that of the model's elements.
    """
    sizes = {name: p.numel() for name, p in rdp.model.named_parameters()}
    total = sum(sizes.values())

    def carried(names: Iterable[str]) -> dict[str, Any]:
        names = sorted(names)
        elements = sum(sizes[n] for n in names)
        share = elements / total
        return {"elements": elements, "tensors": len(names), "share": share, "parameters": names}

    together = rdp.dropped_part(p.name for p in rdp.paths)
    return {
        "elements": total,
        "tensors": len(sizes),
        "paths": [
            {
                "name": p.name,
                "drop_prob": p.drop_prob,
                "run_when_dropped": not p.entrances,
                **carried(p.parameters),
            }
            for p in rdp.paths
        ],
        "all_paths": carried(together),
        "not_on_any_path": carried(sizes.keys() - together),
        "non_residual": [{"name": p.name, "drop_prob": p.drop_prob} for p in rdp.non_residual],
        "mean_dropped_per_cycle": sum(p.drop_prob for p in rdp.paths),
        "cycles_without_a_drop": math.prod(1 - p.drop_prob for p in rdp.paths),
        "modules_not_on_any_path": _modules_of(rdp.model, sizes.keys() - together),
    }


def as_text(table: dict[str, Any]) -> str:
    """The table that a person reads."""
    paths, together, rest = table["paths"], table["all_paths"], table["not_on_any_path"]
    totals = {"name": "all paths together", **together}
    cells = [[heading for heading, _ in COLUMNS]]
    cells += [[text(row) for _, text in COLUMNS] for row in paths]
    cells += [["" if h in ("drop prob", "dropped") else text(totals) for h, text in COLUMNS]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in cells]
    rule = "-" * len(lines[0])
    lines[-1:] = [rule, lines[-1]]
    lines.insert(1, rule)
    title = (
        f"{table['model']} at drop path rate {table['drop_path']:g}: {len(paths)} residual paths, "
        f"{table['elements']:,} parameters in {table['tensors']} tensors"
    )
    lines[:0] = [title, ""]
    lines += [
        "",
        f"Dropped per cycle: {table['mean_dropped_per_cycle']:.2f} paths on average, none in "
        f"{table['cycles_without_a_drop']:.1%} of the cycles (these have no complement iteration).",
        f"When dropped, {sum(not p['run_when_dropped'] for p in paths)} of {len(paths)} paths are "
        "not run; the others are computed and cut.",
        "",
        f"On no path, trained in droppath iterations only: {rest['elements']:,} parameters in "
        f"{rest['tensors']} tensors ({rest['share']:.2%} of the model):",
        *_wrapped(table["modules_not_on_any_path"]),
    ]
    if table["non_residual"]:
        lines += [
            "",
            f"Not around a residual: {len(table['non_residual'])} DropPath calls. Dropping one for "
            "a whole batch would silence",
            "the network, so ResidualDroppath leaves them to timm, which drops them per sample:",
            *_wrapped(f"{p['name']} ({p['drop_prob']:.4f})" for p in table["non_residual"]),
        ]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="timm-rdp paths",
        description="List a model's residual paths and the parameters that each one carries: those "
        "that no longer reach the output without it. No weights are downloaded.",
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="name of a timm model")
    parser.add_argument(
        "--drop-path",
        type=float,
        default=0.1,
        metavar="RATE",
        help="drop path rate that it is created with (default: 0.1)",
    )
    parser.add_argument(
        "--img-size",
        type=int,
        default=None,
        metavar="N",
        help="size of the square images that it takes (default: the model's own)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON, with the names of all parameters"
    )
    return parser


def _create(args: argparse.Namespace) -> tuple[nn.Module, torch.Tensor | None]:
    """The model, on the meta device where it can be created there, and its input."""
    if not 0 < args.drop_path < 1:
        raise UsageError(
            f"--drop-path {args.drop_path:g} must be above 0 and below 1 (at 0 nothing is dropped, "
            "and timm makes no paths)"
        )
    if args.img_size is not None and args.img_size < 1:
        raise UsageError(f"--img-size {args.img_size} must be 1 or more")
    kwargs: dict[str, Any] = {"drop_path_rate": args.drop_path}
    try:
        kwargs |= img_size_kwargs(
            argparse.Namespace(
                model=args.model,
                img_size=args.img_size,
                input_size=None,
                in_chans=None,
                model_kwargs={},
            )
        )
        try:
            with torch.device("meta"):
                model = timm.create_model(args.model, **kwargs)
        except (NotImplementedError, RuntimeError):  # its constructor reads values
            model = timm.create_model(args.model, **kwargs)
    except UsageError:
        raise
    except Exception as error:  # whatever a constructor raises for arguments that it cannot take
        raise UsageError(_explain(args.model, error)) from None
    if args.img_size is None:
        return model, None
    return model, torch.empty(2, 3, args.img_size, args.img_size, device="meta")


def _explain(name: str, error: Exception) -> str:
    if "drop_path_rate" in str(error):
        return (
            f"--model {name} takes no drop_path_rate, so it has no paths: choose a model with "
            "stochastic depth, such as vit_small_patch16_224 or resnet50"
        )
    architecture = name.partition(".")[0]
    if ":" not in name and not timm.is_model(architecture):
        close = nearest(architecture, timm.list_models()) or "; timm.list_models() lists them"
        return f"--model {name}: timm has no such model{close}"
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"--model {name} cannot be created: {reason}"


def _modules_of(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The largest modules of which every parameter is among `names`, and what is left over."""
    left = set(names)
    largest = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        inside = {f"{prefix}.{n}" for n, _ in module.named_parameters()}
        if prefix and inside and inside <= left:
            largest.append(prefix)
            left -= inside
    return sorted(left) + largest


def _aligned(row: list[str], widths: list[int]) -> list[str]:
    return [
        text.ljust(width) if i == 0 else text.rjust(width)
        for i, (text, width) in enumerate(zip(row, widths, strict=True))
    ]


def _wrapped(names: Iterable[str], width: int = 96) -> list[str]:
    lines = [""]
    for name in names:
        if lines[-1] and len(lines[-1]) + len(name) + 2 > width:
            lines[-1] += ","
            lines.append("")
        lines[-1] += f", {name}" if lines[-1] else f"  {name}"
    return lines


if __name__ == "__main__":
    sys.exit(main())
