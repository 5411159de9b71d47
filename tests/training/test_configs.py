"""Every recipe in configs/ says what it is, is valid, and trains its real model."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from runs import watch_iterations

from timm_rdp.training import train
from timm_rdp.training.data import create_data
from timm_rdp.training.options import parse_args

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
FAST = {"demo_digits", "vit_tiny_cifar100"}


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """Four images of noise in two classes, and maps that place these among 10, 100 or 1,000."""
    folder = tmp_path_factory.mktemp("generated")
    noise = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / "train" / name).mkdir(parents=True)
        for index in range(2):
            pixels = noise.integers(0, 256, (64, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "train" / name / f"{index}.png")
    for classes in (10, 100, 1000):
        names = ["a", "b", *(f"class{index}" for index in range(2, classes))]
        (folder / f"{classes}.txt").write_text("\n".join(names))
    return folder


def header(path):
    return [line for line in path.read_text().splitlines() if line.startswith("#")]


def test_there_are_recipes():
    assert len(CONFIGS) >= 8


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_recipe_opens_with_source_command_cost_and_what_has_been_run(path):
    lines = path.read_text().splitlines()
    assert lines[: len(header(path))] == header(path)
    text = "\n".join(header(path))
    assert "# Source: " in text and "# Command: " in text
    assert "# Result of that command: " in text or ("# Cost: " in text and "# Run so far: " in text)
    assert "--rdp" in text
    if "Result" not in text:
        assert f"-c configs/{path.name}" in text


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_recipe_is_valid_and_drops_paths(path, digits_folder):
    args = parse_args(["-c", str(path), "--data-dir", str(digits_folder), "--rdp"])
    assert timm.is_model(args.model)
    assert 0 < args.drop_path < 1


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem in FAST else pytest.mark.slow)
        for path in CONFIGS
    ],
)
def test_a_recipe_trains_its_real_model_for_two_updates(path, generated, tmp_path, monkeypatch):
    classes = parse_args(["-c", str(path)]).num_classes
    argv = ["-c", path, "--rdp", "--data-dir", generated, "--dataset", "", "--val-split", ""]
    argv += ["--class-map", generated / f"{classes}.txt", "-b", "2", "--grad-accum-steps", "1"]
    argv += ["--epochs", "1", "--warmup-epochs", "0", "-j", "0", "--device", "cpu"]
    argv += ["--output", tmp_path, "--experiment", "run"]
    if parse_args(["-c", str(path)]).train_img_sizes:
        argv += ["--train-batches-per-epoch", "2"]
    shapes = []
    phases = watch_iterations(monkeypatch, after=lambda run: shapes.append(run.newest.input.shape))
    assert train.main([str(arg) for arg in argv]) == 0
    assert [phase for phase, first in phases if first] == ["droppath"] * 2
    assert all(shape[:2] == (2, 3) for shape in shapes)
    weights = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=False)["state_dict"]
    assert all(torch.isfinite(w).all() for w in weights.values() if w.is_floating_point())


def augmentation(path):
    """What decides how a recipe's images are augmented."""
    args = parse_args(["-c", str(path), "--data-dir", ".", "--rdp"])
    flags = (
        "aa",
        "reprob",
        "recount",
        "color_jitter",
        "scale",
        "ratio",
        "hflip",
        "vflip",
        "no_aug",
    )
    return tuple(str(getattr(args, name)) for name in flags)


AUGMENTATIONS = {augmentation(path): path for path in CONFIGS}


@pytest.mark.slow
@pytest.mark.parametrize("path", AUGMENTATIONS.values(), ids=lambda path: path.stem)
def test_ten_thousand_samples_pass_a_recipes_augmentation(path, generated):
    flags = ["-c", str(path), "--data-dir", str(generated), "--img-size", "32", "--rdp"]
    args = parse_args([*flags, "--class-map", str(generated / "1000.txt"), "-j", "0"])
    args.distributed, args.rank, args.world_size, args.num_classes = False, 0, 1, 1000
    args.dataset, args.val_split, args.batch_size = "", "", 4
    args.train_img_sizes = args.train_batch_sizes = args.train_size_probs = None
    args.train_batches_per_epoch = None
    config = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic")
    model = timm.create_model("test_resnet")
    data = create_data(args, config, model, torch.device("cpu"), None)
    inner = getattr(data.train, "loader", data.train)
    for index in range(10_000):
        inner.dataset[index % 4]
