"""The toy study: its data, its networks, its run from end to end, and bad input."""

import csv
import math

import pytest
import torch
from PIL import Image

import timm_rdp
from timm_rdp.study.spiral import algorithm, toy
from timm_rdp.study.spiral.figures import strongest_return
from timm_rdp.study.spiral.main import main

SMALL = ["--steps", "12", "--seeds", "2", "--depth", "8", "--dim", "6", "--points", "60"]


def test_spirals_are_two_classes_of_equal_size_and_interleaved():
    xy, label = toy.two_spirals(400, noise=0, turns=1.5, seed=0)
    assert xy.shape == (400, 2) and label.bincount().tolist() == [200, 200]
    radius = xy.norm(dim=1)
    assert radius.max() <= 1
    # On arm 0 the angle is the radius times the turns; arm 1 lies opposite.
    angle = 2 * torch.pi * 1.5 * radius + torch.pi * label
    torch.testing.assert_close(xy, torch.stack([angle.cos(), angle.sin()], 1) * radius[:, None])


def test_spirals_are_a_function_of_the_seed_and_move_no_global_state():
    before = torch.get_rng_state()
    first, again = (toy.two_spirals(40, 0.1, 2, seed=3)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, toy.two_spirals(40, 0.1, 2, seed=4)[0])
    assert torch.equal(before, torch.get_rng_state())


def test_playground_spirals_are_those_of_its_own_formula():
    # As TensorFlow Playground has it: r = i / n * 5, t = 1.75 * i / n * 2 pi, x = r sin t, y = r
    # cos t, the other arm turned by pi, and a uniform value in [-noise, noise] on each.
    n, noise = 40, 0.3
    arms = [[], []]
    for label, turned in ((0, 0.0), (1, math.pi)):
        for i in range(n):
            r, t = i / n * 5, 1.75 * i / n * 2 * math.pi + turned
            arms[label].append((r * math.sin(t), r * math.cos(t)))
    exact, noisy = (
        [torch.cat(parts) for parts in zip(*toy.playground_spirals(n, x, 1.75, 3), strict=True)]
        for x in (0.0, noise)
    )
    for label, arm in enumerate(arms):
        own = exact[0][exact[1] == label]
        own = own[own.norm(dim=1).argsort()]  # the radius grows
        torch.testing.assert_close(own, torch.tensor(arm), atol=1e-4, rtol=0)
    added = noisy[0] - exact[0]
    assert torch.equal(noisy[1], exact[1]) and added.abs().max() <= noise + 1e-6
    expected = torch.linspace(-noise, noise, 2 * 2 * n)  # uniform: its quantiles are even
    assert (added.flatten().sort().values - expected).abs().max() < 0.1


def test_half_of_the_playgrounds_points_are_held_back(tmp_path, capsys):
    (x, _), (other, _) = toy.playground_spirals(30, 0.0, 1.75, 0)
    assert len(x) == len(other) == 30 and torch.cdist(x, other).min() < 1
    points = torch.cat([x, other])
    assert len(points[points.norm(dim=1) > 0].unique(dim=0)) == 2 * 30 - 2  # both arms begin at 0
    output = tmp_path / "out"
    assert main([*SMALL, "--playground", "--output", str(output), "--model", "test_vit"]) == 0
    assert "spirals of TensorFlow Playground, 60 points" in capsys.readouterr().out
    rows = list(csv.DictReader((output / "fig2_spirals.csv").read_text().splitlines()))
    radius = [math.hypot(float(row["x"]), float(row["y"])) for row in rows]
    assert len(rows) == 60 and 4 < max(radius) < 5.1


def test_block_features_are_the_running_sums_of_path_features():
    model = toy.ToyNet(depth=5, dim=4, drop_path=0.3).eval()
    x = toy.two_spirals(20, 0.02, 1.5, 0)[0]
    features = model.features(x)
    total = model.embed(x)
    for path, block in zip(features["paths"], features["blocks"][1:], strict=True):
        total = total + path
        torch.testing.assert_close(block, total)
    assert torch.equal(model(x), model.head(features["blocks"][-1]))


def test_rdp_finds_the_paths_of_a_model_that_is_not_timms():
    model = toy.ToyNet(depth=6, dim=4, drop_path=0.3)
    rdp = timm_rdp.ResidualDropPath(model, example_input=torch.zeros(2, 2))
    assert [p.name for p in rdp.paths] == [f"layers.{i}.drop_path" for i in range(1, 6)]
    for path in rdp.paths:
        layer = path.name.removesuffix(".drop_path")
        assert set(path.parameters) == {f"{layer}.linear.weight", f"{layer}.linear.bias"}


def test_a_toy_complement_iteration_trains_the_dropped_layers_only():
    torch.manual_seed(0)
    x, y = toy.two_spirals(40, 0.02, 1.5, 0)
    model = toy.ToyNet(depth=6, dim=4, drop_path=0.6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    rdp = timm_rdp.ResidualDropPath(model, example_input=x[:2])
    complements = 0
    for _ in range(6):
        for iteration in rdp.cycle():
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            with iteration:
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
            moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
            layers = {f"layers.{n.split('.')[1]}.linear" for n in iteration.dropped}
            carried = {n for n in before if n.rpartition(".")[0] in layers}
            if iteration.phase == "complement":
                complements += 1
                assert moved and moved <= carried
            else:
                assert moved and not moved & carried
    assert complements >= 2


@pytest.mark.parametrize("variant", toy.VARIANTS)
def test_every_variant_learns_the_spirals_better_than_chance(variant):
    data = toy.two_spirals(200, 0.02, 1.0, 0)
    settings = {"steps": 150, "lr": 1e-2, "drop_path": 0.1, "activation": "gelu", "seed": 0}
    model = toy.train(variant, data, depth=8, dim=16, **settings)
    accuracy = (model(data[0]).argmax(1) == data[1]).float().mean()
    assert accuracy > 0.9
    assert type(model.layers[-1].drop_path).__name__ in ("DropPath", "Identity")  # detached


def test_training_is_a_function_of_the_seed():
    data = toy.two_spirals(40, 0.02, 1.5, 0)
    settings = {"steps": 5, "lr": 1e-2, "drop_path": 0.5, "activation": "relu"}
    runs = [toy.train("rdp", data, depth=5, dim=4, **settings, seed=s) for s in (7, 7, 8)]
    same = [torch.equal(runs[0].head.weight, other.head.weight) for other in runs[1:]]
    assert same == [True, False]


def test_strongest_return_names_start_valley_and_return():
    similarity = torch.eye(6)
    similarity[1, 1:] = torch.tensor([1.0, 0.3, 0.1, 0.8, 0.7])
    assert strongest_return(similarity) == (1, 3, 4)


def test_drawn_cycle_is_that_of_the_models_own_masks():
    cycle = algorithm.sample_cycle("test_vit", drop_path=0.4, seed=3)
    import timm

    model = timm.create_model("test_vit", drop_path_rate=0.4)
    rdp = timm_rdp.ResidualDropPath(model, seed=3)
    size = {n: p.numel() for n, p in model.named_parameters()}
    complement = None
    while complement is None or complement.phase != "complement":
        complement = rdp.iteration()
        with complement:
            pass
    assert complement.cycle == cycle["cycle"]
    assert {row["name"] for row in cycle["rows"] if not row["kept"]} == complement.dropped
    assert cycle["trained_in_complement"] == sum(size[n] for n in complement.trainable)
    assert cycle["trained_in_complement"] + cycle["trained_in_droppath"] == cycle["parameters"]


def test_spiral_writes_figures_their_numbers_and_a_summary(tmp_path, capsys):
    output = tmp_path / "new" / "spiral"
    assert main([*SMALL, "--output", str(output), "--model", "test_vit"]) == 0
    names = {p.name for p in output.iterdir()}
    pictures = {
        "fig1_distributions",
        "fig2_spirals",
        "fig3_similarity",
        "fig4_training",
        "fig5_algorithm",
        "scores",
    }
    tables = {f"{name}.csv" for name in pictures}
    extra = {"fig3_variants.png", "fig4_training.gif", "summary.txt"}
    assert names == {f"{name}.png" for name in pictures} | tables | extra
    with Image.open(output / "fig4_training.gif") as animation:
        assert animation.n_frames >= 5
    rows = list(csv.DictReader((output / "scores.csv").read_text().splitlines()))
    assert [row["variant"] for row in rows].count("rdp") == 2
    assert {row["variant"] for row in rows} == {"untrained", *toy.VARIANTS}
    assert all(0 <= float(row["cka_paths"]) <= 1 for row in rows)
    text = (output / "summary.txt").read_text()
    assert "±" in text and "2 seeds" in text and text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seeds", "0"], ["--seeds 0 must be a whole number of at least 1"]),
        (["--points", "3"], ["--points 3 must be a whole number of at least 4"]),
        (["--depth", "2"], ["--depth 2 must be"]),
        (["--drop-path", "1"], ["--drop-path 1 must be a number above 0 and below 1"]),
        (["--drop-path", "0"], ["--drop-path 0 must be"]),
        (["--lr", "nan"], ["--lr nan must be"]),
        (["--noise", "-1"], ["--noise -1 must be"]),
        (["--model", "vit_tinny_patch16_224"], ["did you mean", "vit_tiny_patch16_224"]),
        (["--model", "vgg11"], ["--model vgg11", "no paths"]),
        (["--model", "lcnet_050"], ["--model lcnet_050", "no residual path"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(options, words, tmp_path, capsys):
    output = tmp_path / "out"
    assert main([*SMALL, "--output", str(output), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words)
    assert not output.exists()


def test_output_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    assert main([*SMALL, "--output", str(tmp_path / "taken" / "spiral")]) == 2
    assert "Not a directory" in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "mine"
