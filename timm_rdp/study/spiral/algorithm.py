"""Fig. 5 of the paper: a cycle's stages, drawn from a real mask of a real model."""

from collections import Counter
from itertools import groupby
from typing import Any

from timm_rdp import ResidualDropPath
from timm_rdp.core.rdp import COMPLEMENT
from timm_rdp.errors import UsageError, refused_with
from timm_rdp.study import figures
from timm_rdp.training.model import create_model

# What a path does in a stage, in the legend's words.
RUNS, TRAINED, FROZEN = "runs", "runs and is trained", "runs, frozen"
DROPPED = "dropped: not run, not trained"
STYLE: dict[str, dict[str, Any]] = {
    RUNS: {"facecolor": "#e3e3e3", "edgecolor": "black"},
    TRAINED: {"facecolor": figures.BLUE, "edgecolor": "black"},
    FROZEN: {"facecolor": "#f4f4f4", "edgecolor": "#6a6a6a", "hatch": "////"},
    DROPPED: {"facecolor": "white", "edgecolor": "#d55e00", "linestyle": "--"},
}


def sample_cycle(name: str, drop_path: float, seed: int) -> dict[str, Any]:
    """The first RDP cycle of a timm model in which a path is dropped.

    Its "rows" are a path each, as in the table behind the figure; parameters count by element.
    """
    model = create_model(name, drop_path_rate=drop_path)
    with refused_with(f"--model {name}"):
        rdp = ResidualDropPath(model, seed=seed)
    size = {n: p.numel() for n, p in model.named_parameters()}
    count = lambda names: sum(size[n] for n in names)
    droppath = complement = rdp.iteration()
    while complement.phase != COMPLEMENT and complement.cycle < 10_000:
        droppath, complement = complement, rdp.iteration()
        with complement:  # nothing is trained in it
            pass
    if complement.phase != COMPLEMENT:
        raise UsageError(f"--model-drop-path {drop_path}: nothing is dropped; give a higher one")
    rows = [
        {
            "cycle": droppath.cycle,
            "name": path.name,
            "drop_prob": path.drop_prob,
            "kept": path.name not in droppath.dropped,
            "parameters": count(path.parameters),
            "trained_in_complement": count(complement.trainable.intersection(path.parameters)),
        }
        for path in rdp.paths
    ]
    return {
        "model": name,
        "cycle": droppath.cycle,
        "rows": rows,
        "parameters": sum(size.values()),
        "trained_in_droppath": count(droppath.trainable),
        "trained_in_complement": count(complement.trainable),
    }


def draw(cycle: dict[str, Any]) -> "figures.Figure":
    """Fig. 5: three stages, one box a path, the residual stream below the boxes."""
    from matplotlib.patches import Patch

    rows = cycle["rows"]
    names = [row["name"] for row in rows]
    # Names of blocks are turned where they would not fit below their paths.
    paths = Counter(map(_block, names))
    turned = any(len(block) > 180 / len(names) * count for block, count in paths.items())
    title = (
        "One ResidualDroppath cycle on {model}: the mask of cycle {cycle}\n(a box is a path; "
        "the line below is the residual stream, with all that is on no path at its ends)"
    )
    figure = figures.new_figure(6.6 if turned else 5.3, title=title.format(**cycle))
    dropped = f"{sum(not row['kept'] for row in rows)} of {len(rows)} paths dropped"
    share = lambda n: f"{n / 1e6:.2f} of {cycle['parameters'] / 1e6:.2f} M parameters"
    second = "Complement iteration: every path runs, only the dropped part is trained"
    stages = {
        "Inference: every path runs": ([RUNS] * len(rows), RUNS),
        f"Droppath iteration: {dropped}, {share(cycle['trained_in_droppath'])} trained": (
            [TRAINED if row["kept"] else DROPPED for row in rows],
            TRAINED,
        ),
        f"{second}, {share(cycle['trained_in_complement'])}": (
            [TRAINED if row["trained_in_complement"] else FROZEN for row in rows],
            FROZEN,
        ),
    }
    for axes, (title, (states, rest)) in zip(figure.subplots(3, 1), stages.items(), strict=True):
        axes.set_title(title, fontsize=9.5, loc="left")
        _stage(axes, names, states, rest, turned)
    handles = [Patch(label=state, **style) for state, style in STYLE.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8.5, frameon=False)
    return figure


def _block(name: str) -> str:
    return name.partition("#")[0].rpartition(".")[0]


def _stage(
    axes: "figures.Axes", names: list[str], states: list[str], rest: str, turned: bool
) -> None:
    """The network in one stage; `rest` is what everything does that is on no path."""
    end = len(names) + 1
    axes.set(xlim=(-0.6, end + 0.6), ylim=(-1.45 if turned else -0.65, 1.15))
    axes.axis("off")
    axes.plot([-0.3, end + 0.3], [0, 0], color="black", linewidth=1, zorder=0)
    paths = [(x, 0.7, 0.28, state) for x, state in enumerate(states, start=1)]
    for x, y, half, state in ((0, 0, 0.36, rest), *paths, (end, 0, 0.36, rest)):
        axes.bar(x, 0.54, 2 * half, y - 0.27, linewidth=1, zorder=2, **STYLE[state])
        if y:
            wire = {"color": "#bbbbbb" if state == DROPPED else "black", "linewidth": 0.8}
            axes.plot([x - 0.42, x - 0.42, x + 0.42, x + 0.42], [0, y, y, 0], zorder=1, **wire)
            axes.plot(x + 0.42, 0, "o", color="black", markersize=2.5)
        if state == DROPPED:
            size = min(7, 160 / end)
            axes.plot(x, y, "x", color=STYLE[state]["edgecolor"], markersize=size, zorder=3)
    end = 0
    for block, own in groupby(names, _block):
        first, end = end, end + len(list(own))
        axes.plot([first + 0.6, end + 0.4], [-0.2, -0.2], color="#6a6a6a", linewidth=0.8)
        look = {"ha": "center", "va": "top", "fontsize": 6, "rotation": 90 * turned}
        axes.text((first + end + 1) / 2, -0.3, block[-16:], **look)
