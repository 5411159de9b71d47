"""`timm-rdp launch`: RDP for scripts that know nothing of it."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from core_helpers import same_bits
from digits import digit_images
from launched_scripts import (
    DISTRIBUTED,
    DISTRIBUTED_EXPLICIT,
    PLAIN,
    TIMM_STYLE,
    with_explicit_cycles,
    with_explicit_iterations,
)
from ranks import Ranks
from timm.scheduler.scheduler import Scheduler
from torch import nn

from timm_rdp import ResidualDropPath
from timm_rdp.launch.main import main

MODEL_STATES = ("state_dict", "state_dict_ema", "task_state", "task_state_ema", "losses")


class Scripts:
    """Writes scripts, runs them, launched or not, and reads what they saved."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture):
        self.folder = folder
        self._capsys = capsys
        self.err = self.out = ""

    def write(self, text: str, name: str = "script.py") -> str:
        path = self.folder / name
        path.write_text(text)
        return str(path)

    def launch(self, text: str, *args: object) -> int:
        self._capsys.readouterr()
        try:
            return main([self.write(text), *map(str, args)])
        finally:
            self.out, self.err = self._capsys.readouterr()

    def saved_by(self, text: str, *args: object) -> dict:
        """What a launched script saved to its --out."""
        out = self.folder / "out.pt"
        assert self.launch(text, *args, "--out", out) == 0, self.err
        return torch.load(out)

    def saved_by_python(self, text: str, *args: object) -> dict:
        """What a script saved to its --out that Python itself ran, in another process."""
        out = self.folder / "out.pt"
        command = [sys.executable, self.write(text), *map(str, args), "--out", str(out)]
        subprocess.run(command, check=True, cwd=self.folder)
        return torch.load(out)

    def refused(self, text: str, *args: object) -> str:
        """The line with which launching the script ends."""
        assert self.launch(text, *args) == 2
        errors = [line for line in self.err.splitlines() if not line.startswith("timm-rdp: ")]
        assert len(errors) == 1 and errors[0].startswith("error: "), self.err
        return errors[0]


@pytest.fixture
def scripts(tmp_path, capsys) -> Scripts:
    return Scripts(tmp_path, capsys)


def test_without_rdp_a_script_gives_bitwise_what_it_gives_without_the_launcher(scripts):
    launched = scripts.saved_by(PLAIN, "--drop-path", 0.4)
    plain = scripts.saved_by_python(PLAIN, "--drop-path", 0.4)
    assert same_bits(launched, plain)


def test_without_rdp_nothing_is_hooked(scripts):
    script = "import timm; print(hasattr(timm.create_model, '__wrapped__'))"
    assert scripts.launch(script) == 0
    assert scripts.out == "False\n"
    scripts.refused(script, "--rdp")
    assert scripts.out == "True\n"


def test_a_launched_script_equals_a_loop_of_iterations(scripts):
    args = ("--drop-path", 0.4, "--updates", 12, "--seed", 7)
    launched = scripts.saved_by(PLAIN, *args, "--rdp")

    images, labels = digit_images(64)
    torch.manual_seed(7)
    model = timm.create_model("test_vit", img_size=32, num_classes=10, drop_path_rate=0.4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    rdp = ResidualDropPath(model, seed=7)
    model.train()
    phases = set()
    for update in range(12):
        some = slice(8 * update % 64, 8 * update % 64 + 8)
        with rdp.iteration() as it:
            phases.add(it.phase)
            nn.functional.cross_entropy(model(images[some]), labels[some]).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert phases == {"droppath", "complement"}
    assert same_bits(launched["model"], model.state_dict())
    assert same_bits(launched["optimizer"]["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize(
    "args",
    [
        ["--opt", "lookahead_adamw"],
        ["--opt", "lamb", "--accumulate", "2"],
        ["--distill", "logit"],
        ["--distill", "feature"],
        pytest.param(["--compile", "eager"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_timm_style_script_equals_the_one_with_iterations_written_into_it(scripts, args):
    if "--compile" in args:
        torch.compiler.reset()
    args = ["--drop-path", 0.4, "--seed", 42, *args]
    launched = scripts.saved_by(TIMM_STYLE, *args, "--rdp", "--rdp-batch", "next")
    example = "torch.empty(2, 3, 32, 32)" if "feature" in args else "None"
    explicit = scripts.saved_by(with_explicit_iterations(TIMM_STYLE, example), *args)
    plain = scripts.saved_by(TIMM_STYLE, *args)
    for key in MODEL_STATES:
        assert same_bits(launched.get(key), explicit.get(key)), key
    assert same_bits(launched["optimizer"]["state"], explicit["optimizer"]["state"])
    assert not same_bits(launched["state_dict"], plain["state_dict"])


def test_teachers_and_ema_copies_are_left_alone(scripts):
    saved = scripts.saved_by(TIMM_STYLE, "--drop-path", 0.4, "--distill", "logit", "--rdp")
    assert "DropPath" in saved["teacher_classes"]
    assert "MaskedDropPath" not in saved["teacher_classes"]
    plain = scripts.saved_by(TIMM_STYLE, "--drop-path", 0.4, "--distill", "logit")
    assert saved["state_dict_ema"].keys() == plain["state_dict_ema"].keys()


def test_the_model_that_was_taken_is_logged(scripts):
    scripts.saved_by(PLAIN, "--drop-path", 0.4, "--rdp")
    assert "ResidualDroppath on VisionTransformer, model 0 (test_vit)" in scripts.err
    assert "10 residual paths" in scripts.err and "step of AdamW" in scripts.err
    assert scripts.out == "done\n"


@pytest.mark.parametrize(
    ("args", "seed"),
    [
        ([], 0),
        (["--seed", "11"], 11),
        (["--seed=12"], 12),
        (["--seed", "11", "--seed=-3"], -3),
        (["--rdp-seed", "5"], 5),
        (["--seed", "11", "--rdp-seed", "5"], 5),
    ],
)
def test_the_masks_are_from_rdp_seed_or_else_from_the_scripts_seed(scripts, args, seed):
    saved = scripts.saved_by(PLAIN, "--drop-path", 0.4, "--updates", 1, *args, "--rdp")
    assert saved["optimizer"]["timm_rdp"]["seed"] == seed


def test_every_is_that_of_the_option(scripts):
    saved = scripts.saved_by(PLAIN, "--drop-path", 0.6, "--updates", 6, "--rdp", "--rdp-every=3")
    state = saved["optimizer"]["timm_rdp"]
    # Two cycles of a droppath iteration alone, the third with its complement, then two more.
    assert (state["every"], state["cycle"], state["phase"]) == (3, 5, "droppath")


def test_a_resumed_script_goes_on_with_the_cycle_where_it_stood(scripts):
    args = ("--drop-path", 0.4, "--rdp")
    whole = scripts.saved_by(PLAIN, *args, "--updates", 11)
    for stop in (3, 4):
        half = scripts.saved_by(PLAIN, *args, "--updates", stop)
        torch.save(half, scripts.folder / "half.pt")
        resumed = scripts.saved_by(
            PLAIN, *args, "--updates", 11, "--resume", scripts.folder / "half.pt"
        )
        assert same_bits(
            [resumed["model"], resumed["optimizer"]], [whole["model"], whole["optimizer"]]
        )
        assert "goes on at cycle" in scripts.err


def test_the_checkpoint_of_a_launched_script_goes_on_without_rdp(scripts):
    half = scripts.saved_by(PLAIN, "--drop-path", 0.4, "--updates", 3, "--rdp")
    torch.save(half, scripts.folder / "half.pt")
    args = ("--drop-path", 0.4, "--updates", 6, "--resume", scripts.folder / "half.pt")
    assert len(scripts.saved_by(PLAIN, *args)["losses"]) == 3
    half["optimizer"].pop("timm_rdp")
    torch.save(half, scripts.folder / "half.pt")
    scripts.saved_by(PLAIN, *args, "--rdp")
    assert "cycles start at 0" in scripts.err


def test_a_resumed_script_that_has_nothing_left_to_do_is_no_error(scripts):
    args = ("--drop-path", 0.4, "--updates", 3, "--rdp")
    torch.save(scripts.saved_by(PLAIN, *args), scripts.folder / "done.pt")
    scripts.saved_by(PLAIN, *args, "--resume", scripts.folder / "done.pt")


def test_before_the_start_epoch_training_is_timms_own(scripts):
    args = ("--drop-path", 0.4, "--epochs", 2)
    rdp = scripts.saved_by(TIMM_STYLE, *args, "--rdp", "--rdp-start-epoch", 1)
    assert "epoch 1: ResidualDroppath begins" in scripts.err
    plain = scripts.saved_by(TIMM_STYLE, *args)
    assert rdp["losses"][:8] == plain["losses"][:8]
    assert rdp["losses"][8:] != plain["losses"][8:]
    state = rdp["optimizer"]["timm_rdp"]
    assert 4 <= state["cycle"] <= 8  # of eight updates

    never = scripts.saved_by(TIMM_STYLE, *args, "--rdp", "--rdp-start-epoch", 9)
    assert same_bits(never["state_dict"], plain["state_dict"])
    assert "--rdp-start-epoch 9 was never reached" in scripts.err


def test_a_script_resumed_after_the_start_epoch_begins_with_iterations(scripts):
    args = ("--drop-path", 0.4, "--start-epoch", 2)
    late = scripts.saved_by(TIMM_STYLE, *args, "--rdp", "--rdp-start-epoch", 1)
    assert same_bits(late["losses"], scripts.saved_by(TIMM_STYLE, *args, "--rdp")["losses"])


def test_a_start_epoch_is_refused_where_the_script_does_not_tell_its_epoch(scripts):
    start = ("--drop-path", 0.4, "--out", scripts.folder / "out", "--rdp", "--rdp-start-epoch", 1)
    assert "no timm scheduler" in scripts.refused(PLAIN, *start)
    resumed = scripts.refused(TIMM_STYLE, *start, "--start-epoch", 1, "--sched-on-updates")
    assert "schedule per update" in resumed
    assert not (scripts.folder / "out").exists()


TWO_MODELS = """
import timm, torch
torch.manual_seed(0)
one = timm.create_model("test_vit", img_size=32, num_classes=10, drop_path_rate=0.4)
two = timm.create_model("test_vit2", img_size=32, num_classes=10, drop_path_rate=0.4)
images = torch.randn(4, 3, 32, 32)
{optimizers}
for _ in range(4):
    for model, optimizer in ((one, first), (two, second)):
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    print([type(m).__name__ for m in (one.blocks[5].drop_path1, two.blocks[5].drop_path1)])
"""
APART = """
first = torch.optim.SGD(one.parameters(), lr=0.1)
second = torch.optim.SGD(two.parameters(), lr=0.1)
"""


def test_several_trained_models_are_an_error_that_says_how_to_choose(scripts):
    script = TWO_MODELS.format(optimizers=APART)
    line = scripts.refused(script, "--rdp")
    assert "trains 2 models: 0 (test_vit), 1 (test_vit2)" in line and "--rdp-model 0" in line
    for choice, taken in (("0", 0), ("test_vit", 0), ("1", 1), ("test_vit2", 1)):
        assert scripts.launch(script, "--rdp", "--rdp-model", choice) == 0
        classes = ["DropPath", "DropPath"]
        classes[taken] = "MaskedDropPath"
        assert scripts.out.splitlines() == 4 * [str(classes)]
        assert f"SGD trains the model {('1 (test_vit2)', '0 (test_vit)')[taken]}" in scripts.err
    assert "nothing was taken over (--rdp-model resnet50)" in scripts.refused(
        script, "--rdp", "--rdp-model", "resnet50"
    )
    alike = script.replace("test_vit2", "test_vit")
    assert "--rdp-model 0 or --rdp-model 1" in scripts.refused(
        alike, "--rdp", "--rdp-model", "test_vit"
    )


def test_one_optimizer_for_several_models_is_refused(scripts):
    both = "first = second = torch.optim.SGD([*one.parameters(), *two.parameters()], lr=0.1)"
    script = TWO_MODELS.format(optimizers=both)
    for choice in ([], ["--rdp-model", 0]):
        assert "give each an optimizer of its own" in scripts.refused(script, "--rdp", *choice)


def test_several_optimizers_for_one_model_are_refused(scripts):
    halves = """
first = torch.optim.SGD(one.blocks.parameters(), lr=0.1)
second = torch.optim.SGD(one.head.parameters(), lr=0.1)
"""
    line = scripts.refused(TWO_MODELS.format(optimizers=halves), "--rdp")
    assert "second optimizer" in line and "groups of one" in line


def test_a_classifier_around_the_model_is_frozen_with_it(scripts):
    script = """
import timm, torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = timm.create_model("test_vit", img_size=32, num_classes=0, drop_path_rate=0.9)
        self.top = nn.Linear(self.body.num_features, 10)
    def forward(self, x):
        return self.top(self.body(x))
torch.manual_seed(0)
net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
images = torch.randn(4, 3, 32, 32)
for _ in range(2):
    before = net.top.weight.clone()
    net(images).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    print(torch.equal(before, net.top.weight))
"""
    assert scripts.launch(script, "--rdp") == 0
    assert scripts.out.split() == ["False", "True"]  # trained, then frozen
    assert "VisionTransformer within Net" in scripts.err

    parts = script.replace("net.parameters()", "[*net.top.parameters(), *net.body.parameters()]")
    assert scripts.launch(parts, "--rdp") == 0
    assert scripts.out.split() == ["False", "True"]

    apart = script.replace("net.parameters()", "[*net.parameters(), nn.Parameter(torch.ones(1))]")
    assert "no module holds them all" in scripts.refused(apart, "--rdp")


LOOP = """
import timm, torch
torch.manual_seed(0)
model = timm.create_model("test_vit", img_size=32, num_classes=10, drop_path_rate=0.4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
images = torch.randn(4, 3, 32, 32)
for _ in range(2):
    model(images).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (LOOP.replace("0.4", "0.0"), "no residual path that can be dropped"),
        (LOOP.replace("test_vit", "mobilenetv1_100").replace("img_size=32, ", ""), "no DropPath"),
        (LOOP.replace("model(images)", "model.eval()(images)"), "in train mode"),
        (LOOP.replace("range(2)", "range(0)"), "made no training iteration"),
        ("import timm; timm.create_model('test_vit')", "optimizers for none of them"),
        ("print('hello')", "made 0 models by timm.create_model"),
        (LOOP.replace("optimizer =", "torch.jit.script(model); optimizer ="), "torch.jit.script"),
        (
            LOOP.replace("for _", "model = torch.compile(torch.nn.Sequential(model))\nfor _"),
            "wraps Sequential",
        ),
    ],
    ids=[
        "rate 0",
        "no DropPath called",
        "eval mode",
        "no update",
        "no optimizer",
        "no model",
        "torchscript",
        "compiled around",
    ],
)
def test_a_script_that_cannot_be_taken_over_ends_with_one_line_and_status_2(
    scripts, script, expected
):
    assert expected in scripts.refused(script, "--rdp")


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--opt", "lamb"],
        ["--distill", "logit"],
        pytest.param(["--compile", "eager"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_script_with_timms_task_trains_each_batch_in_a_full_cycle(scripts, args):
    if "--compile" in args:
        torch.compiler.reset()
    args = ["--drop-path", 0.4, "--seed", 42, *args]
    launched = scripts.saved_by(TIMM_STYLE, *args, "--rdp")
    assert "is a cycle (same)" in scripts.err
    explicit = scripts.saved_by(with_explicit_cycles(TIMM_STYLE), *args)
    for key in MODEL_STATES:
        assert same_bits(launched.get(key), explicit.get(key)), key
    assert same_bits(launched["optimizer"]["state"], explicit["optimizer"]["state"])
    assert launched["losses"] == explicit["losses"]


def test_a_task_made_after_the_optimizer_trains_each_batch_in_a_full_cycle_too(scripts):
    optimizer = next(line for line in TIMM_STYLE.splitlines() if "= create_optimizer_v2(" in line)
    later = TIMM_STYLE.replace(f"{optimizer}\n", "")
    later = later.replace("    loss_fn = nn.", f"{optimizer}\n    loss_fn = nn.")
    states = []
    for script in (TIMM_STYLE, later):
        states.append(scripts.saved_by(script, "--drop-path", 0.4, "--rdp"))
        assert "each step of AdamW is a cycle (same)" in scripts.err
    assert all(same_bits(states[0].get(key), states[1].get(key)) for key in MODEL_STATES)
    assert states[0]["losses"] == states[1]["losses"]


def test_same_is_refused_where_the_loss_cannot_be_found(scripts):
    line = scripts.refused(
        PLAIN, "--drop-path", 0.4, "--out", "out", "--rdp", "--rdp-batch", "same"
    )
    assert "timm.task" in line


CLOSURE = """
import sys, timm, torch
torch.manual_seed(0)
model = timm.create_model("test_vit", img_size=32, num_classes=10, drop_path_rate=0.4)
optimizer = getattr(torch.optim, sys.argv[1])(model.parameters(), lr=0.1)
images = torch.randn(4, 3, 32, 32)
{set_up}
def closure():
    optimizer.zero_grad()
    loss = model(images).square().mean()
    loss.backward()
    return loss
for _ in range(4):
{step}
torch.save(model.state_dict(), "weights.pt")
"""


@pytest.mark.parametrize("batch", ["next", "same"])
def test_a_script_that_passes_a_closure_equals_a_loop_of_iterations(scripts, batch, monkeypatch):
    monkeypatch.chdir(scripts.folder)
    closure = CLOSURE.format(set_up="", step="    optimizer.step(closure)")
    assert scripts.launch(closure, "SGD", "--rdp", "--rdp-batch", batch) == 0
    launched = torch.load("weights.pt")
    its = {"next": "[rdp.iteration()]", "same": "rdp.cycle()"}[batch]
    explicit = CLOSURE.format(
        set_up="import timm_rdp; rdp = timm_rdp.ResidualDropPath(model)",
        step=f"    for it in {its}:\n        with it:\n            closure(); optimizer.step()",
    )
    assert scripts.launch(explicit, "SGD") == 0
    assert same_bits(launched, torch.load("weights.pt"))


@pytest.mark.parametrize("more", [[], ["--rdp-batch", "same"]], ids=["default", "same"])
def test_lbfgs_is_refused_for_what_it_does(scripts, more):
    closure = CLOSURE.format(set_up="", step="    optimizer.step(closure)")
    assert "LBFGS moves all parameters" in scripts.refused(closure, "LBFGS", "--rdp", *more)


def test_a_probe_of_the_head_is_told_once_that_there_is_nothing_to_complement(scripts):
    probe = LOOP.replace("range(2)", "range(8)")
    probe = probe.replace("SGD(model.parameters()", "SGD(model.head.parameters()")
    frozen = probe.replace("optimizer =", "model.requires_grad_(False); model.head", 1).replace(
        "model.head torch", "model.head.requires_grad_(True)\noptimizer = torch"
    )
    for script in (probe, frozen):
        assert scripts.launch(script, "--rdp") == 0
        assert scripts.err.count("nothing to complement") == 1


def test_a_refusal_that_the_script_swallows_still_ends_with_status_2(scripts):
    indented = LOOP.replace("0.4", "0.0").replace("\n", "\n    ")
    script = f"try:\n    {indented}\nexcept Exception:\n    pass\n"
    assert "no residual path" in scripts.refused(script, "--rdp")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--rdp-every", "2"], "--rdp-every needs --rdp"),
        (["--rdp", "--rdp-every", "0"], "--rdp-every 0 must be a whole number of at least 1"),
        (
            ["--rdp", "--rdp-start-epoch", "-1"],
            "--rdp-start-epoch -1 must be a whole number of at least 0",
        ),
        (["--rdp", "--rdp-evry", "2"], "did you mean --rdp-every"),
        (["--rdp", "--rdp-seed"], "--rdp-seed expected one argument"),
        (["--rdp", "--rdp-seed", "x"], "--rdp-seed invalid int value: 'x'"),
        (["--rdp", "--skip-dropped"], "--skip-dropped cannot be combined with --rdp"),
    ],
)
def test_bad_options_are_one_line_and_status_2(scripts, args, expected):
    assert expected in scripts.refused(LOOP, *args)


def test_a_missing_script_is_one_line_and_status_2(capsys, tmp_path):
    for argv, expected in (
        ([str(tmp_path / "none.py"), "--rdp"], "there is no such file"),
        (["--rdp"], "takes the path of a script first"),
        (["--lr", "1", "train.py"], "takes the path of a script first, not --lr"),
    ):
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and expected in err


def test_skip_dropped_reaches_the_model_that_is_trained(scripts):
    script = LOOP.replace("for _ in", "print(type(model.blocks[5].drop_path1))\nfor _ in")
    assert scripts.launch(script, "--skip-dropped") == 0
    assert "MaskedDropPath" in scripts.out
    assert "what DropPath drops is not computed" in scripts.err


def test_a_function_that_the_script_compiles_is_left_alone(scripts):
    assert scripts.launch(LOOP.replace("for _ in", "torch.compile(len)\nfor _ in"), "--rdp") == 0


def test_the_script_sees_the_arguments_and_paths_that_python_would_give_it(scripts):
    (scripts.folder / "neighbour_of_script.py").write_text("VALUE = 3")
    script = """
import sys, os, neighbour_of_script
print(sys.argv[1:], __name__, os.path.basename(__file__), neighbour_of_script.VALUE)
"""
    args = ["--lr", "-0.1", "-b", "2", "--opt-kwargs", "a=1", "pos itional", "--", "--rdp-own", "x"]
    before = list(sys.argv), list(sys.path)
    assert scripts.launch(script, *args) == 0
    assert scripts.out.strip() == f"{args} __main__ script.py 3"
    assert (sys.argv, sys.path) == before
    assert "nothing was taken over" in scripts.refused(script, *args[:4], "--rdp", *args[4:])
    assert scripts.out.strip() == f"{args} __main__ script.py 3"


@pytest.mark.parametrize("rdp", [[], ["--rdp"]])
def test_errors_and_exit_codes_of_the_script_go_through(scripts, rdp):
    with pytest.raises(ZeroDivisionError):
        scripts.launch(LOOP + "1 / 0", *rdp)
    with pytest.raises(SystemExit) as exit_:
        scripts.launch(LOOP + "raise SystemExit(3)", *rdp)
    assert exit_.value.code == 3
    with pytest.raises(SystemExit) as exit_:
        scripts.launch(LOOP + "import sys; sys.exit()", *rdp)
    assert exit_.value.code is None


def test_a_script_that_exits_with_0_is_checked_all_the_same(scripts):
    assert "nothing was taken over" in scripts.refused("import sys; sys.exit(0)", "--rdp")


def test_help_shows_the_options_of_the_launcher_and_of_the_script(scripts, capsys):
    with pytest.raises(SystemExit) as exit_:
        scripts.launch(PLAIN, "--help", "--rdp")
    assert not exit_.value.code
    assert "--rdp-every" in scripts.out and "--updates" in scripts.out
    assert main(["--help"]) == 0
    help_ = " ".join(capsys.readouterr().out.split())
    assert "--rdp-model" in help_ and "less accurate" in help_


def test_every_hook_is_taken_back(scripts):
    def hooked() -> list[object]:
        return [
            timm.create_model,
            timm.models.create_model,
            torch.optim.Optimizer.__init__,
            nn.parallel.DistributedDataParallel.__init__,
            torch.compile,
            torch.jit.script,
            list(nn.modules.module._global_module_registration_hooks),
            Scheduler.step,
            Scheduler.step_update,
            Scheduler.__init__,
        ]

    before = hooked()
    scripts.saved_by(TIMM_STYLE, "--drop-path", 0.4, "--rdp", "--rdp-start-epoch", 1)
    with pytest.raises(ZeroDivisionError):
        scripts.launch("1 / 0", "--rdp", "--rdp-start-epoch", 1)
    assert hooked() == before


def test_the_command_runs_a_script(scripts):
    script = scripts.write(PLAIN)
    out = scripts.folder / "out.pt"
    args = ["--drop-path", "0.4", "--updates", "3", "--out", str(out)]
    command = [sys.executable, "-m", "timm_rdp.cli", "launch", script, *args, "--rdp"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert torch.load(out)["optimizer"]["timm_rdp"]["cycle"] >= 1


def on_rank(rank: int, size: int, script: str, out: str, *args: str) -> dict:
    assert main([script, f"{out}{rank}", *args]) == 0
    return torch.load(f"{out}{rank}")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    processes = Ranks(tmp_path_factory.mktemp("ranks"))
    yield processes
    processes.stop()


@pytest.mark.parametrize("first", ["ddp", pytest.param("optimizer", marks=pytest.mark.slow)])
def test_a_launched_script_trains_under_distributed_data_parallel(scripts, ranks, first):
    out = str(scripts.folder / "out")
    path = scripts.write(DISTRIBUTED.replace("FIRST", repr(first)))
    launched = ranks.run(on_rank, path, out, "--rdp", "--rdp-seed", "3")
    assert same_bits(launched[0], launched[1])
    explicit = scripts.write(DISTRIBUTED_EXPLICIT.replace("FIRST", repr(first)))
    assert same_bits(launched[0], ranks.run(on_rank, explicit, out)[0])
