"""docs/trainers: what each page shows is run as shown, and trains as the loop written out."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from core_helpers import parameters_of, same_bits, small_model
from torch import nn
from trained import Iterations, adamw, loader, written_out

from timm_rdp import ResidualDropPath

PAGES = Path(__file__).parents[2] / "docs" / "trainers"
NEEDS = 'needs the extra "clients"'
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def imported(name):
    with warnings.catch_warnings():  # of the framework's own imports
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=NEEDS)


def run(page, label, names):
    """Run the code block of a page that the comment `label` announces; the names that it left."""
    text = (PAGES / f"{page}.md").read_text()
    (code,) = re.findall(rf"<!-- {label} -->\n```python\n(.*?)```", text, re.DOTALL)
    exec(code, names)
    return names


def set_up():
    model = small_model("test_vit")
    loss_fn = nn.CrossEntropyLoss()
    given = {"model": model, "optimizer": adamw(model), "loader": loader()}
    return given | {"loss_fn": loss_fn, "torch": torch}


def test_every_page_is_at_most_a_screen():
    for page in PAGES.glob("*.md"):
        lines = page.read_text().splitlines()
        assert len(lines) <= 48 and max(map(len, lines)) <= 100, page


def test_the_package_itself_imports_no_framework():
    names = {"accelerate", "fastai", "lightning", "pytorch_lightning", "transformers"}
    code = "import sys, timm_rdp; timm_rdp.ResidualDropPath, timm_rdp.from_args; "
    code += f"print({names} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


@pytest.mark.parametrize(
    "page, module",
    [
        ("accelerate", "accelerate"),
        ("fabric", "lightning.fabric"),
        ("ignite", "ignite.engine"),
    ],
)
def test_a_loop_with_the_iterations_in_it(monkeypatch, tmp_path, page, module):
    imported(module)
    names = set_up()
    model = names["model"]
    run(page, "recipe", names)
    assert same_bits(parameters_of(model), written_out(5, "same", clip=1.0))
    # Saved between two iterations, and loaded after more of them.
    rdp, optimizer = names["rdp"], names["optimizer"]
    with rdp.iteration():
        names["loss_fn"](names["model"](torch.randn(2, 3, 32, 32)), torch.tensor([0, 1])).backward()
        optimizer.step()
    state = rdp.state_dict()
    assert state["phase"] == "complement"
    own, names["folder"] = rdp.state_dict, tmp_path
    load = rdp.load_state_dict
    loaded = []

    def noted(state):
        for it in rdp.cycle():
            with it:
                pass
        loaded.append(state)
        load(state)

    monkeypatch.setattr(rdp, "load_state_dict", noted)
    run(page, "resume", names)
    assert loaded == [state] == [own()]


@pytest.mark.parametrize("page", ["accelerate", "fabric", "ignite"])
def test_the_loop_as_it_was_with_attach(monkeypatch, page):
    modules = {"accelerate": "accelerate", "fabric": "lightning.fabric", "ignite": "ignite.engine"}
    framework = imported(modules[page])
    iterations = Iterations(monkeypatch)
    names = set_up()
    model, optimizer, batches = (names[name] for name in ("model", "optimizer", "loader"))
    rdp, plain = ResidualDropPath(model), model
    if page == "ignite":
        rdp.attach(optimizer)
        engine = framework.create_supervised_trainer(model, optimizer, names["loss_fn"])
        engine.run(batches, max_epochs=2)
        steps = engine.state.iteration
    else:
        if page == "fabric":
            trainer = framework.Fabric(accelerator="cpu", devices=1)
            model, optimizer = trainer.setup(model, optimizer)
        else:
            trainer = framework.Accelerator(cpu=True)
            model, optimizer, batches = trainer.prepare(model, optimizer, batches)
        rdp.follow(model).attach(optimizer)
        steps = 0
        for images, labels in [*batches, *batches]:
            trainer.backward(names["loss_fn"](model(images), labels))
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    assert steps == 10 and iterations.are_those_of(10, "next")
    assert same_bits(parameters_of(plain), written_out(10, "next"))


def test_accelerates_accumulation_belongs_to_one_iteration(monkeypatch):
    accelerate = imported("accelerate")
    iterations = Iterations(monkeypatch)
    names = set_up()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=5)
    rdp, plain = ResidualDropPath(names["model"]), names["model"]
    prepared = accelerator.prepare(names["model"], names["optimizer"], names["loader"])
    model, optimizer, batches = prepared
    rdp.follow(model).attach(optimizer)
    for _ in range(4):
        for images, labels in batches:
            with accelerator.accumulate(model):
                accelerator.backward(names["loss_fn"](model(images), labels))
                optimizer.step()
                optimizer.zero_grad()
    assert iterations.are_those_of(4, "next")
    assert same_bits(parameters_of(plain), written_out(4, "next", accumulate=5))


def test_accelerates_accumulation_written_out():
    accelerate = imported("accelerate")
    names = set_up()
    rdp, plain = ResidualDropPath(names["model"]), names["model"]
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, batches = accelerator.prepare(
        names["model"], names["optimizer"], names["loader"]
    )
    rdp.follow(model)
    names |= {"accelerator": accelerator, "model": model, "optimizer": optimizer, "rdp": rdp}
    for _ in range(4):
        run("accelerate", "accumulation", names | {"micro_batches": [*batches]})
    assert same_bits(parameters_of(plain), written_out(4, "same", accumulate=5))


@pytest.mark.filterwarnings("ignore")  # Composer is of the days of torch 2.6
def test_composer(monkeypatch, tmp_path):
    imported("composer")
    from composer.models import ComposerModel

    class Model(ComposerModel):
        def __init__(self):
            super().__init__()
            self.net = small_model("test_vit")

        def forward(self, batch):
            return self.net(batch[0])

        def loss(self, outputs, batch, *_):
            return nn.functional.cross_entropy(outputs, batch[1])

    iterations = Iterations(monkeypatch)
    model = Model()
    names = {"model": model, "optimizer": adamw(model), "loader": loader()}
    run("composer", "recipe", names)
    assert names["trainer"].state.timestamp.batch == 5 and iterations.are_those_of(5, "same")
    assert same_bits(parameters_of(model.net), written_out(5, "same", clip=1.0))
    monkeypatch.chdir(tmp_path)
    state = names["rdp"].state_dict()
    run("composer", "resume", names | {"torch": torch})
    assert torch.load("rdp.pt") == state == names["rdp"].state_dict()


@pytest.mark.filterwarnings("ignore::UserWarning")  # few workers, and their like
def test_lightning(monkeypatch):
    imported("lightning.pytorch")
    import test_lightning

    iterations = Iterations(monkeypatch)
    module = test_lightning.Classifier()
    options = test_lightning.QUIET
    run("lightning", "recipe", {"module": module, "loader": loader(), "options": options})
    assert iterations.are_those_of(10, "same")
    assert same_bits(parameters_of(module.net), written_out(10, "same", clip=1.0))


def test_transformers(monkeypatch, tmp_path):
    imported("transformers")
    imported("accelerate")
    import test_transformers

    iterations = Iterations(monkeypatch)
    trainer = test_transformers.made(tmp_path)
    given = {"model": trainer.model, "args": trainer.args, "dataset": trainer.train_dataset}
    names = run("transformers", "recipe", given)
    assert names["trainer"].state.global_step == 10 and iterations.are_those_of(10, "same")


def test_fastai(monkeypatch, tmp_path):
    imported("fastai.basics")
    import test_fastai

    iterations = Iterations(monkeypatch)
    made = test_fastai.learner(path=tmp_path)
    names = {"dls": made.dls, "model": made.model}
    made.dls.path = tmp_path
    run("fastai", "recipe", names)
    assert names["learn"].train_iter == 5 and iterations.are_those_of(5, "same")
    run("fastai", "resume", names)
    assert iterations.seen[-1][1] == 9  # the second fit went on where the first had ended
