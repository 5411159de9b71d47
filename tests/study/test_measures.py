"""Calibration, accuracy with paths removed and on damaged images, against other computations."""

import csv

import numpy as np
import pytest
import scipy.ndimage
import scipy.optimize
import timm
import torch
import torch.nn.functional as F
from digits import digit_images
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

from timm_rdp.study import measures
from timm_rdp.study.features import main as features
from timm_rdp.study.features import models


@pytest.fixture(scope="module")
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    """Overconfident guesses at 400 digits."""
    _, targets = digit_images(400)
    torch.manual_seed(0)
    return 4 * (torch.randn(400, 10) + 1.5 * F.one_hot(targets, 10)), targets


def ece(p: np.ndarray, y: np.ndarray) -> float:
    """Calibration error after its definition: bin by bin."""
    confidence, right = p.max(1), p.argmax(1) == y
    total = 0.0
    for i in range(15):
        own = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if own.any():
            total += own.mean() * abs(right[own].mean() - confidence[own].mean())
    return total


def test_calibration_is_that_of_sklearn_scipy_and_the_definition(logits):
    z, y = logits
    found = measures.calibration(z, y)
    fits = np.arange(400) % 5 == 0
    softmax = lambda t, own: (z[own].double() / t).softmax(1).numpy()
    scored = y[~fits].numpy()
    p = softmax(1, ~fits)
    assert found["nll"] == pytest.approx(log_loss(scored, p, labels=range(10)))
    assert found["ece"] == pytest.approx(ece(p, scored))
    loss = lambda t: log_loss(y[fits].numpy(), softmax(t, fits), labels=range(10))
    best = scipy.optimize.minimize_scalar(loss, bounds=(0.1, 50), method="bounded").x
    assert found["temperature"] == pytest.approx(best, rel=1e-3)
    assert found["ece_scaled"] == pytest.approx(ece(softmax(best, ~fits), scored), abs=1e-3)
    assert found["ece_scaled"] < found["ece"]


def test_the_images_that_fit_the_temperature_are_not_scored(logits):
    z, y = logits
    wrong = y.clone()
    wrong[::5] = (y[::5] + 1) % 10
    one, other = measures.calibration(z, y), measures.calibration(z, wrong)
    assert (one["nll"], one["ece"]) == (other["nll"], other["ece"])
    assert one["temperature"] != other["temperature"]


def test_subsets_are_even_or_drawn_once_for_all_and_go_from_none_to_all():
    chosen = measures.subsets(24, 24)
    assert list(chosen) == list(range(0, 25, 2))
    assert chosen[12][0] == list(range(1, 24, 2)) and chosen[2][0] == [6, 18]
    for k, own in chosen.items():
        assert len(own) == 5 and all(len(set(s)) == k for s in own)
    for k in range(2, 25, 2):
        for smaller, larger in zip(chosen[k - 2][1:], chosen[k][1:], strict=True):
            assert set(smaller) < set(larger)
    assert chosen == measures.subsets(24, 24)
    assert list(measures.subsets(24, 3)) == [0, 1, 2, 3]
    assert len({tuple(s) for s in chosen[12]}) == 5


def test_the_area_is_that_of_numpy():
    removed = {0: [1.0, 0.8, 0.6, 0.9, 0.7], 3: [0.5, 0.4, 0.4, 0.2, 0.2], 8: [0.1] * 5}
    drawn = [np.mean(s[1:]) for s in removed.values()]
    expected = np.trapezoid(drawn, np.array([0, 3, 8]) / 8)
    assert measures.area(removed, slice(1, None)) == pytest.approx(expected)
    assert measures.area(removed, slice(1)) == pytest.approx(0.375 * 0.75 + 0.625 * 0.3)


def test_damages_are_those_of_numpy_and_scipy():
    images = digit_images(4, size=28)[0] / 2 + 0.5
    x = images.numpy()
    blurred = measures.damage(images, "blur", 0.04, 0).numpy()
    by_hand = scipy.ndimage.gaussian_filter(x, (0, 0, 1.12, 1.12), mode="mirror", radius=3)
    np.testing.assert_allclose(blurred, by_hand, atol=1e-4)
    pale = measures.damage(images, "contrast", 0.4, 0).numpy()
    mean = x.mean((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(pale, mean + 0.4 * (x - mean), atol=1e-6)
    moved = measures.damage(images, "shift", 0.1, 0).numpy()
    by_hand = scipy.ndimage.shift(x, (0, 0, 3, 3), order=0, mode="nearest")
    np.testing.assert_allclose(moved, by_hand)
    noisy = measures.damage(images * 0 + 0.5, "noise", 0.1, 7)
    assert noisy.std().item() == pytest.approx(0.1, rel=0.02)
    assert torch.equal(noisy, measures.damage(images * 0 + 0.5, "noise", 0.1, 7))
    assert not torch.equal(noisy, measures.damage(images * 0 + 0.5, "noise", 0.1, 8))


def silence(model: nn.Module, paths: list[str]) -> None:
    """Make paths add nothing, by zeroing what ends them."""
    for name in paths:
        block = model.get_submodule(name.rpartition(".")[0])
        last = block.attn.proj if name.endswith("1") else block.mlp.fc2
        for parameter in last.parameters():
            nn.init.zeros_(parameter)


def test_accuracy_with_paths_removed_is_that_of_a_network_without_them():
    torch.manual_seed(1)
    name, size = "test_vit", dict(img_size=32, num_classes=10)
    model = timm.create_model(name, drop_path_rate=0.1, **size).eval()
    paths = models.find_paths(name, model, (3, 32, 32))
    images, targets = digit_images(60)
    batches = [(images[:40], targets[:40]), (images[40:], targets[40:])]
    data = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    found = measures.measure(model, paths, batches, "classification", data)
    for k, own in measures.subsets(len(paths), len(paths)).items():
        for subset, score in zip(own, found["removed"][k], strict=True):
            other = timm.create_model(name, **size).eval()
            other.load_state_dict(model.state_dict())
            silence(other, [paths[i].name for i in subset])
            with torch.no_grad():
                predicted = other(images).argmax(1)
            assert score == pytest.approx(accuracy_score(targets, predicted))
    assert found["score"] == found["removed"][0][0]
    pixels = measures.damage(images / 2 + 0.5, "blur", 0.04, 0)
    with torch.no_grad():
        predicted = model((pixels - 0.5) / 0.5).argmax(1)
    assert found["blur_2"] == pytest.approx(accuracy_score(targets, predicted))


def test_features_report_the_measures_of_any_checkpoint(digits_folder, tmp_path, capsys):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=10)
    torch.save(model.state_dict(), tmp_path / "any.pth")
    argv = ["--model", "test_vit", "--checkpoint", str(tmp_path / "any.pth"), "--img-size", "32"]
    argv += ["--data-dir", str(digits_folder), "--device", "cpu", "--no-importance"]
    more = ["--remove", "4", "--damage", "--output", str(tmp_path / "out")]
    assert features.main([*argv, *more]) == 0
    out = capsys.readouterr().out
    for words in ("calibration error", "paths removed", "area under", "under shift"):
        assert words in out
    rows = list(csv.DictReader((tmp_path / "out" / "removal.csv").read_text().splitlines()))
    assert [row["paths_removed"] for row in rows] == ["0", "1", "2", "3", "4"]
    capsys.readouterr()
    never = ["--remove", "13", "--output", str(tmp_path / "never")]
    assert features.main([*argv, *never]) == 2
    assert "--remove 13: test_vit has 12 paths" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()
