"""The command: subcommands, exit status, and one line where something is wrong."""

import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import timm_rdp
from timm_rdp import cli

ROOT = Path(__file__).parent.parent


def run(*argv, cwd):
    return subprocess.run(
        [sys.executable, *map(str, argv)], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_without_a_subcommand_the_subcommands_are_listed(capsys):
    assert cli.main([]) == 0
    listed = capsys.readouterr().out
    assert "train" in listed
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out == listed


@pytest.mark.parametrize("argv", [[], ["--help"], ["--version"]])
def test_what_needs_no_torch_does_not_import_it(tmp_path, argv):
    code = "import sys; import timm_rdp.cli as cli; cli.main(sys.argv[1:]); print(*sys.modules)"
    done = run("-c", code, *argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    imported = done.stdout.splitlines()[-1].split()
    assert "timm_rdp.cli" in imported and "torch" not in imported


def test_the_version_is_that_of_the_package(tmp_path):
    done = run("-m", "timm_rdp", "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"timm-rdp {timm_rdp.__version__}\n")


def test_every_public_name_is_imported_when_it_is_used():
    assert set(timm_rdp.__all__) <= set(dir(timm_rdp))
    for name in timm_rdp.__all__:
        assert getattr(timm_rdp, name).__name__ == name
    with pytest.raises(AttributeError, match="'no_such_name'"):
        timm_rdp.no_such_name  # noqa: B018


def test_the_list_of_subcommands_needs_no_torch():
    code = "import sys; from timm_rdp.cli import main; main([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_timm_too_old_for_training_is_named_in_one_line():
    code = (
        "import sys, timm; timm.__version__ = '1.0.30'\n"
        "from timm_rdp import ResidualDropPath\n"
        "from timm_rdp.cli import main; sys.exit(main(['train']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "error: timm-rdp train needs timm 1.0.31 or newer, this is 1.0.30: pip install -U timm\n"
    )


def test_an_unknown_subcommand_names_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr() == (
        "",
        "error: unknown subcommand 'trian'; did you mean train?\n",
    )


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_begins_its_errors_alike(capsys, command):
    assert cli.main([command, "--no-such-flag", "--rdp"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1


@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--help"],
        pytest.param(["--help"], marks=pytest.mark.slow),
        pytest.param(["paths", "--model", "test_vit"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_reader_that_has_seen_enough_ends_a_command_quietly(argv, unbuffered):
    with subprocess.Popen(
        [sys.executable, "-m", "timm_rdp", *argv],
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (0, b"")


def test_a_broken_pipe_of_another_kind_is_no_success(monkeypatch):
    def main(argv):
        raise BrokenPipeError

    monkeypatch.setattr("timm_rdp.study.paths.main", main)
    with pytest.raises(BrokenPipeError):
        cli.main(["paths"])


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_fits_a_terminal_and_shows_values_as_they_are_typed(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    with suppress(SystemExit):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: timm-rdp {command} ")
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert not re.search(r"default:\s+(None|\[|\{|\))", text)


def test_help_shows_every_group_and_exits_with_0(capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(["train", "--help"])
    assert status.value.code == 0
    text = capsys.readouterr().out
    assert "--rdp-start-epoch" in text and "--kd-temperature" in text


@pytest.mark.parametrize(
    "command", [[ROOT / "train_rdp.py"], ["-m", "timm_rdp", "train"]], ids=["script", "command"]
)
def test_bad_input_of_a_real_process_is_one_line_and_status_2(tmp_path, command):
    done = run(*command, "--model", "resnet5o", "--output", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "resnet5o" in done.stderr and "resnet50" in done.stderr
    assert list(tmp_path.iterdir()) == []
