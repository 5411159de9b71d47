"""Every figure renders without a display, shows something, and fits a README."""

import io
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from timm_rdp.study import figures
from timm_rdp.study.features.similarity import cka_matrix
from timm_rdp.study.spiral import algorithm, toy
from timm_rdp.study.spiral import figures as toy_figures


@pytest.fixture(scope="module")
def toy_features():
    torch.manual_seed(0)
    x, y = toy.two_spirals(80, 0.02, 1.5, 0)
    with torch.no_grad():
        features = toy.ToyNet(depth=12, dim=5).features(x)
    return x, y, features


def draw_spirals(toy_features):
    x, y, _ = toy_features
    return toy_figures.spirals(x, y)


def draw_distributions(toy_features):
    _, y, features = toy_features
    return toy_figures.distributions(features["paths"], cka_matrix(features["paths"]), y, "paths")


def draw_similarities(toy_features):
    return toy_figures.similarities({k: cka_matrix(v) for k, v in toy_features[2].items()})


def draw_training_strip(toy_features):
    _, y, features = toy_features
    histograms = toy_figures.node_histograms(features["blocks"], y)
    return toy_figures.training([(i, 0.5, histograms) for i in range(6)], "blocks")


def draw_training_frame(toy_features):
    _, y, features = toy_features
    histograms = toy_figures.node_histograms(features["paths"], y)
    return toy_figures.training([(7, 0.75, histograms)], "paths")


def draw_scores(_):
    values = {m: {v: [0.1, 0.2, 0.15] for v in ("plain", "rdp")} for m in ("one", "two", "three")}
    return toy_figures.scores(values)


def draw_algorithm(_):
    rows = [
        {"name": f"layer{i}.0.drop_path", "kept": i % 9 != 0, "trained_in_complement": i % 9 == 0}
        for i in range(50)
    ]
    counts = {"parameters": 9000, "trained_in_droppath": 8000, "trained_in_complement": 600}
    return algorithm.draw({"model": "resnet", "cycle": 3, "rows": rows, **counts})


def draw_similarity_grid(toy_features):
    matrix = cka_matrix(toy_features[2]["paths"])
    rows = [("path outputs", 1, [matrix] * 3), ("block outputs", 0, [matrix * 0.5] * 3)]
    return figures.similarity_grid(rows, ["one", "two", "three"], "CKA", "Similar layers")


def draw_single_network(toy_features):
    matrix = cka_matrix(toy_features[2]["paths"])
    matrix[0, 3] = float("nan")
    rows = [("path outputs", 1, [matrix]), ("block outputs", 0, [matrix])]
    return figures.similarity_grid(rows, ["only"], "CKA", "Similar layers")


def draw_ranks(_):
    values = [torch.linspace(1, 5, 8).tolist(), torch.linspace(2, 4, 8).tolist()]
    panels = [("path outputs", values), ("block outputs", values)]
    return figures.lines_per_layer(panels, ["a", "b"], "rank (dimensions)", "Ranks")


def draw_importance(_):
    names = [f"blocks.{i}.drop_path" for i in range(24)]
    rises = torch.tensor([2.0, 0.5] + [0.01, -0.002] * 11)
    return figures.path_importance(names, torch.stack([rises, rises / 2]), ["a", "b"])


DRAWINGS = [value for name, value in sorted(globals().items()) if name.startswith("draw_")]


@pytest.mark.parametrize("draw", DRAWINGS, ids=lambda f: f.__name__.removeprefix("draw_"))
def test_every_figure_renders_headless_and_is_not_blank(draw, toy_features, tmp_path):
    draw(toy_features).savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size < 200_000
    with Image.open(tmp_path / "figure.png") as image:
        assert image.width <= 1000
        grey = np.asarray(image.convert("L"))
    ink = (grey < 200).mean()
    assert 0.005 < ink < 0.9
    # Neither the left nor the right half is empty, in greyscale too.
    half = grey.shape[1] // 2
    assert min((grey[:, :half] < 200).mean(), (grey[:, half:] < 200).mean()) > 0.002


@pytest.mark.parametrize("draw", DRAWINGS, ids=lambda f: f.__name__.removeprefix("draw_"))
def test_no_text_of_a_figure_overlaps_another_or_leaves_it(draw, toy_features, monkeypatch):
    from matplotlib.text import Text

    drawn = {}
    draw_text = Text.draw

    def record(text, renderer, *args, **kwargs):
        draw_text(text, renderer, *args, **kwargs)
        if text.get_visible() and text.get_text().strip():
            drawn[text] = text.get_window_extent(renderer)

    figure = draw(toy_features)
    monkeypatch.setattr(Text, "draw", record)
    figure.canvas.draw()
    assert len(drawn) >= 5
    for text, box in drawn.items():
        inside = box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1
        inside &= box.y0 >= -1 and box.y1 <= figure.bbox.y1 + 1
        assert inside, f"{text.get_text()!r} leaves the figure"
    for one, other in itertools.combinations(drawn, 2):
        a, b = drawn[one], drawn[other]
        width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        overlap = width > 2 and height > 2
        assert not overlap, f"{one.get_text()!r} lies over {other.get_text()!r}"


def test_figures_need_no_display_and_leave_pyplot_alone():
    program = (  # pyplot is what would choose a display
        "import sys, torch\n"
        "from timm_rdp.study import figures\n"
        "from timm_rdp.study.spiral import toy, figures as toy_figures\n"
        "toy_figures.spirals(*toy.two_spirals(40, 0.02, 1.5, 0)).canvas.draw()\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    hidden = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    subprocess.run([sys.executable, "-c", program], check=True, env=hidden)


def test_two_classes_and_the_colour_scale_stay_apart_in_greyscale():
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    grey = lambda rgb: float(np.dot(rgb, (0.299, 0.587, 0.114)))
    assert abs(grey(to_rgb(figures.RED)) - grey(to_rgb(figures.BLUE))) > 0.3
    scale = [grey(colormaps[figures.SEQUENTIAL](v)[:3]) for v in np.linspace(0, 1, 20)]
    assert (np.diff(scale) > 0).all()


def test_histograms_count_every_point_of_every_class(toy_features):
    _, y, features = toy_features
    histograms = toy_figures.node_histograms(features["paths"], y)
    for value in (0, 1):
        assert (histograms[:, :, value].sum(-1) == (y == value).sum()).all()
    constant = toy_figures.node_histograms([torch.ones(80, 1)] * 3, y)
    assert constant.sum() == 0


def test_overlap_of_equal_distributions_is_one_and_of_disjoint_ones_zero():
    histograms = torch.zeros(3, 1, 2, 4)
    histograms[0, 0, 0, 0] = histograms[1, 0, 0, 3] = histograms[2, 0, 0, 0] = 5
    assert toy_figures.overlap(histograms)[0].tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


def test_saved_png_holds_the_rendered_pixels(toy_features):
    figure = draw_spirals(toy_features)
    file = io.BytesIO()
    figure.savefig(file)
    with Image.open(file) as image:
        figure.canvas.draw()
        assert np.array_equal(np.asarray(image), np.asarray(figure.canvas.buffer_rgba()))
