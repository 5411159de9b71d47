"""The training run: what an update does, in plain training and with ResidualDroppath."""

import json
import logging
import math
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from core_helpers import same_bits
from hypothesis import given
from hypothesis import strategies as st
from runs import RESNET, VIT, checkpoint, flags, rows, run, watch_iterations

import timm_rdp
from timm_rdp.errors import TrainingError
from timm_rdp.training import batches, loop, train
from timm_rdp.training.batches import update_sizes
from timm_rdp.training.log import Losses
from timm_rdp.training.setup import set_up
from timm_rdp.training.state import RunState

RDP = ("--rdp", "--drop-path", "0.7")
TIMM_COLUMNS = ["epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"]


def test_without_rdp_no_iteration_is_entered_and_no_column_added(digits_folder, tmp_path):
    folder = run(digits_folder, tmp_path, *VIT, "--drop-path", "0.3")
    assert list(rows(folder)[0]) == TIMM_COLUMNS
    assert "rdp" not in checkpoint(folder)


def test_same_gives_each_batch_its_full_cycle(digits_folder, tmp_path, monkeypatch):
    iterations = []
    inputs = []

    def before(run):
        it = run.rdp._active
        iterations.append((it.phase, it.cycle, it.dropped))
        run.task.get_trainable_module().register_forward_pre_hook(
            lambda _, args: inputs.append(args[0].clone())
        )

    def after(run):
        run.task.get_trainable_module()._forward_pre_hooks.clear()

    watch_iterations(monkeypatch, before, after)
    loaded = []
    original = batches.to_device
    monkeypatch.setattr(batches, "to_device", lambda *a: loaded.append(1) or original(*a))
    run(
        digits_folder, tmp_path, *VIT, *RDP, "--epochs", 1, "--grad-accum-steps", 2,
        "--mixup", 0.8, "--no-prefetcher",
    )  # fmt: skip

    # 5 batches in updates of 2, 2 and 1, after one on trial, and nothing is loaded twice
    assert [(p, c) for p, c, _ in iterations] == [
        (phase, cycle)
        for cycle in range(3)
        for phase in ("droppath", "complement")
        if phase == "droppath" or iterations[[i[1] for i in iterations].index(cycle)][2]
    ]
    assert {p for p, _, _ in iterations} == {"droppath", "complement"}
    assert len(loaded) == 6
    index = 0
    for cycle, size in enumerate((2, 2, 1)):
        phases = sum(c == cycle for _, c, _ in iterations)
        first = inputs[index : index + size]
        for _ in range(phases):
            assert same_bits(inputs[index : index + size], first)
            index += size
    assert index == len(inputs)


def test_next_gives_each_batch_one_iteration(digits_folder, tmp_path, monkeypatch):
    seen = watch_iterations(monkeypatch)
    folder = run(digits_folder, tmp_path, *VIT, *RDP, "--rdp-batch", "next")
    assert len(seen) == 10 and all(first for _, first in seen)
    assert {phase for phase, _ in seen} == {"droppath", "complement"}
    assert all(b == "droppath" for (a, _), (b, _) in pairwise(seen) if a != "droppath")
    row = rows(folder)[0]
    assert row["train_loss_droppath"] != row["train_loss"] != row["train_loss_complement"]


@pytest.mark.parametrize("mode", ["same", "next"])
def test_a_run_equals_its_cycles_written_out_in_plain_pytorch(digits_folder, tmp_path, mode):
    """Weights and losses of one epoch, with accumulation (5 batches by 2) and clipping."""
    model_flags = (*VIT, "--opt", "sgd", "--momentum", 0.9, "--lr", 0.05, "--smoothing", 0)
    loop_flags = ("--grad-accum-steps", 2, "--clip-grad", 0.5, "--epochs", 1, "--no-aug")
    argv = (*model_flags, *RDP, "--rdp-batch", mode, *loop_flags)
    folder = run(digits_folder, tmp_path, *argv)
    prepared = set_up(train.parse_args(flags(digits_folder, tmp_path / "loader", *argv)))

    torch.manual_seed(42)
    model = timm.create_model("test_vit", num_classes=10, drop_path_rate=0.7, img_size=32, depth=3)
    loaded = list(prepared.data.train)
    rdp = timm_rdp.ResidualDropPath(model, seed=42)
    optimizer = timm.optim.create_optimizer_v2(model, "sgd", lr=0.05, weight_decay=2e-5)
    model.train()
    losses = {"droppath": [], "complement": []}
    for start in (0, 2, 4):
        group = loaded[start : start + 2]
        for it in rdp.cycle() if mode == "same" else [rdp.iteration()]:
            with it:
                for images, labels in group:
                    loss = torch.nn.functional.cross_entropy(model(images), labels)
                    losses[it.phase].append(loss.item())
                    (loss / len(group)).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()

    assert losses["complement"]
    assert same_bits(checkpoint(folder)["state_dict"], model.state_dict())
    row = rows(folder)[0]
    for phase, values in losses.items():
        assert float(row[f"train_loss_{phase}"]) == pytest.approx(sum(values) / len(values))


def test_columns_tell_what_was_dropped_and_trained(digits_folder, tmp_path, monkeypatch):
    dropped, fractions = [], []

    def before(run):
        it = run.rdp._active
        parameters = dict(run.rdp.model.named_parameters())
        total = sum(p.numel() for p in parameters.values())
        if it.phase == "droppath":
            dropped.append(len(it.dropped))
        else:
            trained = [p.numel() for p in parameters.values() if p.requires_grad]
            fractions.append(sum(trained) / total)

    watch_iterations(monkeypatch, before)
    (row,) = rows(run(digits_folder, tmp_path, *VIT, *RDP, "--epochs", 1))
    assert float(row["dropped_paths"]) == pytest.approx(sum(dropped) / len(dropped))
    assert float(row["trainable_fraction"]) == pytest.approx(sum(fractions) / len(fractions))
    assert 0 < float(row["trainable_fraction"]) < 1


@pytest.mark.parametrize(
    "more",
    [
        ("--clip-grad", 0.5, "--clip-mode", "norm"),
        ("--clip-grad", 0.1, "--clip-mode", "value", "--model-ema"),
        ("--clip-grad", 0.02, "--clip-mode", "agc"),
        ("--grad-accum-steps", 2, "--opt", "lamb", "--weight-decay", 0.1),
        ("--amp", "--amp-dtype", "bfloat16", "--opt", "sgd", "--weight-decay", 0.1),
    ],
    ids=["norm", "value and EMA", "agc", "accumulation", "AMP"],
)
@pytest.mark.parametrize("mode", ["same", "next"])
def test_frozen_parameters_keep_every_bit_in_a_run(
    digits_folder, tmp_path, monkeypatch, more, mode
):
    trained = {"droppath": 0, "complement": 0}

    def before(run):
        run.bits = {n: p.detach().clone() for n, p in run.rdp.model.named_parameters()}

    def after(run):
        it = run.rdp._active
        for name, parameter in run.rdp.model.named_parameters():
            if name not in it.trainable:
                assert torch.equal(parameter, run.bits[name]), (it, name)
            else:
                trained[it.phase] += not torch.equal(parameter, run.bits[name])

    watch_iterations(monkeypatch, before, after)
    run(digits_folder, tmp_path, *VIT, *RDP, "--rdp-batch", mode, "--epochs", 1, *more)
    assert all(trained.values())


def test_before_the_start_epoch_training_is_timms_own(digits_folder, tmp_path):
    plain = run(digits_folder, tmp_path / "a", *VIT, "--drop-path", 0.4, "--epochs", 1)
    late = run(
        digits_folder, tmp_path / "b", *VIT, "--drop-path", 0.4, "--rdp", "--rdp-start-epoch", 1
    )
    first, second = rows(late)
    (expected,) = rows(plain)
    assert first["train_loss_droppath"] == first["trainable_fraction"] == ""
    assert first["train_loss"] == expected["train_loss"]
    assert second["train_loss_droppath"] != ""


def test_schedule_and_ema_count_batches_with_and_without_rdp(digits_folder, tmp_path, monkeypatch):
    steps = []
    original = timm.task.TrainingTask.update_ema
    monkeypatch.setattr(
        timm.task.TrainingTask,
        "update_ema",
        lambda self, step: (steps.append(step), original(self, step))[1],
    )
    more = ("--sched-on-updates", "--model-ema", "--drop-path", 0.7)
    lrs = []
    for name, extra in {
        "plain": (),
        "same": ("--rdp",),
        "next": ("--rdp", "--rdp-batch", "next"),
    }.items():
        folder = run(digits_folder, tmp_path / name, *VIT, *more, *extra)
        lrs.append([row["lr"] for row in rows(folder)])
    assert lrs[0] == lrs[1] == lrs[2]
    assert steps == list(range(1, 11)) * 3


@given(batches=st.integers(1, 60), accumulate=st.integers(1, 12))
def test_batches_are_grouped_as_in_timms_script(batches, accumulate):
    """Against timm's rule, followed batch by batch."""
    updates, steps, size = [], accumulate, 0
    left_over = batches % accumulate
    for index in range(batches):
        last = index == batches - 1
        update = last or (index + 1) % steps == 0
        if index >= batches - left_over:
            steps = left_over
        size += 1
        if update:
            updates.append((size, steps, last))
            size = 0
    ours = update_sizes(batches, accumulate)
    assert [next(ours) for _ in updates] == updates


def test_the_loop_fetches_numbers_from_the_device_only_to_show_them(
    digits_folder, tmp_path, monkeypatch
):
    fetched = []
    epoch = train.train_one_epoch

    def counted(name, original):
        def call(self, *args):
            caller = sys._getframe(1).f_code.co_filename
            if Path(caller).is_relative_to(Path(timm_rdp.__file__).parent):
                fetched.append(name)
            return original(self, *args)

        return call

    def watched(*args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
                patch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
            epoch(*args, **kwargs)

    monkeypatch.setattr(train, "train_one_epoch", watched)
    more = ("--opt", "sgd", "--log-interval", 100, "-b", 4, "--epochs", 1)
    run(digits_folder, tmp_path, *VIT, *RDP, *more)
    # 20 updates: shown after the first and after the last
    assert fetched == ["tolist"] * 2


def test_a_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(digits_folder, tmp_path, capsys):
    folder = run(digits_folder, tmp_path, *VIT, *RDP, "--epochs", 1)
    kept = {path: path.read_bytes() for path in folder.glob("*.pth.tar")}
    capsys.readouterr()
    argv = flags(
        digits_folder, tmp_path, *VIT, *RDP, "--resume", folder / "last.pth.tar",
        "--no-resume-opt", "--opt", "sgd", "--lr", 1e30, "--sched", "none",
    )  # fmt: skip
    assert train.main(argv) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(
        r"loss is nan in epoch 1, update [01] \((droppath|complement) iteration\)", line
    )
    assert {path: path.read_bytes() for path in folder.glob("*.pth.tar")} == kept
    assert all(v.isfinite().all() for v in checkpoint(folder)["state_dict"].values())


def test_weights_that_blew_up_in_the_last_step_are_not_saved(digits_folder, tmp_path, capsys):
    argv = flags(
        digits_folder, tmp_path, *VIT, "--opt", "sgd", "--lr", 3e38, "--sched", "none", "-b", 80,
        "--epochs", 1,
    )  # fmt: skip
    assert train.main(argv) == 1
    assert "validation loss is nan after epoch 0" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.pth.tar"))


def test_weights_that_are_not_finite_are_found_before_they_are_saved(digits_folder, tmp_path):
    prepared = set_up(train.parse_args(flags(digits_folder, tmp_path, *RESNET)))
    loop.check_weights(prepared.task, RunState())
    model = prepared.task.get_trainable_module()
    for tensor in list(model.state_dict().values())[::7]:
        if tensor.is_floating_point():
            good = tensor.flatten()[-1].clone()
            tensor.view(-1)[-1] = math.inf
            with pytest.raises(TrainingError, match="a weight is not a finite number"):
                loop.check_weights(prepared.task, RunState())
            tensor.view(-1)[-1] = good
    loop.check_weights(prepared.task, RunState())


@pytest.mark.parametrize("phase", ["droppath", "complement", ""])
def test_a_non_finite_loss_names_its_update_and_iteration(phase):
    losses = Losses(epoch=3)
    for update, value in enumerate((1.0, 2.0, math.inf, math.nan)):
        losses.add(torch.tensor(value), 1, 16, update, phase, first=True)
    with pytest.raises(TrainingError) as error:
        losses.fetch()
    kind = phase or "plain"
    assert f"loss is inf in epoch 3, update 2 ({kind} iteration)" in str(error.value)


@pytest.mark.parametrize(
    ("model", "rdp", "words"),
    [
        ("vgg11", "--rdp", ("vgg11", "no drop_path_rate", "choose a model")),
        ("densenet121", "--rdp", ("densenet121", "no drop_path_rate")),
        ("vgg11", "", ("vgg11", "no drop_path_rate", "--drop-path")),
        ("lcnet_050", "--rdp", ("lcnet_050", "no residual path")),
    ],
)
def test_a_model_without_paths_is_refused(digits_folder, refused, model, rdp, words):
    line = refused(
        "--model", model, "--drop-path", "0.1", *rdp.split(), "--img-size", 32,
        "--data-dir", digits_folder, "--num-classes", 10, "-j", 0, "-b", 16,
    )  # fmt: skip
    assert all(word in line for word in words), line


def test_an_option_that_the_model_does_not_know_is_named(digits_folder, refused):
    data = ("--data-dir", digits_folder, "--num-classes", 10)
    assert "--model-kwargs dept" in refused(
        "--model", "test_vit", "--model-kwargs", "dept=3", *data
    )
    assert "--bn-momentum" in refused("--model", "test_vit", "--bn-momentum", "0.1", *data)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((*VIT, "--torchcompile", "inducto"), ("--torchcompile inducto", "inductor")),
        ((*VIT, "--torchcompile", "--torchcompile-mode", "fast"), ("--torchcompile-mode fast",)),
        ((*VIT, "--tta", 3), ("--tta 3", "(16)", "(40)")),
        ((*VIT, "--naflex-loader", "--save-images"), ("--save-images", "--naflex-loader")),
        ((*VIT, "--kd-model-name", "nonsense"), ("--kd-model-name nonsense",)),
        ((*RESNET, "--aug-splits", 2, "--jsd-loss", "--mixup", 0.5, "--no-prefetcher"),
         ("--loss jsd", "mixup")),
        ((*VIT, "--opt-kwargs", "nonsense=1"), ("--opt", "nonsense")),
    ],
)  # fmt: skip
def test_what_timms_library_cannot_run_is_refused_before_it_fails(
    digits_folder, refused, more, words
):
    line = refused(*more, "--data-dir", digits_folder, "--num-classes", 10, "-j", 0, "-b", 16)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("mode", ["same", "next"])
@pytest.mark.parametrize(
    "more",
    [
        (*VIT, "--kd-model-name", "local-dir:{teacher}"),
        (*VIT, "--kd-model-name", "local-dir:{teacher}", "--kd-distill-type", "feature"),
        (
            "--model", "deit_tiny_distilled_patch16_224", "--img-size", 32, "--model-kwargs",
            "depth=3", "embed_dim=24", "--kd-model-name", "local-dir:{teacher}",
            "--kd-distill-type", "token",
        ),
        (*RESNET, "--aug-splits", 2, "--jsd-loss", "--split-bn", "--aa", "augmix-m3-w2"),
        (*RESNET, "--aug-splits", 2, "--jsd-loss", "--no-prefetcher"),
        (*RESNET, "--train-img-sizes", 32, 48, "--train-batch-sizes", 16, 8,
         "--variable-batch-loss-scale", "sqrt"),
        (
            "--model", "naflexvit_base_patch16_gap", "--model-kwargs", "embed_dim=24", "depth=3",
            "num_heads=2", "--naflex-loader", "--naflex-train-seq-lens", 4, 9,
            "--naflex-max-seq-len", 4, "--mixup", 0.5,
        ),
        (
            "--model", "naflexvit_base_patch16_gap", "--model-kwargs", "embed_dim=24", "depth=3",
            "num_heads=2", "enable_patch_interpolator=True", "--naflex-loader",
            "--naflex-train-seq-lens", 4, "--naflex-max-seq-len", 4, "--naflex-patch-sizes", 8, 16,
            "--no-prefetcher",
        ),
        (*VIT, "--grad-checkpointing", "--fast-norm", "--head-init-scale", 0.1, "--tta", 2),
        (*VIT, "--save-images", "--channels-last", "--layer-decay", 0.7),
    ],
    ids=["logit", "feature", "token", "JSD and split BN", "JSD, no prefetcher", "scheduled sizes",
         "NaFlex", "NaFlex, patch sizes",
         "checkpointing", "images"],
)  # fmt: skip
def test_each_feature_of_timms_script_also_trains_with_rdp(
    digits_folder, tmp_path, teacher, more, mode
):
    more = [str(flag).format(teacher=teacher) for flag in more]
    folder = run(digits_folder, tmp_path, *more, *RDP, "--rdp-batch", mode, "--epochs", 1)
    (row,) = rows(folder)
    assert math.isfinite(float(row["train_loss_droppath"]))
    assert math.isfinite(float(row["train_loss_complement"]))
    assert 0 < float(row["trainable_fraction"]) < 1
    assert ("--save-images" in more) == bool(list(folder.glob("train-batch-*.jpg")))


@pytest.mark.slow
# torch's own, without RDP too: it looks at .grad of what enters a compiled part of a model.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_run_compiled_by_regions_is_that_of_eager_mode(digits_folder, tmp_path, fresh_compiler):
    flags = (*VIT, *RDP, "--drop-path", 0.5, "--epochs", 2, "--model-ema", "--grad-accum-steps", 2)
    eager = rows(run(digits_folder, tmp_path, *flags, "--experiment", "eager"))
    flags = (*flags, "--torchcompile", "aot_eager")
    compiled = rows(run(digits_folder, tmp_path, *flags, "--experiment", "compiled"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    for ours, theirs in zip(compiled, eager, strict=True):
        for column, value in theirs.items():
            assert (ours[column] == "") == (value == "")
            if value:
                assert float(ours[column]) == pytest.approx(float(value), rel=1e-3), column


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    model = timm.create_model("test_efficientnet", num_classes=10)
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return folder


def test_the_projection_of_feature_distillation_is_frozen_in_complement_iterations(
    digits_folder, tmp_path, monkeypatch, teacher
):
    changed = {"droppath": set(), "complement": set()}

    def projection(run):
        return run.task.get_trainable_module().projection.weight.detach().clone()

    def before(run):
        run.bits = projection(run)

    def after(run):
        changed[run.rdp._active.phase].add(not torch.equal(run.bits, projection(run)))

    watch_iterations(monkeypatch, before, after)
    distill = ("--kd-model-name", f"local-dir:{teacher}", "--kd-distill-type", "feature")
    run(digits_folder, tmp_path, *VIT, *RDP, *distill, "--epochs", 1)
    assert changed == {"droppath": {True}, "complement": {False}}


def test_rdp_that_would_never_begin_is_said(digits_folder, tmp_path, caplog):
    run(digits_folder, tmp_path, *VIT, "--rdp", "--drop-path", 0.5, "--rdp-start-epoch", 2)
    said = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert [m for m in said if "--rdp-start-epoch 2: the run has 2 epochs" in m]
    caplog.clear()
    run(digits_folder, tmp_path / "b", *VIT, "--rdp", "--drop-path", 0.5, "--rdp-start-epoch", 1)
    assert not [r for r in caplog.records if "never begins" in r.message]


def test_lines_are_plain_where_there_is_no_terminal(digits_folder, tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO)
    folder = run(digits_folder, tmp_path, *VIT, *RDP, "--log-interval", 2)
    lines = [r.message for r in caplog.records]
    shown = [line for line in lines if line.startswith("Train: ")]
    assert [re.match(r"Train: (\d) \[ +(\d)/5", line).groups() for line in shown] == [
        (epoch, update) for epoch in "01" for update in "024"
    ]
    assert "Complement: " in shown[-1] and "LR: " in shown[-1]
    assert any(line == f"Outputs are in {folder}" for line in lines)
    best = max((float(row["eval_top1"]), row["eval_top1"]) for row in rows(folder))[0]
    assert any(line.startswith(f"*** Best metric: {best:.2f} (epoch ") for line in lines)
    assert f"checkpoint-0.pth.tar', {float(rows(folder)[0]['eval_top1']):.2f})\n" in "".join(lines)
    tests = [line for line in lines if line.startswith("Test: ")]
    assert all(re.search(r"Loss: +\d+\.\d{3}  Top1: +\d+\.\d\d  Top5:", line) for line in tests)
    out = capsys.readouterr().out
    results = json.loads(out.removeprefix("--result\n"))
    assert [r["epoch"] for r in sorted(results, key=lambda r: r["epoch"])] == [0, 1]
    assert str(results[-1]["validation"]["top1"]) == max(
        (row["eval_top1"] for row in rows(folder)), key=float
    )


@pytest.mark.parametrize("loader", [[], ["--no-prefetcher"]], ids=" ".join)
def test_mean_and_std_of_other_channels_are_told_once(loader, digits_folder, tmp_path, caplog):
    run(digits_folder, tmp_path, *VIT, "--in-chans", 1, "--epochs", 1, *loader)
    told = [r.message for r in caplog.records if "mean" in r.message and "std" in r.message]
    assert len(told) == 1 and "of 3 channels, the images have 1" in told[0]


def test_a_terminal_gets_a_bar_with_both_losses_and_the_time_left(
    digits_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("timm_rdp.training.log._BAR_INTERVAL", 0.0)
    run(digits_folder, tmp_path, *VIT, *RDP)
    drawn = capsys.readouterr().err
    assert re.search(
        r"Train: 1: 100%.*run left=00:00, droppath=\S+, complement=\S+, img/s=\d+", drawn
    )
