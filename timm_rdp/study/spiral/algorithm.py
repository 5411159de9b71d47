"""Fig. 5 of the paper: a cycle's stages, drawn from a real mask of a real model."""

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import timm

import timm_rdp
from timm_rdp.errors import UsageError
from timm_rdp.study.features.models import check_model_name, one_line
from timm_rdp.study.figures import BLUE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PER_LINE = 24
RUNS, TRAINED, FROZEN, DROPPED = "runs", "trained", "frozen", "dropped"
LEGEND = {
    RUNS: "runs",
    TRAINED: "runs and is trained",
    FROZEN: "runs, frozen",
    DROPPED: "dropped: not run, not trained",
}
STYLE = {
    RUNS: {"facecolor": "#e3e3e3", "edgecolor": "black"},
    TRAINED: {"facecolor": BLUE, "edgecolor": "black"},
    FROZEN: {"facecolor": "#f4f4f4", "edgecolor": "#6a6a6a", "hatch": "////"},
    DROPPED: {"facecolor": "white", "edgecolor": "#d55e00", "linestyle": "--"},
}


@dataclass
class PathRow:
    """One path of the cycle that is drawn."""

    name: str
    drop_prob: float
    kept: bool
    parameters: int  # numbers, not tensors
    trained_in_complement: int


@dataclass
class CycleOfModel:
    """What one RDP cycle does to a model."""

    model: str
    cycle: int
    rows: list[PathRow]
    parameters: int
    trained_in_droppath: int
    trained_in_complement: int


def sample_cycle(name: str, drop_path: float, seed: int) -> CycleOfModel:
    """Create a timm model and take its first RDP cycle in which a path is dropped.

    Raises:
        UsageError: unknown model, or one without residual paths.
    """
    check_model_name(name)
    try:
        model = timm.create_model(name, drop_path_rate=drop_path)
    except TypeError as error:
        raise UsageError(
            f"--model {name} takes no drop path rate and so has no paths ({one_line(error)}): "
            "use one that does, e.g. vit_tiny_patch16_224"
        ) from error
    try:
        rdp = timm_rdp.ResidualDropPath(model, seed=seed)
    except ValueError as error:
        raise UsageError(f"--model {name}: {one_line(error)}") from error
    size = {n: p.numel() for n, p in model.named_parameters()}
    count = lambda names: sum(size[n] for n in names)
    complement = None
    for _ in range(10_000):
        droppath, *rest = _skip_through(rdp)
        if rest:
            complement = rest[0]
            break
    if complement is None:
        raise UsageError(
            f"--model-drop-path {drop_path}: nothing was dropped in 10000 cycles; give a higher one"
        )
    rows = [
        PathRow(
            path.name,
            path.drop_prob,
            path.name not in droppath.dropped,
            count(path.parameters),
            count(set(path.parameters) & complement.trainable),
        )
        for path in rdp.paths
    ]
    return CycleOfModel(
        name,
        droppath.cycle,
        rows,
        sum(size.values()),
        count(droppath.trainable),
        count(complement.trainable),
    )


def _skip_through(rdp: timm_rdp.ResidualDropPath) -> list[timm_rdp.Iteration]:
    """The iterations of the next cycle, without training in them."""
    passed = []
    for iteration in rdp.cycle():
        with iteration:
            passed.append(iteration)
    return passed


def draw(cycle: CycleOfModel) -> "Figure":
    """Fig. 5: three stages, one box a path, the residual stream below the boxes."""
    from matplotlib.patches import Patch

    lines = -(-len(cycle.rows) // PER_LINE)
    upright = _names_upright([row.name for row in cycle.rows])
    figure = new_figure(height=3 * (0.5 + (0.85 if upright else 1.25) * lines) + 1.2)
    dropped = sum(not row.kept for row in cycle.rows)
    share = lambda n: f"{n / 1e6:.2f} of {cycle.parameters / 1e6:.2f} M parameters"
    stages = [
        ("Inference: every path runs", [RUNS] * len(cycle.rows), RUNS),
        (
            f"Droppath iteration: {dropped} of {len(cycle.rows)} paths dropped, "
            f"{share(cycle.trained_in_droppath)} trained",
            [TRAINED if row.kept else DROPPED for row in cycle.rows],
            TRAINED,
        ),
        (
            "Complement iteration: every path runs, only the dropped part is trained, "
            f"{share(cycle.trained_in_complement)}",
            [TRAINED if row.trained_in_complement else FROZEN for row in cycle.rows],
            FROZEN,
        ),
    ]
    for axes, (title, states, rest) in zip(figure.subplots(3, 1), stages, strict=True):
        axes.set_title(title, fontsize=9.5, loc="left")
        _stage(axes, [row.name for row in cycle.rows], states, rest, lines)
    figure.legend(
        handles=[Patch(label=LEGEND[state], **STYLE[state]) for state in LEGEND],
        loc="outside lower center",
        ncols=4,
        fontsize=8.5,
        frameon=False,
    )
    figure.suptitle(
        f"One ResidualDroppath cycle on {cycle.model}: the mask of cycle {cycle.cycle}\n"
        "(a box is a path; the line below is the residual stream, with all that is on no path "
        "at its ends)",
        fontsize=10,
    )
    return figure


def _names_upright(names: list[str]) -> bool:
    """Whether the blocks' names fit below their paths without being turned."""
    blocks = [_block(name) for name in names]
    narrowest = min(blocks.count(block) for block in blocks)
    room = 7 * narrowest * (PER_LINE + 2) / (min(PER_LINE, len(names)) + 2)
    return all(len(part) <= room for block in blocks for part in _broken(block).split("\n"))


def _block(name: str) -> str:
    return name.partition("#")[0].rpartition(".")[0]


def _broken(block: str) -> str:
    """A block's name, broken at its dots."""
    return "\n".join(textwrap.wrap(block.replace(".", ". "), 8)).replace(" ", "")


def _stage(axes: "Axes", names: list[str], states: list[str], rest: str, lines: int) -> None:
    width = min(PER_LINE, len(names)) + 2
    upright = _names_upright(names)
    pitch = 1.7 if upright else 2.5
    axes.set_xlim(-0.6, width - 0.4)
    axes.set_ylim(-pitch * lines + 1.05, 1.15)
    axes.axis("off")
    for line in range(lines):
        y = -pitch * line
        own = names[line * PER_LINE : (line + 1) * PER_LINE]
        axes.plot([-0.3, len(own) + 1.3], [y, y], color="black", linewidth=1, zorder=0)
        if line == 0:
            _box(axes, 0, y, rest, 0.36)
        if line == lines - 1:
            _box(axes, len(own) + 1, y, rest, 0.36)
        for i, state in enumerate(states[line * PER_LINE : (line + 1) * PER_LINE], start=1):
            wire = {"color": "#bbbbbb" if state == DROPPED else "black", "linewidth": 0.8}
            axes.plot([i - 0.42, i - 0.42, i + 0.42, i + 0.42], [y, y + 0.7, y + 0.7, y], **wire)
            axes.plot(i + 0.42, y, "o", color="black", markersize=2.5)
            _box(axes, i, y + 0.7, state, 0.28)
        _block_names(axes, own, y, upright)


def _box(axes: "Axes", x: float, y: float, state: str, half: float) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(
        Rectangle((x - half, y - 0.27), 2 * half, 0.54, linewidth=1, zorder=2, **STYLE[state])
    )
    if state == DROPPED:
        axes.plot(x, y, "x", color=STYLE[DROPPED]["edgecolor"], markersize=7, zorder=3)


def _block_names(axes: "Axes", names: list[str], y: float, upright: bool) -> None:
    """Name the block that each run of paths belongs to, below the stream."""
    start = 0
    blocks = [_block(name) for name in names]
    for end in range(1, len(blocks) + 1):
        if end < len(blocks) and blocks[end] == blocks[start]:
            continue
        axes.plot([start + 0.6, end + 0.4], [y - 0.2, y - 0.2], color="#6a6a6a", linewidth=0.8)
        axes.text(
            (start + end + 1) / 2,
            y - 0.3,
            _broken(blocks[start]) if upright else blocks[start][-16:],
            rotation=0 if upright else 90,
            ha="center",
            va="top",
            fontsize=6,
        )
        start = end
