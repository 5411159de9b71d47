"""`timm-rdp spiral`: the paper's toy study, with numbers under its pictures."""

import argparse
import statistics
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from timm_rdp.args import Parser, show_defaults
from timm_rdp.errors import UsageError, report
from timm_rdp.study.features import similarity
from timm_rdp.study.figures import similarity_grid, write_csv, write_figure
from timm_rdp.study.options import RATE, at_least, check_installed, check_output
from timm_rdp.study.spiral import algorithm, figures, toy
from timm_rdp.study.spiral.figures import FIRST, LAYERS, aligned_planes
from timm_rdp.training.flags import AMOUNT, COUNT, POSITIVE, SEED

FRAMES = 24


def _parser() -> Parser:
    parser = Parser(
        prog="timm-rdp spiral",
        description="The paper's toy study: trains plain, DropPath and RDP networks on two spirals "
        "and writes figures, the numbers behind them as CSV, and a summary.",
    )
    add = parser.add_argument
    add("--output", default="output/spiral", metavar="DIR", help="folder to write into")
    add("--points", type=at_least(4), default=400, help="points of both spirals together")
    playground = "spirals of TensorFlow Playground: radius 5, 1.75 turns, uniform noise"
    add("--playground", action="store_true", help=playground)
    turns = "turns of each spiral (default: 1.5, or 1.75 with --playground)"
    add("--turns", type=POSITIVE, help=turns)
    add("--noise", type=AMOUNT, default=0.02, help="noise of the points; the radius is 1")
    add("--depth", type=at_least(3), default=32, help="residual layers of the network")
    add("--dim", type=at_least(2), default=32, help="its hidden dimension")
    add("--small-depth", type=at_least(3), default=6, help="layers of the network of figure 4")
    add("--small-dim", type=COUNT, default=6, help="its hidden dimension")
    add("--activation", default="gelu", choices=tuple(toy.ACTIVATIONS), help="on each path")
    rate = "rate of the last layer's DropPath"
    add("--drop-path", type=RATE, default=0.2, metavar="RATE", help=rate)
    add("--steps", type=COUNT, default=600, help="batches to train for, each of all points")
    add("--lr", type=POSITIVE, default=3e-3, help="learning rate at the start (AdamW, cosine)")
    add("--seeds", type=COUNT, default=6, help="networks per variant")
    add("--seed", type=SEED, default=0, help="the first of the seeds (default: 0)")
    layers = "of figures 1 and 4: what paths put out, or sums after residuals"
    add("--layers", default="paths", choices=tuple(LAYERS), help=layers)
    add("--model", default="vit_tiny_patch16_224", metavar="NAME", help="timm model of figure 5")
    add("--model-drop-path", type=RATE, default=0.2, metavar="RATE", help="its drop path rate")
    return show_defaults(parser)


def main(argv: list[str] | None = None) -> int:
    """Run `timm-rdp spiral`; returns its exit status."""
    torch.set_num_threads(1)  # layers this small run faster on one than they are shared out
    try:
        args = _parser().parse_args(argv)
        check_installed("matplotlib")
        output = check_output(args.output)
        cycle = algorithm.sample_cycle(args.model, args.model_drop_path, args.seed)
        run(args, output, cycle)
    except UsageError as error:
        return report(error)
    return 0


def run(args: argparse.Namespace, output: Path, cycle: dict[str, Any]) -> None:
    """Train, measure, draw, write."""
    what = (args.points, args.noise, args.turns or (1.75 if args.playground else 1.5))
    if args.playground:  # which holds back a part of its points
        data, unseen = toy.playground_spirals(*what, args.seed)
    else:
        data, unseen = (toy.two_spirals(*what, args.seed + i) for i in range(2))
    measured: dict[str, list[dict[str, float]]] = {v: [] for v in ("untrained", *toy.VARIANTS)}
    first: dict[str, tuple] = {}  # all that was measured of the first seed
    settings = {name: getattr(args, name) for name in ("steps", "lr", "drop_path", "activation")}
    with tqdm(total=len(measured) * args.seeds + 1, unit="network", desc="spiral") as bar:
        for seed in range(args.seed, args.seed + args.seeds):
            for variant in measured:
                own = settings | {"depth": args.depth, "dim": args.dim, "seed": seed}
                own["steps"] *= variant != "untrained"
                found = measure(toy.train(variant, data, **own), unseen)
                measured[variant].append(found[0])
                first.setdefault(variant, found)
                bar.update()
        snapshots = watch_small(args, data, settings)
        bar.update()

    output.mkdir(parents=True, exist_ok=True)
    points = ((*xy, int(c)) for xy, c in zip(data[0].tolist(), data[1], strict=True))
    figure = figures.spirals(*data, radius=5 if args.playground else 1)
    write_figure(output / "fig2_spirals", figure, ("x", "y", "class"), points)
    draw_features(output, first, unseen[1], args.layers)
    draw_training(output, snapshots, args.layers)
    rows = (row.values() for row in cycle["rows"])
    write_figure(output / "fig5_algorithm", algorithm.draw(cycle), cycle["rows"][0], rows)
    values = {
        f"revisit score of {name}, {layers}": {
            variant: [row[f"{measure}_{kind}"] for row in own] for variant, own in measured.items()
        }
        for measure, name in (("cka", "linear CKA"), ("cosine", "cosine"))
        for kind, layers in LAYERS.items()
    }
    header = ("variant", "seed", *measured["plain"][0])
    rows = (
        (variant, seed, *row.values())
        for variant, own in measured.items()
        for seed, row in enumerate(own, start=args.seed)
    )
    write_figure(output / "scores", figures.scores(values), header, rows)
    text = summary(args, measured)
    (output / "summary.txt").write_text(text)
    print(f"{text}\nFigures, their numbers and this summary are in {output}")


@torch.no_grad()
def measure(
    model: toy.ToyNet, data: tuple[Tensor, Tensor]
) -> tuple[dict[str, float], dict[str, Tensor], dict[str, list[Tensor]]]:
    """One network on points it was not trained on: numbers, CKA by kind of layer, and features."""
    features = model.features(data[0])
    row = {"accuracy": toy.accuracy(model, data)}
    cka = {kind: similarity.cka_matrix(layers) for kind, layers in features.items()}
    for kind, layers in features.items():
        row[f"cka_{kind}"] = similarity.revisit_score(cka[kind])
        row[f"cosine_{kind}"] = similarity.revisit_score(similarity.cosine_matrix(layers))
        row[f"rank_{kind}"] = statistics.mean(map(similarity.effective_rank, layers))
    return row, cka, features


def watch_small(args: argparse.Namespace, data: tuple, settings: dict[str, Any]) -> list[tuple]:
    """Train the small plain network of figure 4: (step, accuracy, node histograms) as it goes."""
    # Most happens early: steps spaced by their square root.
    wanted = {round(args.steps * (i / (FRAMES - 1)) ** 2) for i in range(FRAMES)}
    snapshots = []

    @torch.no_grad()
    def watch(step: int, model: toy.ToyNet) -> None:
        if step in wanted:
            histograms = figures.node_histograms(model.features(data[0])[args.layers], data[1])
            snapshots.append((step, toy.accuracy(model, data), histograms))

    # A network this small learns the spirals only with a higher rate than the deep one takes.
    settings = settings | {"lr": args.lr * 4, "depth": args.small_depth, "dim": args.small_dim}
    toy.train("plain", data, **settings, seed=args.seed, watch=watch)
    return snapshots


def draw_features(output: Path, first: dict[str, tuple], label: Tensor, kind: str) -> None:
    """Figures 1 and 3, from what `measure` found of each variant on points of these classes."""
    _, cka, features = first["plain"]
    figures.similarities(cka).savefig(output / "fig3_similarity.png")
    start, *_ = figures.strongest_return(cka[kind])
    write_figure(
        output / "fig1_distributions",
        figures.distributions(features[kind], cka[kind], label, kind),
        ("layer", "point", "class", "first_component", "second_component"),
        (
            (layer, j, int(c), *(f"{v:.5g}" for v in xy))
            for layer, plane in enumerate(aligned_planes(features[kind], start), FIRST[kind])
            for j, (xy, c) in enumerate(zip(plane.tolist(), label, strict=True))
        ),
    )
    rows = [(LAYERS[k], FIRST[k], [cka[k] for _, cka, _ in first.values()]) for k in LAYERS]
    title = "Layer similarity of untrained and trained networks (the first seed of each)"
    figure = similarity_grid(rows, list(first), "linear CKA", title)
    figure.savefig(output / "fig3_variants.png")
    write_csv(
        output / "fig3_similarity.csv",
        ("variant", "layers", "layer", "other_layer", "cka"),
        (
            (variant, k, layer + FIRST[k], other + FIRST[k], f"{value:.6f}")
            for variant, (_, own, _) in first.items()
            for k, matrix in own.items()
            for (layer, other), value in np.ndenumerate(matrix)
        ),
    )


def draw_training(output: Path, snapshots: list[tuple[int, float, Tensor]], kind: str) -> None:
    """Figure 4: strip, animation, numbers."""
    chosen = [snapshots[round(i * (len(snapshots) - 1) / 5)] for i in range(6)]
    write_figure(
        output / "fig4_training",
        figures.training(chosen, kind),
        ("step", "accuracy", "layer", "node", "class", "bin", "points"),
        (
            (step, f"{accuracy:.4f}", layer + FIRST[kind], node + 1, value, b, int(count))
            for step, accuracy, histograms in snapshots
            for (layer, node, value, b), count in np.ndenumerate(histograms)
        ),
    )
    frames = []
    for snapshot in snapshots:
        canvas: Any = figures.training([snapshot], kind).canvas
        canvas.draw()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    # One palette for all frames, or each would bring its own.
    palette = frames[-1].quantize(48, dither=Image.Dither.NONE)
    frames = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    timing = {"duration": [250] * (len(frames) - 1) + [2500], "loop": 0}
    path = output / "fig4_training.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], optimize=True, **timing)


def summary(args: argparse.Namespace, measured: dict[str, list[dict[str, float]]]) -> str:
    """What was run and what came out, as plain text."""
    several = args.seeds > 1
    what = ": mean ± standard deviation" if several else ", so no spread can be given"
    text = (
        f"Two spirals{' of TensorFlow Playground' * args.playground}, {args.points} points; "
        f"residual networks of {args.depth} linear layers ({args.activation}), dimension "
        f"{args.dim}, {args.steps} steps, drop path {args.drop_path}; {args.seeds} seeds{what}. "
        f"All numbers are from {args.points} points that were not trained on. Revisit scores: 0 "
        "where features only stay or drift away, 1 where all are lost and come back. 'paths': what "
        "each path puts out; 'sums': the features after each residual sum. Rank: effective rank, "
        "mean over layers."
    )
    columns = {"accuracy": "accuracy"} | {
        f"{measure}_{kind}": f"{name}, {layers}"
        for measure, name in (("cka", "CKA"), ("cosine", "cosine"), ("rank", "rank"))
        for kind, layers in (("paths", "paths"), ("blocks", "sums"))
    }
    table = ["variant".ljust(11) + "".join(title.rjust(16) for title in columns.values())]
    for variant, own in measured.items():
        table.append(variant.ljust(11))
        for name in columns:
            values = [row[name] for row in own]
            spread = f" ± {statistics.stdev(values):.3f}" if several else ""
            table[-1] += f"{statistics.mean(values):.3f}{spread}".rjust(16)
    return "\n".join([textwrap.fill(text, 100), "", *table]) + "\n"
