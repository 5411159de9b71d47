"""What `timm-rdp features` measured, as figures, tables and text."""

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from timm_rdp.study import figures, measures
from timm_rdp.study.features import similarity

KINDS = {"paths": "path outputs", "blocks": "block outputs"}
# By task: the evaluator's metric beside the loss, as tables and as texts call it.
SCORES = {"classification": ("accuracy", "top-1"), "multilabel": ("map", "mean average precision")}


@dataclass
class Network:
    """What was measured of one network."""

    label: str
    kinds: dict[str, dict[str, Any]]  # by a key of KINDS: what `_measure` returns
    measures: dict[str, Any]  # see measures.measure; {} where it has not the images' classes
    skipped: set[str]  # layers whose output is no feature per image


def write(
    args: argparse.Namespace,
    output: Path,
    images: str,
    score: tuple[str, str],
    networks: list[Network],
) -> None:
    """Figures, tables, summary; `images` says what was passed through the networks."""
    output.mkdir(parents=True, exist_ok=True)
    labels = [network.label for network in networks]
    kinds = {kind: [n.kinds[kind] for n in networks] for kind in networks[0].kinds}
    grid = [(KINDS[kind], 0, [own["cka"] for own in each]) for kind, each in kinds.items()]
    title = f"Layer similarity in {args.model}, {images}"
    figures.write_figure(
        output / "similarity",
        figures.similarity_grid(grid, labels, "similarity (linear CKA)", title),
        ("network", "layers", "number", "name", "other_number", "other_name", "cka", "cosine"),
        (
            (n.label, kind, i, a, j, b, f"{own['cka'][i, j]:.6f}", f"{own['cosine'][i, j]:.6f}")
            for n in networks
            for kind, own in n.kinds.items()
            for i, a in enumerate(own["names"])
            for j, b in enumerate(own["names"])
        ),
    )
    ranks = [(KINDS[kind], [own["ranks"] for own in each]) for kind, each in kinds.items()]
    title = f"Dimensions that the features of {args.model} use"
    figure = figures.lines_per_layer(ranks, labels, "effective rank (dimensions)", title)
    figure.savefig(output / "rank.png")
    header = ("network", "layers", "number", "name", "width", "effective_rank", "rebound")
    figures.write_csv(output / "layers.csv", header, _layers(networks))
    if "importance" in networks[0].measures:
        importance = [network.measures["importance"] for network in networks]
        rises = torch.tensor([[rise for *_, rise in own.values()] for own in importance])
        figures.write_figure(
            output / "importance",
            figures.path_importance(list(importance[0]), rises, labels),
            ("network", "path", "loss", score[0], "loss_rise"),
            (
                (label, path, *(f"{value:.6f}" for value in values))
                for label, own in zip(labels, importance, strict=True)
                for path, values in own.items()
            ),
        )
    removed = [(n.label, k, *s) for n in networks for k, s in n.measures.get("removed", {}).items()]
    if args.remove and removed:
        header = ("network", "paths_removed", *measures.COLUMNS)
        figures.write_csv(output / "removal.csv", header, removed)
    text = summary(args, images, score[1], networks)
    (output / "summary.txt").write_text(text)
    print(text)
    print(f"Figures, their numbers and this summary are in {output}")


def _layers(networks: list[Network]) -> Iterator[tuple]:
    for network, (kind, own) in ((n, item) for n in networks for item in n.kinds.items()):
        climbs = similarity.rebounds(own["cka"]).tolist() if len(own["names"]) > 2 else []
        climbs = [*(f"{climb:.6f}" for climb in climbs), "", ""]
        columns = zip(own["names"], own["widths"], own["ranks"], climbs, strict=False)
        for i, (name, width, rank, climb) in enumerate(columns):
            yield network.label, kind, i, name, width, f"{rank:.4f}", climb


def summary(args: argparse.Namespace, images: str, score: str, networks: list[Network]) -> str:
    """What was measured, as plain text."""
    folder = f"--data-dir {args.data_dir}" if args.data_dir else "the demo (handwritten digits)"
    folder = args.dataset or folder
    lines = [
        f"{args.model}: {images} from {folder}",
        f"CKA: linear, {args.cka}; positions pooled: {args.pool}; revisit score: 0 where features "
        "only stay or drift away, 1 where all are lost and come back",
    ]
    for network in networks:
        lines += ["", network.label]
        if own := network.measures:
            lines.append(f"  loss {own['loss']:.4f}, {score} {own['score']:.2%}")
            lines += measures.told(own)
        for kind, own in network.kinds.items():
            revisits = "needs 3 layers or more"
            if len(own["names"]) > 2:
                cka, cosine = map(similarity.revisit_score, (own["cka"], own["cosine"]))
                revisits = f"{cka:.3f} by CKA, {cosine:.3f} by cosine"
            what = f"{len(own['names'])} {KINDS[kind]}: revisit score {revisits}"
            lines.append(f"  {what}; mean effective rank {statistics.mean(own['ranks']):.1f}")
        if importance := network.measures.get("importance"):
            rises = {path: rise for path, (*_, rise) in importance.items()}
            ranked = [f"{p} {rises[p]:+.4f}" for p in sorted(rises, key=lambda p: -rises[p])]
            lines.append(f"  paths whose loss matters most: {'; '.join(ranked[:3])}")
            lines.append(f"  paths that matter least: {'; '.join(ranked[-3:])}")
        if network.skipped:
            skipped = ", ".join(sorted(network.skipped))
            lines.append(f"  not a feature per image, left out: {skipped}")
    return "\n".join(lines) + "\n"
