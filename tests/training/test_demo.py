"""The demo's images: the digits, held-out ones apart, written once and completely."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_dataset

from timm_rdp.errors import UsageError
from timm_rdp.training.dataset import prepare_demo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare_demo(tmp_path_factory.mktemp("demo"))


@pytest.mark.filterwarnings("ignore:unclosed file")  # timm's reader leaves images open
def test_timms_reader_gives_back_every_digit_once(folder):
    digits = load_digits()
    seen = {}
    for split in ("train", "validation"):
        dataset = create_dataset("", root=str(folder), split=split, input_img_mode="L")
        assert dataset.reader.class_to_idx == {str(digit): digit for digit in range(10)}
        for (path, _), (image, target) in zip(dataset.reader.samples, dataset, strict=True):
            index = int(path.rsplit("/", 1)[1].removesuffix(".png"))
            assert index not in seen
            seen[index] = split
            assert target == digits.target[index]
            grey = np.asarray(image) / 255 * 16
            assert np.abs(grey - digits.images[index]).max() <= 0.5 * 16 / 255
            image.close()
    assert sorted(seen) == list(range(1797))


def test_a_fifth_of_every_class_is_held_out(folder):
    for digit in range(10):
        train = len(list((folder / "train" / str(digit)).iterdir()))
        held_out = len(list((folder / "validation" / str(digit)).iterdir()))
        assert held_out == -(-(train + held_out) // 5)


def test_the_split_is_the_same_every_time(folder, tmp_path):
    def content(root):
        return {p.relative_to(root): p.read_bytes() for p in root.rglob("*.png")}

    assert content(prepare_demo(tmp_path)) == content(folder)


def test_what_is_written_is_used_again_even_without_scikit_learn(tmp_path, monkeypatch):
    first = prepare_demo(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert prepare_demo(tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before


def test_an_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch):
    written = []

    def save(image, path):
        written.append(path)
        if len(written) == 100:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save)
        with pytest.raises(KeyboardInterrupt):
            prepare_demo(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(list(prepare_demo(tmp_path).rglob("*.png"))) == 1797


def test_two_processes_that_write_at_once_end_with_one_complete_folder(tmp_path, monkeypatch):
    rename = Path.rename

    def rename_while_another_one_finishes(path, target):
        monkeypatch.setattr(Path, "rename", rename)
        prepare_demo(tmp_path)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_while_another_one_finishes)
    folder = prepare_demo(tmp_path)
    assert list(tmp_path.iterdir()) == [folder]
    assert len(list(folder.rglob("*.png"))) == 1797


def test_the_cache_follows_its_variables(tmp_path, monkeypatch):
    monkeypatch.delenv("TIMM_RDP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert prepare_demo().parent == tmp_path / "timm-rdp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prepare_demo().parent == tmp_path / ".cache" / "timm-rdp"
    monkeypatch.setenv("TIMM_RDP_CACHE", str(tmp_path / "here"))
    assert prepare_demo().parent == tmp_path / "here"


def test_a_cache_that_cannot_be_written_names_its_variable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="TIMM_RDP_CACHE") as error:
        prepare_demo(tmp_path / "file")
    assert str(tmp_path / "file") in str(error.value)


def test_the_demo_without_scikit_learn_says_what_to_install(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("TIMM_RDP_CACHE", str(tmp_path / "empty"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    line = refused("--model", "test_vit", "--rdp")
    assert "scikit-learn" in line and "--data-dir" in line
