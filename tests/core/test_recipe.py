"""docs/your_own_script.md, docs/nested_depth.md: what they show is applied, and run, as shown."""

import difflib
import re
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from core_helpers import same_bits
from digits import digit_images

from timm_rdp import ResidualDropPath
from timm_rdp.launch.main import main as launch

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file")  # timm leaves images open

DOCUMENT = Path(__file__).parents[2] / "docs" / "your_own_script.md"
NESTED = DOCUMENT.with_name("nested_depth.md")
ARGS = "--model test_vit --img-size 32 --batch-size 16 --epochs 2 --drop-path 0.4 --lr 0.0005"


def block(label: str) -> str:
    """The code block of the document that the comment `label` announces."""
    found = re.findall(rf"<!-- {label} -->\n```\w+\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(found) == 1, label
    return found[0]


def patched(script: str, diff: str) -> str:
    """The script after a unified diff, which `patch` takes too: its line numbers are right."""
    header, *hunks = re.split(r"^@@ .* @@\n", diff, flags=re.MULTILINE)
    changed = script
    for hunk in hunks:
        lines = hunk.splitlines()
        old = "".join(f"{line[1:]}\n" for line in lines if line[0] != "+")
        new = "".join(f"{line[1:]}\n" for line in lines if line[0] != "-")
        assert changed.count(old) == 1, old
        changed = changed.replace(old, new)
    names = re.findall(r"^(?:---|\+\+\+) (\S+)", header, re.MULTILINE)
    before, after = (text.splitlines(keepends=True) for text in (script, changed))
    assert diff == "".join(difflib.unified_diff(before, after, *names))
    return changed


class Recipe:
    """The document's script, as it is and with its diffs applied, trained on the digits."""

    def __init__(self, folder: Path, data: Path):
        self._folder = folder
        self._args = [*ARGS.split(), "--data-dir", str(data), "--output", str(folder / "w.pt")]
        script = block("train.py")
        self._write("train", script)
        self._write("hooks", patched(script, block("hooks.diff")))
        self._write("loop", patched(script, block("loop.diff")))

    def _write(self, name: str, text: str) -> None:
        (self._folder / f"{name}.py").write_text(text)

    def weights(self, name: str, *args: str) -> dict:
        """The weights that a script ends with."""
        script = str(self._folder / f"{name}.py")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script, *self._args, *args])
            runpy.run_path(script, run_name="__main__")
        return torch.load(self._folder / "w.pt")

    def launched_weights(self, *args: str) -> dict:
        """The weights that the unchanged script ends with when it is launched."""
        assert launch([str(self._folder / "train.py"), *self._args, *args]) == 0
        return torch.load(self._folder / "w.pt")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, digits_folder) -> Recipe:
    return Recipe(tmp_path_factory.mktemp("recipe"), digits_folder)


@pytest.fixture(scope="module")
def plain(recipe) -> dict:
    return recipe.weights("train")


@pytest.mark.parametrize("name", ["hooks", "loop"])
def test_without_rdp_the_changed_script_trains_as_before(recipe, plain, name):
    assert same_bits(recipe.weights(name), plain)


def test_hooks_loop_and_launcher_do_the_same(recipe, plain):
    hooks = recipe.weights("hooks", "--rdp")
    assert not same_bits(hooks, plain)
    assert same_bits(hooks, recipe.weights("loop", "--rdp", "--rdp-batch", "next"))
    assert same_bits(hooks, recipe.launched_weights("--rdp", "--rdp-seed", "42"))


def test_the_loop_follows_every_option(recipe, plain):
    same = recipe.weights("loop", "--rdp")
    assert not same_bits(same, recipe.weights("loop", "--rdp", "--rdp-batch", "next"))
    assert same_bits(plain, recipe.weights("loop", "--rdp", "--rdp-start-epoch", "2"))


def test_the_hooks_refuse_what_they_cannot_do(recipe, capsys):
    for args in (["--rdp-batch", "same"], ["--rdp-start-epoch", "1"]):
        with pytest.raises(SystemExit) as exit_:
            recipe.weights("hooks", "--rdp", *args)
        assert exit_.value.code == 2
        assert capsys.readouterr().err.endswith("runs next, from the first epoch on\n")


class Noted:
    """Batches of digits; notes of each which iteration it was in and which parameters changed."""

    def __init__(self, count: int):
        self.namespace: dict = {"loader": self, "device": "cpu"}
        torch.manual_seed(0)
        exec(block("set-up"), self.namespace)
        self.model = self.namespace["model"].train()
        self.rdp: ResidualDropPath = self.namespace["rdp"]
        self._count = count
        self.phases: list[tuple[int, str]] = []
        self.changes: list[int] = []
        self.model.register_forward_hook(self._note)

    def _note(self, *_: object) -> None:
        state = self.rdp.state_dict()
        self.phases.append((state["cycle"], state["phase"]))

    def __iter__(self):
        before = self._weights()
        for i in range(self._count):
            yield digit_images(4, start=4 * i)
            after = self._weights()
            self.changes.append(
                sum(not same_bits(a, b) for a, b in zip(before, after, strict=True))
            )
            before = after

    def _weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def run(self, label: str) -> None:
        exec(block(label), self.namespace)


def plain_sequence(count: int) -> list[tuple[int, str]]:
    """(cycle, phase) of the first iterations in the set-up's loop without anything special."""
    noted = Noted(count)
    for images, labels in noted:
        noted.namespace["loss_fn"](noted.model(images), labels).backward()
        noted.namespace["optimizer"].step()
        noted.namespace["optimizer"].zero_grad()
    return noted.phases


def test_an_overflow_that_skips_the_step_repeats_the_iteration():
    noted = Noted(8)
    overflows = {2, 5}

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf") if len(noted.phases) - 1 in overflows else gradient

    for parameter in noted.model.parameters():
        parameter.register_hook(overflow)
    noted.run("scaler")
    skipped = {i for i, changed in enumerate(noted.changes) if changed == 0}
    assert overflows <= skipped  # float16 may overflow by itself as well
    sequence = iter(plain_sequence(9))
    expected = next(sequence)
    for i, phase in enumerate(noted.phases):
        assert phase == expected
        if i not in skipped:
            expected = next(sequence)
    assert {phase for _, phase in noted.phases} == {"droppath", "complement"}


def test_accumulated_batches_belong_to_one_iteration():
    noted = Noted(16)
    noted.run("accumulation")
    assert noted.phases == [each for each in plain_sequence(4) for _ in range(4)]
    assert [bool(changed) for changed in noted.changes] == 4 * [False, False, False, True]


def test_a_second_optimizer_is_refused_and_the_first_stays_attached():
    noted = Noted(4)
    with pytest.raises(ValueError, match="already attached to an optimizer"):
        noted.run("several optimizers")
    noted.run("accumulation")
    assert [bool(changed) for changed in noted.changes] == [False, False, False, True]


def test_the_second_step_is_clipped_by_what_is_given():
    names: dict = {"loader": None, "device": "cpu"}
    exec(block("set-up"), names)
    model, optimizer = names["model"].train(), names["optimizer"]
    names["rdp"].detach()
    rdp = ResidualDropPath(model)
    norms: list[torch.Tensor] = []

    def clip_grad_norm_(parameters, largest):
        clipped = [p for p in parameters if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(clipped, largest)
        norms.append(torch.stack([p.grad.norm() for p in clipped]).norm())

    exec(block("clip"), names | {"rdp": rdp, "clip_grad_norm_": clip_grad_norm_})
    for i in range(4):
        images, labels = digit_images(4, start=4 * i)

        def closure(images=images, labels=labels):
            loss = 100 * names["loss_fn"](model(images), labels)
            loss.backward()
            return loss

        optimizer.step(closure)
        optimizer.zero_grad()
    assert norms and all(float(norm) < 1.001 for norm in norms)


def test_the_inner_of_two_networks_in_one_is_the_one_trained_alone():
    small = dict(depth=4, img_size=32)
    (code,) = re.findall(r"```python\n(.*?)```", NESTED.read_text(), re.DOTALL)
    assert code.count('"vit_small_patch16_224"') == 1
    code = code.replace('"vit_small_patch16_224"', '"test_vit", **small')
    torch.manual_seed(0)
    loader = [(torch.randn(4, 3, 32, 32), torch.randint(10, (4,))) for _ in range(3)]
    torch.manual_seed(1)
    nested = {"loader": loader, "small": small}
    exec(code, nested)

    torch.manual_seed(1)
    alone = timm.create_model("test_vit", num_classes=10, **small)
    before = alone.blocks[1].mlp.fc1.weight.clone()
    alone.blocks = torch.nn.Sequential(*list(alone.blocks)[::2])
    optimizer = torch.optim.AdamW(alone.parameters())
    for images, targets in loader:
        torch.nn.functional.cross_entropy(alone(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same_bits(alone.state_dict(), nested["model"].state_dict())
    assert not torch.equal(nested["added"][0].mlp.fc1.weight, before)
