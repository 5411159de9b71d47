"""Fashion-MNIST's files, laid out and read without a download; digits stand in for them here."""

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from runs import rows, run
from sklearn.datasets import load_digits
from torchvision.datasets import FashionMNIST

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fashion_mnist.py"


def lay_out(*argv: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, argv)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, np.ndarray, np.ndarray]:
    """The four packed files, of 200 and 40 digits, and the images and labels in them."""
    digits, folder = load_digits(), tmp_path_factory.mktemp("files")
    images = np.pad((digits.images[:240] * 15).astype("uint8"), ((0, 0), (10, 10), (10, 10)))
    labels = digits.target[:240].astype("uint8")
    for split, part in (("train", slice(200)), ("t10k", slice(200, 240))):
        for name, values in (("images-idx3", images[part]), ("labels-idx1", labels[part])):
            header = bytes([0, 0, 8, values.ndim]) + b"".join(
                n.to_bytes(4, "big") for n in values.shape
            )
            with gzip.open(folder / f"{split}-{name}-ubyte.gz", "wb") as file:
                file.write(header + values.tobytes())
    return folder, images, labels


def test_what_choices_see_holds_no_test_image_and_the_last_of_each_class_apart(files, tmp_path):
    source, images, labels = files
    assert lay_out("--source", source, "--output", tmp_path, "--apart", 3).returncode == 0
    read = lambda part, train: FashionMNIST(str(tmp_path / part), train=train)
    apart = sorted(i for c in range(10) for i in np.flatnonzero(labels[:200] == c)[-3:])
    rest = [i for i in range(200) if i not in apart]
    for part, train, chosen in (
        ("choose", True, rest),
        ("choose", False, apart),
        ("final", True, range(200)),
        ("final", False, range(200, 240)),
    ):
        dataset = read(part, train)
        assert np.array_equal(dataset.data.numpy(), images[list(chosen)])
        assert np.array_equal(dataset.targets.numpy(), labels[list(chosen)])
    few = ("--apart", 3, "--per-class", 5)
    assert lay_out("--source", source, "--output", tmp_path, *few).returncode == 0
    assert np.bincount(read("choose", True).targets).tolist() == [5] * 10


def test_missing_files_are_one_line_that_names_the_package(tmp_path):
    done = lay_out("--source", tmp_path / "none", "--output", tmp_path / "out")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "--source" in done.stderr and "dataset-fashion-mnist" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [(), ("--no-prefetcher",)], ids=["prefetcher", "without"])
def test_grey_images_train_from_the_files_alone(files, tmp_path, more):
    assert lay_out("--source", files[0], "--output", tmp_path, "--apart", 3).returncode == 0
    argv = "--dataset torch/fashion_mnist --in-chans 1 --model test_vit --img-size 28 --epochs 1"
    argv += " --model-kwargs patch_size=7 depth=3 --rdp --drop-path 0.5"
    folder = run(tmp_path / "choose", tmp_path / "out", *argv.split(), *more)
    assert rows(folder)[0]["train_loss_complement"]


def test_a_folder_without_the_files_is_one_line(tmp_path, refused):
    argv = "--dataset torch/fashion_mnist --in-chans 1 --num-classes 10 --model test_vit"
    line = refused(*argv.split(), "--data-dir", tmp_path)
    assert "torch/fashion_mnist" in line and str(tmp_path) in line
