"""`timm-rdp paths`: a model's paths, and what each one carries, as a table."""

import argparse
import json
import math
import textwrap
from collections.abc import Iterable
from typing import Any

import torch

from timm_rdp.args import Parser, show_defaults
from timm_rdp.core.rdp import ResidualDropPath
from timm_rdp.core.regions import find_regions
from timm_rdp.errors import UsageError, refused_with, report
from timm_rdp.study.options import RATE
from timm_rdp.training.flags import COUNT, KeyValues
from timm_rdp.training.model import create_model, img_size_kwargs


def main(argv: list[str] | None = None) -> int:
    """Run `timm-rdp paths`; returns its exit status."""
    try:
        args = _parser().parse_args(argv)
        if "drop_path_rate" in args.model_kwargs:
            raise UsageError("--model-kwargs drop_path_rate=...: give --drop-path")
        sized = img_size_kwargs(argparse.Namespace(**vars(args), input_size=None))
        kwargs = {**args.model_kwargs, **sized, "drop_path_rate": args.drop_path}
        try:
            with torch.device("meta"):
                model = create_model(args.model, **kwargs)
        except UsageError:  # its constructor reads values, or else the CPU refuses it too
            model = create_model(args.model, **kwargs)
        example_input, size = None, args.img_size
        if size:
            example_input = torch.empty(2, kwargs.get("in_chans", 3), size, size, device="meta")
        with refused_with(f"--model {args.model}" + f" --img-size {size}" * bool(size)):
            rdp = ResidualDropPath(model, example_input=example_input)
    except UsageError as error:
        return report(error)
    table = {"model": args.model, "drop_path": args.drop_path, **describe(rdp)}
    print(json.dumps(table, indent=2) if args.json else as_text(table))
    return 0


def describe(rdp: ResidualDropPath) -> dict[str, Any]:
    """What the paths of a patched model carry, which may be on the meta device, as JSON has it.

    "elements" counts numbers, "tensors" parameters, and "share" is that of the model's elements.
    """
    sizes = {name: p.numel() for name, p in rdp.model.named_parameters()}
    total = sum(sizes.values())

    def carried(names: Iterable[str]) -> dict[str, Any]:
        elements, names = sum(sizes[n] for n in names), sorted(names)
        counts = {"elements": elements, "tensors": len(names), "share": elements / total}
        return {**counts, "parameters": names}

    found = find_regions(rdp.model, rdp._graph).items()
    regions = {path: region for region, inside in found for path in inside}
    together = rdp.dropped_part(p.name for p in rdp.paths)
    left, largest = set(sizes.keys() - together), []  # modules that are wholly on no path
    for prefix, module in rdp.model.named_modules(remove_duplicate=False):
        inside = {f"{prefix}.{n}" for n, _ in module.named_parameters()}
        if prefix and inside and inside <= left:
            largest.append(prefix)
            left -= inside
    paths = [
        {
            "name": p.name,
            "drop_prob": p.drop_prob,
            "run_when_dropped": not p.entrances,
            "region": regions.get(p.name),
            **carried(p.parameters),
        }
        for p in rdp.paths
    ]
    return {
        "elements": total,
        "tensors": len(sizes),
        "paths": paths,
        "all_paths": carried(together),
        "not_on_any_path": carried(sizes.keys() - together),
        "non_residual": [{"name": p.name, "drop_prob": p.drop_prob} for p in rdp.non_residual],
        "mean_dropped_per_cycle": sum(p.drop_prob for p in rdp.paths),
        "cycles_without_a_drop": math.prod(1 - p.drop_prob for p in rdp.paths),
        "modules_not_on_any_path": sorted(left) + largest,
    }


def as_text(table: dict[str, Any]) -> str:
    """The table that a person reads."""
    paths, together, rest = table["paths"], table["all_paths"], table["not_on_any_path"]
    counts = lambda row: (f"{row['elements']:,}", f"{row['tensors']}", f"{row['share']:.2%}")
    rows = [("path", "drop prob", "dropped", "parameters", "tensors", "share")]
    for path in paths:
        how = "computed" if path["run_when_dropped"] else "not run"
        rows.append((path["name"], f"{path['drop_prob']:.4f}", how, *counts(path)))
    rows.append(("all paths together", "", "", *counts(together)))
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    heading, *body, totals = [
        "  ".join([name.ljust(first), *map(str.rjust, cells, widths)]).rstrip()
        for name, *cells in rows
    ]
    rule = "-" * len(heading)
    compiled = "torch.compile compiles the model as a whole: then all paths are computed and cut."
    if inside := [p["region"] for p in paths if p["region"]]:
        compiled = f"torch.compile compiles {len(inside)} of {len(paths)} paths by regions "
        compiled += f"({inside[0]}, ...): when dropped, these are not run."
    lines = [
        f"{table['model']} at drop path rate {table['drop_path']:g}: {len(paths)} residual paths, "
        f"{table['elements']:,} parameters in {table['tensors']} tensors",
        *("", heading, rule, *body, rule, totals, ""),
        f"Dropped per cycle: {table['mean_dropped_per_cycle']:.2f} paths on average, none in "
        f"{table['cycles_without_a_drop']:.1%} of the cycles (these have no complement iteration).",
        f"When dropped, {sum(not p['run_when_dropped'] for p in paths)} of {len(paths)} paths are "
        "not run; the others are computed and cut.",
        compiled,
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


def _parser() -> Parser:
    parser = Parser(
        prog="timm-rdp paths",
        description="List a model's residual paths and the parameters that each one carries: those "
        "that no longer reach the output without it. No weights are downloaded.",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="name of a timm model")
    add("--drop-path", type=RATE, default=0.1, metavar="RATE", help="its drop path rate")
    add("--img-size", type=COUNT, help="image height and width in pixels (default: the model's)")
    pairs = {"nargs": "*", "default": {}, "action": KeyValues, "metavar": "KEY=VALUE"}
    add("--model-kwargs", **pairs, help="further arguments of the model")
    add("--json", action="store_true", help="print JSON, with the names of all parameters")
    return show_defaults(parser)


def _wrapped(names: Iterable[str]) -> list[str]:
    text = ", ".join(name.replace(" ", "\0") for name in names)  # no break within a name
    lines = textwrap.wrap(text, 96, break_long_words=False, break_on_hyphens=False)
    return [f"  {line}".replace("\0", " ") for line in lines]
