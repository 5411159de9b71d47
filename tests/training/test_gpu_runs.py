"""Training runs on a GPU: `pytest -m gpu`; with `--device cpu` the same code on the CPU."""

import pytest
import torch
from core_helpers import same_bits
from runs import VIT, checkpoint, rows, run

pytestmark = [
    pytest.mark.gpu,
    # torch's own, when it compiles a part of a model
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture
def deterministic(monkeypatch):
    """Kernels that give the same bits every time, as far as the device has them."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("precision", ["", "--amp --amp-dtype bfloat16", "--amp"])
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_never_stopped(
    precision, device, digits_folder, tmp_path
):
    options = (*VIT, "--rdp", "--drop-path", 0.4, "--epochs", 3, "--device", device.type)
    options = (*options, *precision.split(), "--checkpoint-hist", 3)
    whole = run(digits_folder, tmp_path / "whole", *options)
    first = whole / "checkpoint-1.pth.tar"
    resumed = run(digits_folder, tmp_path / "resumed", *options, "--resume", first)
    ends = [checkpoint(folder) for folder in (whole, resumed)]
    for name in ("state_dict", "optimizer"):
        assert same_bits(ends[0][name], ends[1][name])


@pytest.mark.parametrize(
    "more", ["", "--skip-dropped", "--rdp", "--rdp --torchcompile", "--rdp --channels-last --amp"]
)
def test_the_command_trains_the_digits(more, device, digits_folder, tmp_path):
    options = (*VIT, "--drop-path", 0.2, "--epochs", 4, "--device", device.type, *more.split())
    folder = run(digits_folder, tmp_path, *options)
    losses = [float(row["train_loss"]) for row in rows(folder)]
    assert losses[-1] < losses[0]
