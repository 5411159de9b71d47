"""`timm-rdp spiral`: the paper's toy study, with numbers under its pictures."""

import argparse
import statistics
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from timm_rdp.errors import UsageError
from timm_rdp.study.features.similarity import (
    cka_matrix,
    cosine_matrix,
    effective_rank,
    revisit_score,
)
from timm_rdp.study.figures import check_matplotlib, pixels, save, similarity_grid
from timm_rdp.study.outputs import write_csv
from timm_rdp.study.spiral import algorithm, toy
from timm_rdp.study.spiral import figures as toy_figures
from timm_rdp.training.files import check_output

MEASURES = {
    "cka_paths": "linear CKA, path outputs",
    "cka_blocks": "linear CKA, after each residual sum",
    "cosine_paths": "cosine, path outputs",
    "cosine_blocks": "cosine, after each residual sum",
}
UNTRAINED = "untrained"
FRAMES = 24


def build_parser() -> argparse.ArgumentParser:
    """The options of `timm-rdp spiral`."""
    parser = argparse.ArgumentParser(
        prog="timm-rdp spiral",
        description="The paper's toy study: trains plain, DropPath and RDP networks on two spirals "
        "and writes figures, the numbers behind them as CSV, and a summary.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", default="output/spiral", metavar="DIR", help="folder to write into")
    add("--points", type=int, default=400, help="points of both spirals together")
    add("--turns", type=float, default=1.5, help="turns of each spiral")
    add("--noise", type=float, default=0.02, help="noise of the points; the radius is 1")
    add("--depth", type=int, default=32, help="residual layers of the network")
    add("--dim", type=int, default=32, help="its hidden dimension")
    add("--small-depth", type=int, default=6, help="layers of the network of figure 4")
    add("--small-dim", type=int, default=6, help="its hidden dimension")
    add("--activation", default="gelu", choices=tuple(toy.ACTIVATIONS), help="on each path")
    add("--drop-path", type=float, default=0.2, help="rate of the last layer's DropPath")
    add("--steps", type=int, default=600, help="batches to train for, each of all points")
    add("--lr", type=float, default=3e-3, help="learning rate at the start (AdamW, cosine)")
    add("--seeds", type=int, default=6, help="networks per variant")
    add("--seed", type=int, default=0, help="the first of the seeds")
    add(
        "--layers",
        default="paths",
        choices=("paths", "blocks"),
        help="layers of figures 1 and 4: what "
        "each path puts out, or the sums after the residual connections",
    )
    add("--model", default="vit_tiny_patch16_224", help="timm model of figure 5")
    add("--model-drop-path", type=float, default=0.2, help="its drop path rate")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises UsageError for options that cannot be followed, before any work."""
    least = {"points": 4, "depth": 3, "dim": 2, "small_depth": 3, "small_dim": 1, "steps": 1}
    least |= {"seeds": 1, "seed": 0}
    for name, low in least.items():
        value = getattr(args, name)
        if value < low:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be {low} or more")
    for name in ("drop_path", "model_drop_path"):
        value = getattr(args, name)
        if not 0 < value < 1:
            raise UsageError(
                f"--{name.replace('_', '-')} {value}: must lie between 0 and 1, both excluded"
            )
    for name in ("lr", "turns"):
        value = getattr(args, name)
        if not 0 < value < float("inf"):
            raise UsageError(f"--{name} {value}: must be a number above 0")
    if not 0 <= args.noise < float("inf"):
        raise UsageError(f"--noise {args.noise}: must be a number, 0 or more")
    check_matplotlib()
    check_output(args.output)


def main(argv: list[str] | None = None) -> int:
    """Run `timm-rdp spiral`; returns its exit status."""
    args = build_parser().parse_args(argv)
    threads = torch.get_num_threads()
    # Layers this small run faster on one thread than they are shared out.
    torch.set_num_threads(1)
    try:
        check(args)
        cycle = algorithm.sample_cycle(args.model, args.model_drop_path, args.seed)
        run(args, cycle)
    except UsageError as error:
        print(f"timm-rdp spiral: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    return 0


def run(args: argparse.Namespace, cycle: algorithm.CycleOfModel) -> None:
    """Train, measure, draw, write."""
    data = toy.two_spirals(args.points, args.noise, args.turns, args.seed)
    unseen = toy.two_spirals(args.points, args.noise, args.turns, args.seed + 1)
    variants = (UNTRAINED, *toy.VARIANTS)
    measured = {variant: [] for variant in variants}
    first = {}  # of each variant, the matrices of the first seed
    settings = {
        "steps": args.steps,
        "lr": args.lr,
        "drop_path": args.drop_path,
        "activation": args.activation,
    }
    bar = tqdm(total=len(variants) * args.seeds + 1, unit="network", desc="spiral")
    for seed in range(args.seed, args.seed + args.seeds):
        for variant in variants:
            sizes = {"depth": args.depth, "dim": args.dim}
            if variant == UNTRAINED:
                torch.manual_seed(seed)
                model = toy.ToyNet(**sizes, activation=args.activation).eval()
            else:
                model = toy.train(variant, data, **sizes, **settings, seed=seed)
            row, matrices, features = measure(model, unseen)
            measured[variant].append({"variant": variant, "seed": seed, **row})
            first.setdefault(variant, (matrices, features))
            bar.update()
    snapshots = watch_small(args, data, settings)
    bar.update()
    bar.close()

    output = check_output(args.output)
    output.mkdir(parents=True, exist_ok=True)
    draw_toy(args, output, data, unseen[1], first)
    draw_training(output, snapshots, args.layers)
    draw_algorithm(output, cycle)
    values = {m: {v: [row[m] for row in measured[v]] for v in variants} for m in MEASURES}
    labels = {m: f"revisit score of {text}" for m, text in MEASURES.items()}
    save(toy_figures.scores(values, labels), output / "scores.png")
    rows = [row for own in measured.values() for row in own]
    write_csv(output / "scores.csv", rows[0].keys(), (row.values() for row in rows))
    text = summary(args, measured)
    (output / "summary.txt").write_text(text)
    print(text)
    print(f"Figures, their numbers and this summary are in {output}")


def measure(model: toy.ToyNet, data: tuple) -> tuple[dict[str, float], dict, dict]:
    """One network's numbers on points it was not trained on.

    Returns:
        the numbers by name; {"paths": CKA (layers, layers), "blocks": ...}; its features
    """
    x, y = data
    with torch.no_grad():
        features = model.features(x)
        row = {"accuracy": (model(x).argmax(1) == y).float().mean().item()}
    cka = {kind: cka_matrix(layers) for kind, layers in features.items()}
    for kind, layers in features.items():
        row[f"cka_{kind}"] = revisit_score(cka[kind])
        row[f"cosine_{kind}"] = revisit_score(cosine_matrix(layers))
        row[f"rank_{kind}"] = statistics.mean(effective_rank(layer) for layer in layers)
    return row, cka, features


def watch_small(args: argparse.Namespace, data: tuple, settings: dict) -> list[tuple]:
    """Train the small plain network of figure 4: (step, accuracy, node histograms) as it goes."""
    x, y = data
    # Most happens early: steps spaced by their square root.
    wanted = {round(args.steps * (i / (FRAMES - 1)) ** 2) for i in range(FRAMES)}
    snapshots = []

    def watch(step: int, model: toy.ToyNet) -> None:
        if step not in wanted:
            return
        with torch.no_grad():
            layers = model.features(x)[args.layers]
            accuracy = (model(x).argmax(1) == y).float().mean().item()
        snapshots.append((step, accuracy, toy_figures.node_histograms(layers, y)))

    # A network this small learns the spirals only with a higher rate than the deep one takes.
    toy.train(
        "plain",
        data,
        depth=args.small_depth,
        dim=args.small_dim,
        seed=args.seed,
        watch=watch,
        **settings | {"lr": args.lr * 4},
    )
    return snapshots


def draw_toy(args: argparse.Namespace, output: Path, data: tuple, label, first: dict) -> None:
    """Figures 1, 2 and 3, figure 3 of all variants, and the numbers behind them."""
    save(toy_figures.spirals(*data), output / "fig2_spirals.png")
    points = ([*xy, int(c)] for xy, c in zip(data[0].tolist(), data[1], strict=True))
    write_csv(output / "fig2_spirals.csv", ("x", "y", "class"), points)

    cka, features = first["plain"]
    layers = features[args.layers]
    save(
        toy_figures.distributions(layers, cka[args.layers], label, args.layers),
        output / "fig1_distributions.png",
    )
    start = toy_figures.strongest_return(cka[args.layers], toy_figures.several(len(layers)))[0]
    offset = toy_figures.FIRST[args.layers]
    planes = toy_figures.aligned_planes(layers, start)
    write_csv(
        output / "fig1_distributions.csv",
        ("layer", "point", "class", "first_component", "second_component"),
        (
            (i + offset, j, int(c), *(f"{v:.5g}" for v in xy))
            for i, plane in enumerate(planes)
            for j, (xy, c) in enumerate(zip(plane.tolist(), label, strict=True))
        ),
    )
    save(toy_figures.similarities(cka), output / "fig3_similarity.png")
    kinds = [
        (toy_figures.LAYERS[k], toy_figures.FIRST[k], [m[0][k] for m in first.values()])
        for k in cka
    ]
    title = "Layer similarity of untrained and trained networks (the first seed of each)"
    figure = similarity_grid(kinds, list(first), "linear CKA", title)
    save(figure, output / "fig3_variants.png")
    write_csv(
        output / "fig3_similarity.csv",
        ("variant", "layers", "layer", "other_layer", "cka"),
        (
            (
                variant,
                kind,
                i + toy_figures.FIRST[kind],
                j + toy_figures.FIRST[kind],
                f"{value:.6f}",
            )
            for variant, (matrices, _) in first.items()
            for kind, matrix in matrices.items()
            for i, line in enumerate(matrix.tolist())
            for j, value in enumerate(line)
        ),
    )


def draw_training(output: Path, snapshots: list[tuple], kind: str) -> None:
    """Figure 4: strip, animation, numbers."""
    chosen = [snapshots[round(i * (len(snapshots) - 1) / 5)] for i in range(6)]
    save(toy_figures.training_strip(chosen, kind), output / "fig4_training.png")
    frames = [Image.fromarray(pixels(toy_figures.training_frame(*s, kind))) for s in snapshots]
    # One palette for all frames, or each would bring its own.
    palette = frames[-1].quantize(48, dither=Image.Dither.NONE)
    frames = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    frames[0].save(
        output / "fig4_training.gif",
        save_all=True,
        append_images=frames[1:],
        duration=[250] * (len(frames) - 1) + [2500],
        loop=0,
        optimize=True,
    )
    write_csv(
        output / "fig4_training.csv",
        ("step", "accuracy", "layer", "node", "class", "bin", "points"),
        (
            (
                step,
                f"{accuracy:.4f}",
                layer + toy_figures.FIRST[kind],
                node + 1,
                value,
                b,
                int(count),
            )
            for step, accuracy, histograms in snapshots
            for layer, nodes in enumerate(histograms.tolist())
            for node, classes in enumerate(nodes)
            for value, bins in enumerate(classes)
            for b, count in enumerate(bins)
        ),
    )


def draw_algorithm(output: Path, cycle: algorithm.CycleOfModel) -> None:
    """Figure 5 and its numbers."""
    save(algorithm.draw(cycle), output / "fig5_algorithm.png")
    write_csv(
        output / "fig5_algorithm.csv",
        ("cycle", *vars(cycle.rows[0])),
        ((cycle.cycle, *vars(row).values()) for row in cycle.rows),
    )


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation as text."""
    values = list(values)
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def summary(args: argparse.Namespace, measured: dict[str, list[dict[str, float]]]) -> str:
    """What was run and what came out, as plain text."""
    columns = {
        "accuracy": "accuracy",
        "cka_paths": "CKA, paths",
        "cka_blocks": "CKA, sums",
        "cosine_paths": "cosine, paths",
        "cosine_blocks": "cosine, sums",
        "rank_paths": "rank, paths",
        "rank_blocks": "rank, sums",
    }
    several = args.seeds > 1
    lines = [
        textwrap.fill(
            f"Two spirals, {args.points} points; residual networks of {args.depth} linear layers "
            f"({args.activation}), dimension {args.dim}, {args.steps} steps, drop path "
            f"{args.drop_path}; {args.seeds} seeds"
            + (": mean ± standard deviation." if several else ", so no spread can be given.")
            + f" All numbers are from {args.points} points that were not trained on. Revisit "
            "scores: 0 where features only stay or drift away, 1 where all are lost and come back. "
            "'paths': what each path puts out; 'sums': the features after each residual sum. "
            "Rank: effective rank, mean over layers.",
            100,
        ),
        "",
        "".join(["variant".ljust(11), *(text.rjust(16) for text in columns.values())]),
    ]
    for variant, rows in measured.items():
        cells = (spread(row[name] for row in rows).rjust(16) for name in columns)
        lines.append("".join([variant.ljust(11), *cells]))
    return "\n".join(lines) + "\n"
