"""The figures of `timm-rdp spiral`, each after a caption of the paper (arXiv 2411.09475)."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_rdp.study import figures
from timm_rdp.study.features.similarity import revisit_score
from timm_rdp.study.figures import BLUE, GREY, RED, new_figure

FIRST = {"paths": 1, "blocks": 0}  # number of the first layer: 0 is the embedding
LAYERS = {"paths": "path outputs", "blocks": "after each residual sum"}


def _scatter(axes: "figures.Axes", xy: Tensor, label: Tensor, size: float) -> None:
    for value, colour, marker in ((0, RED, "o"), (1, BLUE, "x")):
        x, y = xy[label == value].T.numpy()
        look = {"c": colour, "marker": marker, "linewidths": size**0.5 / 5}
        axes.scatter(x, y, s=size, label=f"class {value}", **look)
    axes.set_aspect("equal")


def spirals(xy: Tensor, label: Tensor, radius: int = 1) -> "figures.Figure":
    """Fig. 2: the points. xy is (points, 2), label (points,)."""
    figure = new_figure(height=5.2, width=4.8)
    axes = figure.subplots()
    _scatter(axes, xy, label, 14)
    axes.set_xlabel(f"first coordinate (spiral radius = {radius})")
    axes.set_ylabel("second coordinate")
    axes.set_title(f"Two spirals, two classes, {len(xy)} points", fontsize=11)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def aligned_planes(layers: list[Tensor], reference: int) -> list[Tensor]:
    """Every layer, (samples, dim), from the side that looks most like the reference layer's plane.

    That plane is the reference's first two principal components. The others are projected on the
    orthonormal pair of directions that an orthogonal Procrustes fit finds, centred and scaled:
    (samples, 2). Turning, mirroring and scaling is what CKA does not see either.
    """
    centred = [layer.double() - layer.double().mean(0) for layer in layers]
    u, s, _ = torch.linalg.svd(centred[reference], full_matrices=False)
    target = u[:, :2] * s[:2]
    planes = []
    for layer in centred:
        u, _, v = torch.linalg.svd(layer.T @ target, full_matrices=False)
        plane = layer @ (u @ v)
        planes.append(plane / plane.square().sum(1).mean().sqrt().clamp(min=1e-12))
    return planes


def strongest_return(similarity: Tensor) -> tuple[int, int, int]:
    """The layer that is lost and found most clearly: (it, where it is lost, where it is back).

    It is back "several transformations" later: after an eighth of the layers, at least 2.
    """
    apart = max(2, len(similarity) // 8)
    best, found = -1.0, (0, 0, 0)
    for i in range(len(similarity) - apart):
        s = similarity[i, i:]
        climb = s - s.cummin(0).values
        k = apart + int(climb[apart:].argmax())
        if climb[k] > best:
            best, found = climb[k].item(), (i, i + int(s[: k + 1].argmin()), i + k)
    return found


def distributions(
    layers: list[Tensor], similarity: Tensor, label: Tensor, kind: str
) -> "figures.Figure":
    """Fig. 1: the points as every layer sees them; the strongest return is framed.

    `layers` are (samples, dim) each, `similarity` is their CKA, `label` has the classes (samples,).
    """
    start, lost, back = strongest_return(similarity)
    first = FIRST[kind]
    rows, columns = -(-len(layers) // 8), 8
    title = (
        f"Features that come back: layer {start + first}'s are lost by layer {lost + first} (CKA "
        f"{similarity[start, lost]:.2f}) and return in layer {back + first} "
        f"({similarity[start, back]:.2f})"
    )
    figure = new_figure(height=1.13 * rows + 0.9, title=title)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(layers) :]:
        axes.set_visible(False)
    frames = {start: ": starts", lost: ": lost", back: ": back"}
    for i, (plane, axes) in enumerate(zip(aligned_planes(layers, start), grid, strict=False)):
        _scatter(axes, plane, label, 2)
        reach = plane.abs().quantile(0.99).item() * 1.25
        axes.set(xticks=[], yticks=[], xlim=(-reach, reach), ylim=(-reach, reach))
        weight, width, colour = ("bold", 2.2, "black") if i in frames else ("normal", 0.5, GREY)
        title = f"layer {i + first}{frames.get(i, '')}"
        axes.set_title(title, fontsize=8, fontweight=weight, pad=3)
        axes.spines[:].set(linewidth=width, color=colour)
    view = f"{LAYERS[kind]} in the plane most like layer {start + first}'s: first axis "
    figure.supxlabel(f"{view}(red ●: class 0, blue ×: class 1)", fontsize=9)
    figure.supylabel("second axis (no unit)", fontsize=9)
    return figure


def similarities(similarity: dict[str, Tensor]) -> "figures.Figure":
    """Fig. 3: heatmaps of CKA, by kind, and the row of the clearest return as a curve."""
    figure = new_figure(height=6.1)
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.75, 1))
    top, bottom = halves
    maps = top.subplots(1, 2)
    curves = bottom.subplots(1, 2, sharey=True)
    scale = figures.colour_range(list(similarity.values()))
    for (kind, matrix), upper, lower in zip(similarity.items(), maps, curves, strict=True):
        first = FIRST[kind]
        figures.heatmap(upper, matrix, scale, first)
        upper.set(xlabel="layer number", ylabel="layer number")
        score = revisit_score(matrix)
        upper.set_title(f"{LAYERS[kind]}: revisit score {score:.2f}", fontsize=10)

        start, lost, back = strongest_return(matrix)
        row = matrix[start].numpy()
        lower.plot(np.arange(len(row)) + first, row, color=BLUE, marker="o", markersize=3)
        lower.axvline(start + first, color=GREY, linestyle=":")
        for at, text, offset in ((lost, "lost", -17), (back, "back", 9)):
            if row[back] - row[lost] >= 0.05:
                point = (at + first, row[at])
                lower.plot(*point, "s", color=RED, markeredgecolor="black", markersize=8)
                where = {"xytext": (0, offset), "textcoords": "offset points", "ha": "center"}
                lower.annotate(text, point, fontsize=8, **where)
        lower.set(xlabel="layer number", ylim=(-0.2, 1.25), yticks=(0, 0.5, 1))
        lower.set_ylabel(f"CKA with layer {start + first}", fontsize=9)
        lower.grid(alpha=0.3)
        lower.locator_params("x", nbins=8, integer=True)
    top.colorbar(maps[0].images[0], ax=maps, label="similarity (linear CKA)", shrink=0.85)
    title = "Similarity between the layers of the plain network, and where it returns after a fall"
    top.suptitle(title, fontsize=11)
    return figure


def node_histograms(layers: list[Tensor], label: Tensor, bins: int = 16) -> Tensor:
    """Distribution of every node in every layer, by class: counts, (layers, dim, 2 classes, bins).

    The bins span 2.5 standard deviations to both sides of the node's mean in that layer (the
    outermost take what lies beyond), so that shapes are compared and scale is not, as in CKA. A
    node that is constant has empty bins.
    """
    x = torch.stack(layers).double()
    x = x - x.mean(1, keepdim=True)
    deviation = x.std(1, keepdim=True)
    place = (x / deviation.clamp(min=1e-6) + 2.5) / 5 * bins
    one_hot = F.one_hot(place.clamp(0, bins - 1).long(), bins) * (deviation > 1e-6)[..., None]
    return torch.stack([one_hot[:, label == value].sum(1) for value in (0, 1)], dim=2)


def overlap(histograms: Tensor) -> Tensor:
    """Shared share of two layers' distributions of each node: (dim, layers, layers), in [0, 1]."""
    p = histograms.flatten(2).transpose(0, 1)
    p = p / p.sum(-1, keepdim=True).clamp(min=1)
    return torch.minimum(p[:, :, None], p[:, None]).sum(-1)


def _nodes(axes: "figures.Axes", histograms: Tensor, first: int, title: str) -> None:
    """A grid of small histograms: a row a node, a column a layer; clear returns are framed.

    All in one axes, a cell a unit square: an axes a cell takes a minute to lay out.
    """
    from matplotlib.patches import Rectangle

    layers, dim, _, bins = histograms.shape
    peak = histograms.amax((2, 3), keepdim=True).clamp(min=1)
    heights = np.pad(histograms / peak * 0.4, ((0, 0), (0, 0), (0, 0), (0, 1)))  # 0 between cells
    edges = (np.arange(layers)[:, None] + np.linspace(0.08, 0.92, bins + 1)).ravel()
    for node, matrix in enumerate(overlap(histograms)):
        for value, colour, sign in ((0, RED, -1), (1, BLUE, 1)):  # nodes count downwards
            tops = node + 0.5 + sign * heights[:, node, value].ravel()[:-1]
            axes.stairs(tops, edges, baseline=node + 0.5, fill=True, color=colour, linewidth=0)
        start, lost, back = strongest_return(matrix)
        framed = (start, back) if matrix[start, back] - matrix[start, lost] >= 0.2 else ()
        for layer in range(layers):
            look: dict[str, Any] = {"edgecolor": GREY, "linewidth": 0.4}
            if layer in framed:
                look = {"edgecolor": "black", "linewidth": 1.8, "zorder": 3}
            corner = (layer + 0.04, node + 0.04)
            axes.add_patch(Rectangle(corner, 0.92, 0.92, facecolor="none", **look))
    axes.set(xlim=(0, layers), ylim=(dim, 0))
    axes.set_xticks(np.arange(layers) + 0.5, [str(i + first) for i in range(layers)])
    axes.set_yticks(np.arange(dim) + 0.5, [str(n + 1) for n in range(dim)])
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=9)


def training(snapshots: list[tuple[int, float, Tensor]], kind: str) -> "figures.Figure":
    """Fig. 4: the distributions of every node in every layer, at some steps of the training.

    Snapshots are (step, accuracy, histograms); one alone makes a frame of the animation.
    """
    columns, one = min(3, len(snapshots)), len(snapshots) == 1
    rows = -(-len(snapshots) // columns)
    title = (
        f"Distribution of every node's value in every layer during training ({LAYERS[kind]});\n"
        "framed: a distribution that a node leaves and comes back to in a later layer"
    )
    figure = new_figure(4.2, 4.8) if one else new_figure(2.75 * rows + 0.8, title=title)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, (step, accuracy, histograms) in zip(panels, snapshots, strict=False):
        _nodes(panel, histograms, FIRST[kind], f"step {step}, accuracy {accuracy:.0%}")
    figure.supxlabel("layer number; in each box: value of the node, ±2.5 deviations", fontsize=9)
    figure.supylabel("node; in each box: points (red: class 0; blue: 1)", fontsize=9)
    return figure


def scores(values: dict[str, dict[str, list[float]]]) -> "figures.Figure":
    """The scores, {measure: {variant: one a seed}}: a panel a measure, a column a variant."""
    rows = -(-len(values) // 2)
    count = max(len(own) for variants in values.values() for own in variants.values())
    title = f"How much features come back: {count} seeds a variant (dots) and their mean (bars)"
    figure = new_figure(height=2.3 * rows + 0.9, title=title)
    grid = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes, (measure, variants) in zip(grid, values.items(), strict=False):
        for x, own in enumerate(variants.values()):
            spread = np.linspace(-0.15, 0.15, len(own)) if len(own) > 1 else 0
            axes.plot(x + spread * np.ones(len(own)), own, "o", color=BLUE, ms=4, alpha=0.75)
            axes.hlines(np.mean(own), x - 0.3, x + 0.3, color=RED, linewidth=2.5)
        axes.set_xticks(range(len(variants)), variants)
        axes.set(xlim=(-0.5, len(variants) - 0.5), ylim=(0, None))
        axes.set_ylabel("revisit score", fontsize=9)
        axes.set_title(measure, fontsize=9)
        axes.grid(axis="y", alpha=0.3)
    return figure
