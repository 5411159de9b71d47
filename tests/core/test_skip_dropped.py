"""skip_dropped: timm's per-sample stochastic depth, computed for the kept samples only."""

import copy
import pickle

import pytest
import runs
import timm
import torch
from core_helpers import batch, loss_of, same_bits, small_model
from timm.layers import DropPath
from torch import nn

from timm_rdp import ResidualDropPath, skip_dropped

MODELS = ("test_vit", "cait_xxs24_224", "swin_tiny_patch4_window7_224")


def one_step(model: nn.Module, name: str, seed: int, count: int = 6):
    """Loss, gradients and the state of the generator after a forward and backward."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = loss_of(model, *batch(name, count))
    state = torch.get_rng_state()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}, state


def assert_close(skipping, plain) -> None:
    torch.testing.assert_close(skipping[0], plain[0], rtol=1e-5, atol=1e-6)
    for name, gradient in plain[1].items():
        if gradient is None:
            assert skipping[1][name] is None
        else:
            torch.testing.assert_close(skipping[1][name], gradient, rtol=1e-3, atol=1e-5)
    assert torch.equal(skipping[2], plain[2])


@pytest.mark.parametrize("name", MODELS)
def test_outputs_gradients_and_random_numbers_are_timms(name):
    plain, model = small_model(name), small_model(name)
    handle = skip_dropped(model, batch(name)[0])
    assert handle.skipped and not handle.computed
    for seed in range(4):
        assert_close(one_step(model, name, seed), one_step(plain, name, seed))


def test_masks_are_those_that_timm_samples():
    model, plain = small_model("test_vit"), small_model("test_vit")
    skip_dropped(model, batch("test_vit")[0])
    seen = []
    original = torch.Tensor.bernoulli_

    def watched(self, *args):
        seen.append(original(self, *args).flatten() != 0)
        return self

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "bernoulli_", watched)
        torch.manual_seed(3)
        plain(batch("test_vit", 8)[0])
    torch.manual_seed(3)
    model(batch("test_vit", 8)[0])
    masks = [mask for m in model.modules() if isinstance(m, DropPath) for mask in m.masks]
    assert len(masks) == len(seen) and all(map(torch.equal, masks, seen))


def test_only_kept_samples_are_computed():
    model = small_model("test_vit")
    skip_dropped(model, batch("test_vit")[0])
    block = model.blocks[-1]
    handed = []
    block.mlp.register_forward_hook(lambda _, args, __: handed.append(len(args[0])))
    for seed in range(5):
        torch.manual_seed(seed)
        model(batch("test_vit", 16)[0])
        assert handed[-1] == max(1, int(block.drop_path2.masks[0].sum()))
    assert min(handed) < 16


def test_a_path_that_keeps_every_sample_runs_as_in_timm():
    plain, model = small_model("test_vit"), small_model("test_vit")
    skip_dropped(model, batch("test_vit")[0])
    for m in (plain, model):
        for module in m.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 1e-6
    copied = []
    index_select = torch.Tensor.index_select
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "index_select", lambda *a: copied.append(a) or index_select(*a))
        skipping = one_step(model, "test_vit", 0)
    assert not copied and all(m.masks[0].all() for m in model.modules() if hasattr(m, "masks"))
    assert_close(skipping, one_step(plain, "test_vit", 0))


def test_activations_and_their_gradients_keep_timms_layout_in_memory():
    plain, model = small_model("convnext_atto"), small_model("convnext_atto")
    assert skip_dropped(model, batch("convnext_atto")[0]).skipped
    layouts = []
    for m in (plain, model):
        seen = []
        layouts.append(seen)

        def note(_, __, output, seen=seen):
            seen.append(output.stride())
            output.register_hook(lambda gradient: seen.append(gradient.stride()))

        for name, module in m.named_modules():
            if isinstance(module, DropPath) or name.endswith(".conv_dw"):
                module.register_forward_hook(note)
    ours, timms = (one_step(m, "convnext_atto", 1) for m in (model, plain))
    assert_close(ours, timms)
    assert any(0 < len(m.masks[0].nonzero()) < 6 for m in model.modules() if hasattr(m, "masks"))
    last = [tuple(i for i, n in enumerate(s) if n == 1) for s in layouts[0]]
    assert last == [tuple(i for i, n in enumerate(s) if n == 1) for s in layouts[1]]


@pytest.mark.parametrize("drop_prob", [0.999999, 1.0])
def test_a_path_that_keeps_no_sample_gets_gradients_of_zero(drop_prob):
    plain, model = small_model("test_vit"), small_model("test_vit")
    skip_dropped(model, batch("test_vit")[0])
    for m in (plain, model):
        m.blocks[-1].drop_path2.drop_prob = drop_prob
    skipping = one_step(model, "test_vit", 0)
    assert not model.blocks[-1].drop_path2.masks[0].any()
    assert not skipping[1]["blocks.5.mlp.fc1.weight"].any()
    assert_close(skipping, one_step(plain, "test_vit", 0))


def test_a_path_with_batch_statistics_is_left_to_timm_and_said(caplog):
    plain, model = small_model("test_resnet"), small_model("test_resnet")
    handle = skip_dropped(model, batch("test_resnet")[0])
    assert not handle.skipped and all("statistics" in why for why in handle.computed.values())
    assert "computed for the whole batch" in caplog.text
    ours, timms = one_step(model, "test_resnet", 1), one_step(plain, "test_resnet", 1)
    assert same_bits(list(ours), list(timms))
    assert same_bits(model.state_dict(), plain.state_dict())


def test_gradient_checkpointing_gives_the_same_gradients():
    model = small_model("test_vit")
    skip_dropped(model, batch("test_vit")[0])
    without = one_step(model, "test_vit", 2)
    model.set_grad_checkpointing()
    assert_close(one_step(model, "test_vit", 2), without)


def test_a_forward_that_failed_leaves_no_mask_behind():
    plain, model = small_model("test_vit"), small_model("test_vit")
    skip_dropped(model, batch("test_vit")[0])
    failing = model.blocks[3].mlp.fc2.register_forward_pre_hook(_fail)
    with pytest.raises(ZeroDivisionError):
        model(batch("test_vit", 8)[0])
    failing.remove()
    assert_close(one_step(model, "test_vit", 4), one_step(plain, "test_vit", 4))


def _fail(*_):
    raise ZeroDivisionError


def test_inference_copies_and_detach_are_plain_timm():
    plain, model = small_model("test_vit"), small_model("test_vit")
    handle = skip_dropped(model, batch("test_vit")[0])
    images = batch("test_vit")[0]
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert same_bits(model.eval()(images), plain.eval()(images))
    model.train(), plain.train()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(
            list(one_step(copied, "test_vit", 5)), list(one_step(plain, "test_vit", 5))
        )
    assert handle.detach() is model
    assert same_bits(list(one_step(model, "test_vit", 5)), list(one_step(plain, "test_vit", 5)))
    assert all(type(m) is not DropPath or not vars(m).keys() & {"_kept"} for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_what_cannot_be_patched_is_refused():
    with pytest.raises(ValueError, match="no DropPath is called"):
        skip_dropped(timm.create_model("test_vit", img_size=32))
    model = small_model("test_vit")
    rdp = ResidualDropPath(model, example_input=batch("test_vit")[0])
    with pytest.raises(ValueError, match="patched"):
        skip_dropped(model, batch("test_vit")[0])
    rdp.detach()
    handle = skip_dropped(model, batch("test_vit")[0])
    with pytest.raises(ValueError, match="patched"):
        ResidualDropPath(model, example_input=batch("test_vit")[0])
    assert handle.skipped


def test_the_training_script_skips_with_skip_dropped(digits_folder, tmp_path, monkeypatch):
    handed = []
    original = nn.Linear.forward

    def watched(self, x):
        if self.training:
            handed.append(len(x))
        return original(self, x)

    monkeypatch.setattr(nn.Linear, "forward", watched)
    arguments = (*runs.VIT, "--drop-path", "0.5", "--epochs", "1")
    runs.run(digits_folder, tmp_path, *arguments, "--experiment", "plain")
    assert set(handed) == {16}
    handed.clear()
    runs.run(digits_folder, tmp_path, *arguments, "--skip-dropped", "--experiment", "skipping")
    assert min(handed) < 16
    plain, skipping = (runs.rows(tmp_path / name)[0] for name in ("plain", "skipping"))
    assert plain.keys() == skipping.keys()
    assert float(plain["train_loss"]) == pytest.approx(float(skipping["train_loss"]), rel=1e-4)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--skip-dropped", "--rdp", "--drop-path", "0.1"), "cannot be combined with --rdp"),
        (
            ("--skip-dropped", "--drop-path", "0.1", "--torchcompile"),
            "cannot be combined with --torchcompile",
        ),
        (("--skip-dropped",), "no DropPath is called"),
    ],
)
def test_skip_dropped_that_would_do_nothing_is_refused(refused, digits_folder, more, said):
    flags = ("--data-dir", digits_folder, "--num-classes", 10, "-b", 16, "-j", 0)
    assert said in refused(*flags, *runs.VIT, *more)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_a_fixed_number_of_samples_is_kept_and_the_expectation_is_timms(rate, scale_by_keep):
    """Each sample is kept as often as any other, and what is kept makes up for what is not."""
    batch_size, draws = 7, 400
    model = OneBlock(rate, scale_by_keep)
    x = torch.randn(batch_size, 4)
    plain = model.branch(x)
    assert skip_dropped(model, torch.randn(2, 4), samples="fixed").skipped == ("drop_path",)
    often, total = torch.zeros(batch_size), torch.zeros(batch_size, 4)
    for _ in range(draws):
        output = model(x) - x
        (mask,) = model.drop_path.masks
        assert mask.shape == (batch_size,)
        assert mask.sum() == max(1, round(batch_size * (1 - rate)))
        assert not output[~mask].any()
        often += mask
        total += output
    # timm's: rows are zero with this rate, and divided by what is left where it has scale_by_keep.
    expected = plain if scale_by_keep and rate < 1 else plain * (1 - rate)
    kept = mask.sum() / batch_size
    torch.testing.assert_close(often / draws, kept.expand(batch_size), rtol=0, atol=0.12)
    torch.testing.assert_close(
        total * (kept * draws / often).unsqueeze(1) / draws, expected, rtol=1e-4, atol=1e-5
    )


class OneBlock(nn.Module):
    def __init__(self, rate, scale_by_keep):
        super().__init__()
        self.branch = nn.Linear(4, 4)
        self.drop_path = DropPath(rate, scale_by_keep)

    def forward(self, x):
        return x + self.drop_path(self.branch(x))


@pytest.mark.parametrize(
    "name", ["test_vit", *(pytest.param(n, marks=pytest.mark.slow) for n in MODELS[1:])]
)
def test_a_fixed_number_of_samples_compiles_to_one_graph_that_skips(name, fresh_compiler):
    eager, model = small_model(name), small_model(name)
    for each in (eager, model):
        assert skip_dropped(each, batch(name)[0], samples="fixed").skipped
    sizes = []

    def watched(graph, inputs):
        sizes.extend(n for n in graph.graph.nodes if "randperm" in str(n.target))
        return graph.forward

    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model, backend=watched)
        for seed in range(3):
            assert_close(one_step(compiled, name, seed), one_step_as(compiled, eager, name, seed))
    assert len(sizes) == len(skipped_of(model))


def one_step_as(compiled, eager, name, seed):
    loss, gradients, state = one_step(eager, name, seed)
    return loss, {f"_orig_mod.{n}": g for n, g in gradients.items()}, state


def skipped_of(model):
    return [m for m in model.modules() if isinstance(m, DropPath) for _ in m.masks]


def test_other_samples_than_drawn_or_fixed_are_refused():
    with pytest.raises(ValueError, match="samples='all': must be one of drawn, fixed"):
        skip_dropped(small_model("test_vit"), samples="all")


@pytest.mark.slow
def test_the_training_script_takes_a_fixed_number_compiled_too(digits_folder, tmp_path):
    config = tmp_path / "old.yaml"
    config.write_text("skip_dropped: true\n")
    flags = ("--drop-path", 0.5, "--skip-dropped", "fixed", "--torchcompile", "aot_eager")
    runs.run(digits_folder, tmp_path, *runs.VIT, *flags, "-c", config, "--experiment", "fixed")
    assert float(runs.rows(tmp_path / "fixed")[0]["train_loss"]) > 0
