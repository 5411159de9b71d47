"""What a run leaves behind: summary.csv, curves.png, args.yaml."""

import builtins
import errno
import os
import random
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import timm
import yaml
from PIL import Image
from runs import VIT, flags, rows, run

from timm_rdp.errors import TrainingError, UsageError
from timm_rdp.study.options import check_output
from timm_rdp.training import saver as curves
from timm_rdp.training.outputs import Summary
from timm_rdp.training.saver import draw_curves

TRAIN = OrderedDict(loss=2.302585092994046)
EVAL = OrderedDict(loss=0.1, top1=100 / 3, top5=1e-17)
RDP = OrderedDict(
    train_loss_droppath=2.5, train_loss_complement=None, dropped_paths=1.25, trainable_fraction=None
)


@pytest.mark.parametrize("evaluated", [EVAL, None], ids=["validation", "no validation"])
def test_timms_columns_are_timms_bytes(tmp_path, evaluated):
    expected = tmp_path / "expected.csv"
    summary = Summary(str(tmp_path))
    for epoch, lr in enumerate((0.1, 1e-05, 0.0)):
        summary.add(epoch, TRAIN, evaluated, lr, {})
        timm.utils.update_summary(
            epoch, TRAIN, evaluated, str(expected), lr=lr, write_header=epoch == 0
        )
        assert (tmp_path / "summary.csv").read_bytes() == expected.read_bytes()


def test_the_columns_of_rdp_come_last_and_are_empty_where_nothing_was_measured(tmp_path):
    Summary(str(tmp_path)).add(0, TRAIN, EVAL, 0.1, RDP)
    (row,) = rows(tmp_path)
    assert list(row)[6:] == list(RDP)
    assert [row[name] for name in RDP] == ["2.5", "", "1.25", ""]


def test_a_resumed_run_goes_on_with_the_rows_from_before_its_epoch(tmp_path):
    whole = Summary(str(tmp_path / "a"))
    (tmp_path / "a").mkdir()
    for epoch in range(4):
        whole.add(epoch, TRAIN, EVAL, epoch / 3, RDP)
    expected = (tmp_path / "a" / "summary.csv").read_bytes()

    resumed = Summary(str(tmp_path / "a"), start_epoch=2)
    assert [row["epoch"] for row in resumed.rows] == [0, 1]
    for epoch in (2, 3):
        resumed.add(epoch, TRAIN, EVAL, epoch / 3, RDP)
    assert (tmp_path / "a" / "summary.csv").read_bytes() == expected


def test_rows_with_other_columns_share_a_header(tmp_path):
    """A run that goes on with --rdp, or without a validation."""
    Summary(str(tmp_path)).add(0, TRAIN, EVAL, 0.1, {})
    resumed = Summary(str(tmp_path), start_epoch=1)
    resumed.add(1, TRAIN, EVAL, 0.1, RDP)
    resumed.add(2, TRAIN, None, 0.1, RDP)
    first, second, third = rows(tmp_path)
    assert first.keys() == second.keys() == third.keys() >= {"epoch", *RDP}
    assert [row["eval_loss"] == "" for row in (first, second, third)] == [False, False, True]
    assert [row["dropped_paths"] == "" for row in (first, second, third)] == [True, False, False]


def test_a_fresh_run_in_an_old_folder_begins_the_summary_anew_and_says_so(
    digits_folder, tmp_path, caplog
):
    caplog.set_level("INFO")
    assert [row["epoch"] for row in rows(run(digits_folder, tmp_path, *VIT))] == ["0", "1"]
    assert "anew" not in caplog.text
    folder = run(digits_folder, tmp_path, *VIT, "--epochs", 1)
    assert [row["epoch"] for row in rows(folder)] == ["0"]
    assert f"{folder} holds another run's summary.csv, which this one begins anew" in caplog.text


def test_a_row_is_never_torn(tmp_path, monkeypatch):
    """Whatever operation of the file system fails, the file is the old or the new one."""
    summary = Summary(str(tmp_path))
    summary.add(0, TRAIN, EVAL, 0.1, {})
    path = tmp_path / "summary.csv"
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for module, name in ((os, "fsync"), (os, "replace"), (builtins, "open")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(TrainingError, match=r"summary\.csv cannot be written: No space"):
                summary.add(1, TRAIN, EVAL, 0.1, {})
        assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["summary.csv"]


def test_args_yaml_is_there_from_the_start_and_holds_the_flags(digits_folder, tmp_path):
    folder = run(digits_folder, tmp_path, *VIT, "--epochs", 1, "--seed", 7)
    args = yaml.safe_load((folder / "args.yaml").read_text())
    assert args["seed"] == 7 and args["model"] == "test_vit" and args["epochs"] == 1


def _rows(count, with_rdp):
    generator = random.Random(0)
    return [
        {
            "epoch": epoch,
            "train_loss": 2.0 / (epoch + 1),
            "eval_loss": 1.8 / (epoch + 1),
            "eval_top1": 100 - 50 / (epoch + 1),
            "eval_top5": 100 - 10 / (epoch + 1),
            "lr": 0.1,
            **(
                {
                    "train_loss_droppath": 2.0 / (epoch + 1) + generator.random() / 9,
                    "train_loss_complement": None if epoch == 0 else 1.9 / (epoch + 1),
                }
                if with_rdp
                else {}
            ),
        }
        for epoch in range(count)
    ]


@pytest.mark.parametrize("count", [1, 2, 300])
@pytest.mark.parametrize("with_rdp", [True, False])
def test_curves_are_drawn_in_their_colours(tmp_path, count, with_rdp):
    draw_curves(str(tmp_path), _rows(count, with_rdp))
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).reshape(-1, 3)
    colours = {tuple(colour) for colour in np.unique(pixels, axis=0)}
    assert (0x00, 0x72, 0xB2) in colours  # training, or droppath iterations
    assert ((0xD5, 0x5E, 0x00) in colours) == (with_rdp and count > 1)
    assert (0x00, 0x9E, 0x73) in colours and (0xCC, 0x79, 0xA7) in colours


def test_curves_of_a_run_without_validation_are_drawn(tmp_path):
    draw_curves(str(tmp_path), [{"epoch": 0, "train_loss": 1.0, "lr": 0.1}])
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_without_matplotlib_a_run_says_so_once_and_goes_on(
    digits_folder, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    folder = run(digits_folder, tmp_path, *VIT)
    assert not (folder / "curves.png").exists()
    assert [r.message for r in caplog.records if "curves.png" in r.message] == [
        "No curves.png: matplotlib is not installed (pip install matplotlib)."
    ]


@pytest.fixture
def drawn(monkeypatch):
    """How many rows each drawing of curves.png had, and a clock: [seconds, seconds a drawing]."""
    counts, clock, original = [], [0.0, 0.0], curves.draw_curves

    def draw(folder, rows, title):
        counts.append(len(rows))
        clock[0] += clock[1]
        return original(folder, rows, title)

    monkeypatch.setattr(curves, "draw_curves", draw)
    monkeypatch.setattr(curves.time, "monotonic", lambda: clock[0])
    return counts, clock


def test_a_run_draws_its_curves_first_and_last(digits_folder, tmp_path, drawn):
    counts, clock = drawn
    clock[1] = 1.0  # of no other time
    folder = run(digits_folder, tmp_path, *VIT, "--rdp", "--drop-path", 0.5, "--epochs", 3)
    assert counts == [1, 3]
    assert (folder / "curves.png").stat().st_size > 5000


def test_curves_are_drawn_when_that_took_less_than_a_hundredth_of_the_time_since(tmp_path, drawn):
    counts, clock = drawn
    clock[1] = 0.2
    file = curves.Curves(str(tmp_path))
    for epoch in range(1, 12):
        clock[0] += 11
        file.update(_rows(epoch, False), last=epoch == 11)
    assert counts == [1, 3, 5, 7, 9, 11]  # 0.2 s each, after 22 s rather than 11


def test_wandb_gets_the_rows_of_the_summary(digits_folder, tmp_path, monkeypatch):
    logged = []

    class Wandb:
        init = staticmethod(lambda **kwargs: logged.append(kwargs["config"]["model"]))
        log = staticmethod(logged.append)

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: Wandb)
    folder = run(digits_folder, tmp_path, *VIT, "--log-wandb")
    assert logged[0] == "test_vit"
    assert [str(row["train_loss"]) for row in logged[1:]] == [r["train_loss"] for r in rows(folder)]


@pytest.mark.slow
def test_wandb_itself_logs_offline(digits_folder, tmp_path):
    """In a process of its own: wandb starts threads and leaves warnings behind."""
    pytest.importorskip("wandb")
    argv = flags(digits_folder, tmp_path / "out", *VIT, "--log-wandb", "--epochs", 1)
    main = "import sys; from timm_rdp.training.train import main; sys.exit(main())"
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", main, *argv], env=environment, cwd=tmp_path, check=True)
    assert list(tmp_path.rglob("*.wandb"))


def test_a_refusal_of_wandb_is_one_line(digits_folder, refused, monkeypatch):
    class Wandb:
        @staticmethod
        def init(**_):
            raise RuntimeError("api_key not configured")

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: Wandb)
    line = refused(*VIT, "--log-wandb", "--data-dir", digits_folder, "-j", 0, "-b", 16,
                   "--num-classes", 10)  # fmt: skip
    assert "api_key not configured" in line and "WANDB_MODE=offline" in line


def test_without_a_validation_split_the_summary_ranks_by_the_training_loss(
    digits_folder, tmp_path, capsys
):
    folder = run(digits_folder, tmp_path, *VIT, "--val-split", "")
    assert list(rows(folder)[0]) == ["epoch", "train_loss", "lr"]
    assert (folder / "model_best.pth.tar").exists()
    assert capsys.readouterr().out.startswith("--result\n[")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "it has no name"),
        ("taken", "Not a directory"),
        ("taken/below", "Not a directory"),
        ("a" * 300, "name too long"),
        ("absent/" + "a" * 300, "name too long"),
        ("loop/below", "symbolic links"),
        ("\0", "null byte"),
    ],
)
def test_an_output_folder_that_cannot_be_is_named_and_nothing_is_made(
    name, why, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match=f"^--output.*{why}"):
        check_output(name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loop", "taken"]


def test_an_output_folder_that_can_be_made_is_not_made_yet(tmp_path):
    assert check_output(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert check_output(tmp_path) == tmp_path
    assert not list(tmp_path.iterdir())
