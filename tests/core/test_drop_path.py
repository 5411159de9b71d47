"""The patched DropPath: outside iterations it is timm's, within them it obeys; its masks show."""

import copy
import io
import pickle

import pytest
import torch
from core_helpers import SMALL, batch, buffers_of, loss_of, same_bits, small_model
from digits import digit_images
from test_families import FAMILIES, create, first_tensor
from timm.layers import DropPath
from torch import nn

from timm_rdp import ResidualDropPath

MODELS = sorted(SMALL)


def run(model, name, train=True):
    """Everything that a forward and backward from the same random state leave behind."""
    images, labels = batch(name)
    model.train(train)
    model.zero_grad()
    torch.manual_seed(11)
    output = model(images)
    torch.nn.functional.cross_entropy(output, labels).backward()
    return {
        "output": output.detach(),
        "gradients": [p.grad for p in model.parameters()],
        "buffers": buffers_of(model),
        "random state": torch.get_rng_state(),
    }


def step_through(rdp, name, cycles=1):
    for _ in range(cycles):
        for it in rdp.cycle():
            with it:
                loss_of(rdp.model, *batch(name)).backward()


def drop_paths(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, DropPath)}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_outside_iterations_the_patched_model_is_the_unpatched_one(name, train):
    plain, patched = small_model(name), small_model(name)
    ResidualDropPath(patched)
    assert same_bits(run(plain, name, train), run(patched, name, train))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "cait_xxs24_224"])
def test_between_iterations_and_after_an_exception_the_model_is_the_unpatched_one(name):
    patched = small_model(name)
    rdp = ResidualDropPath(patched)
    step_through(rdp, name, cycles=2)
    plain = small_model(name)
    plain.load_state_dict(patched.state_dict())
    expected = run(plain, name)
    assert same_bits(run(patched, name), expected)

    with pytest.raises(KeyboardInterrupt), rdp.iteration():
        raise KeyboardInterrupt
    patched.load_state_dict(plain.state_dict())  # the run above moved BatchNorm statistics
    expected = run(plain, name)
    assert same_bits(run(patched, name), expected)


def test_without_scale_by_keep_the_patched_model_is_the_unpatched_one():
    plain, patched = small_model("test_vit"), small_model("test_vit")
    for module in [*drop_paths(plain).values(), *drop_paths(patched).values()]:
        module.scale_by_keep = False
    ResidualDropPath(patched)
    assert same_bits(run(plain, "test_vit"), run(patched, "test_vit"))


@pytest.mark.parametrize("name", MODELS)
def test_detach_gives_back_the_unpatched_model_and_leaves_nothing_behind(name):
    plain, patched = small_model(name), small_model(name)
    rdp = ResidualDropPath(patched)
    assert {type(m) for m in drop_paths(patched).values()} != {DropPath}
    optimizer = torch.optim.SGD(patched.parameters(), lr=0.0)
    rdp.attach(optimizer)
    loss_of(patched, *batch(name)).backward()
    optimizer.step()
    patched.load_state_dict(plain.state_dict())

    assert rdp.detach() is patched
    for ours, timms in zip(patched.modules(), plain.modules(), strict=True):
        assert type(ours) is type(timms)
        assert ours.__dict__.keys() == timms.__dict__.keys()
        hooks = [key for key in vars(ours) if "hooks" in key]
        assert hooks
        assert not any(getattr(ours, key) for key in hooks if isinstance(vars(ours)[key], dict))
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert same_bits(run(plain, name), run(patched, name))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_detach_within_an_attached_iteration_restores_the_model(name):
    plain, patched = small_model(name), small_model(name)
    rdp = ResidualDropPath(patched).attach(torch.optim.SGD(patched.parameters(), lr=0.0))
    loss_of(patched, *batch(name))  # an iteration that no optimizer step has ended
    rdp.detach()
    assert all(p.requires_grad for p in patched.parameters())
    assert all(m.training for m in patched.modules())
    patched.load_state_dict(plain.state_dict())
    assert same_bits(run(plain, name), run(patched, name))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "cait_xxs24_224"])
def test_checkpoints_load_strictly_into_plain_timm_and_back(name):
    plain, patched = small_model(name), small_model(name)
    keys = list(patched.state_dict())
    rdp = ResidualDropPath(patched)
    step_through(rdp, name)
    with rdp.iteration():
        assert list(patched.state_dict()) == keys
    assert list(patched.state_dict()) == keys
    file = io.BytesIO()
    torch.save(patched.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert same_bits(dict(plain.state_dict()), dict(patched.state_dict()))

    for parameter in plain.parameters():
        parameter.data.add_(1.0)
    patched.load_state_dict(plain.state_dict(), strict=True)
    assert same_bits(dict(plain.state_dict()), dict(patched.state_dict()))


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "cait_xxs24_224"])
def test_a_copy_of_a_patched_model_stands_on_its_own(name, copied):
    plain, model = small_model(name), small_model(name)
    rdp = ResidualDropPath(model)
    before = copied(model)
    with rdp.iteration() as it:
        assert it.dropped
        within = copied(model)
        # The decisions of this iteration are the original's alone.
        for clone in (before, within):
            clone.requires_grad_(True)  # as the copy took it over, see rule 4
            assert same_bits(run(clone, name)["output"], run(copy.deepcopy(plain), name)["output"])
            assert all(m.masks[0].shape == (4,) for m in drop_paths(clone).values())
    rdp.detach()

    # A copy can be trained with a controller of its own.
    other = ResidualDropPath(before)
    step_through(other, name)
    assert other.masks
    other.detach()
    assert {type(m) for m in drop_paths(before).values()} == {DropPath}


class HoldsItsController(nn.Module):
    def __init__(self, of_all):
        super().__init__()
        self.net = small_model("test_resnet")
        self.rdp = ResidualDropPath(self if of_all else self.net, example_input=EXAMPLE)

    def forward(self, x):
        return self.net(x)


EXAMPLE = torch.zeros(2, 3, 64, 64)


def train_attached(model, rdp, updates):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.1)
    rdp.attach(optimizer)
    for i in range(updates):
        loss_of(model, *batch("test_resnet", start=4 * i)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("of_all", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("within", [False, True])
def test_a_module_that_holds_its_controller_is_copied_together_with_it(copied, within, of_all):
    model = HoldsItsController(of_all)
    train_attached(model, model.rdp, 3)
    if within:
        model(batch("test_resnet")[0])  # an iteration that no optimizer step has ended
    clone = copied(model)
    assert clone.rdp.model is (clone if of_all else clone.net)
    assert all(p.requires_grad for p in clone.parameters())
    assert all(m.training for m in clone.modules())
    with pytest.raises(ValueError, match="patched by another"):
        ResidualDropPath(clone.net)

    other = ResidualDropPath(model.rdp.detach(), example_input=EXAMPLE)
    other.load_state_dict(clone.rdp.state_dict())
    model.zero_grad(), clone.zero_grad()
    train_attached(model, other, 4)
    train_attached(clone, clone.rdp, 4)
    assert same_bits(dict(model.state_dict()), dict(clone.state_dict()))
    assert other.state_dict() == clone.rdp.state_dict()


def test_a_copy_of_an_attached_model_does_not_drive_the_original():
    model = small_model("test_vit")
    rdp = ResidualDropPath(model).attach(torch.optim.SGD(model.parameters(), lr=0.0))
    for clone in (copy.deepcopy(model), pickled(model)):
        loss_of(clone, *batch("test_vit")).backward()
        assert rdp.masks == {}
        assert all(p.grad is not None for p in clone.parameters())


def test_a_patched_module_is_still_a_drop_path_with_its_settings():
    model = small_model("test_vit")
    before = {
        n: (m.drop_prob, m.scale_by_keep, m.extra_repr()) for n, m in drop_paths(model).items()
    }
    ResidualDropPath(model)
    after = {
        n: (m.drop_prob, m.scale_by_keep, m.extra_repr()) for n, m in drop_paths(model).items()
    }
    assert before == after


# The masks.


def record_calls(model):
    """Input and output of every DropPath call of the forwards to come, by module name."""
    calls = {name: [] for name in drop_paths(model)}
    for name, module in drop_paths(model).items():
        # Cloned, because some blocks add the shortcut to the output in place.
        module.register_forward_hook(
            lambda _, inputs, output, name=name: calls[name].append(
                (inputs[0].clone(), output.clone())
            )
        )
    return calls


def scaled(module, x):
    return x / (1 - module.drop_prob) if module.scale_by_keep else x


def with_scale_by_keep(model, scale_by_keep):
    for module in drop_paths(model).values():
        module.scale_by_keep = scale_by_keep
    return model


@pytest.mark.parametrize("scale_by_keep", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_masks_show_what_was_sampled_per_sample_outside_iterations(name, scale_by_keep):
    model = with_scale_by_keep(small_model(name), scale_by_keep)
    ResidualDropPath(model)
    calls = record_calls(model)
    kinds = set()
    for _ in range(2):
        for seen in calls.values():
            seen.clear()
        model(batch(name)[0])
        for key, module in drop_paths(model).items():
            assert len(module.masks) == len(calls[key])
            for mask, (x, y) in zip(module.masks, calls[key], strict=True):
                assert mask.dtype == torch.bool
                assert mask.shape == x.shape[:1]
                assert not y[~mask].any()
                assert torch.allclose(y[mask], scaled(module, x[mask]), rtol=1e-6, atol=0)
                kinds.update(mask.tolist())
    assert kinds == {True, False}


@pytest.mark.parametrize("scale_by_keep", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_dropped_is_exactly_zero_and_kept_is_scaled_only_with_scale_by_keep(name, scale_by_keep):
    plain = small_model(name)
    full_size = record_calls(plain)
    plain(batch(name)[0])
    model = with_scale_by_keep(small_model(name), scale_by_keep)
    rdp = ResidualDropPath(model)
    path_of = {(p.module, p.call): p.name for p in rdp.paths}
    calls = record_calls(model)
    kinds = set()
    for _ in range(2):
        for it in rdp.cycle():
            with it:
                for seen in calls.values():
                    seen.clear()
                loss_of(model, *batch(name)).backward()
            for key, module in drop_paths(model).items():
                for call, (x, y) in enumerate(calls[key]):
                    assert y.shape == full_size[key][call][1].shape
                    assert y.dtype == torch.float32
                    path = path_of.get((module, call))
                    if path is None:  # not around a residual: timm's own behaviour
                        kept = module.masks[call]
                        assert not y[~kept].any()
                        assert torch.allclose(y[kept], scaled(module, x[kept]), rtol=1e-6, atol=0)
                        continue
                    dropped = it.phase == "droppath" and path in it.dropped
                    if dropped:
                        assert not y.any()
                    elif it.phase == "droppath":
                        assert torch.allclose(y, scaled(module, x), rtol=1e-6, atol=0)
                    else:
                        assert torch.equal(y, x)
                    kinds.add((it.phase, dropped))
    assert kinds == {("droppath", True), ("droppath", False), ("complement", False)}


@pytest.mark.parametrize("name", MODELS)
def test_masks_show_the_decision_for_the_whole_batch_within_iterations(name):
    model = small_model(name)
    rdp = ResidualDropPath(model)
    left_to_timm = {p.module for p in rdp.non_residual}
    called = {(p.module, p.call) for p in rdp.paths}
    for _ in range(2):
        for it in rdp.cycle():
            with it:
                loss_of(model, *batch(name)).backward()
            assert rdp.masks == {p.name: p.name not in it.dropped for p in rdp.paths}
            for path in rdp.paths:
                mask = path.module.masks[path.call]
                assert mask.shape == ()
                assert mask.dtype == torch.bool
                assert bool(mask) is (it.phase == "complement" or rdp.masks[path.name])
            for module in drop_paths(model).values():
                if module in left_to_timm:
                    assert [mask.ndim for mask in module.masks] == [1]
                else:
                    assert len(module.masks) == sum(m is module for m, _ in called)


def test_masks_of_every_mode_are_those_of_the_last_training_forward():
    model = small_model("cait_xxs24_224")
    rdp = ResidualDropPath(model)
    modules = list(drop_paths(model).values())
    images, _ = batch("cait_xxs24_224")
    assert [m.masks for m in modules] == [()] * len(modules)

    model.eval()(images)  # no training forward
    assert [m.masks for m in modules] == [()] * len(modules)

    with torch.no_grad():
        model.train()(images)
    assert all([mask.shape for mask in m.masks] == [(4,), (4,)] for m in modules)

    with rdp.iteration():
        model(images[:3])
        model(images[:2])  # the second micro-batch of an accumulation
    assert all([mask.shape for mask in m.masks] == [(), ()] for m in modules)
    seen = [m.masks for m in modules]

    model.eval()(images)
    assert same_bits(seen, [m.masks for m in modules])

    model.train()(images[:2])
    assert all([mask.shape for mask in m.masks] == [(2,), (2,)] for m in modules)


def test_a_drop_path_of_rate_zero_keeps_every_sample():
    model = small_model("test_vit")
    ResidualDropPath(model)
    module = model.blocks[3].drop_path1
    module.drop_prob = 0.0
    model(batch("test_vit")[0])
    assert module.masks[0].tolist() == [True] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_decision_keeps_the_dtype_and_the_memory_format(dtype):
    model = small_model("test_resnet")
    rdp = ResidualDropPath(model)
    path = rdp.paths[0]
    x = torch.randn(2, 3, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)
    seen = set()
    for _ in range(20):
        for it in rdp.cycle():
            with it:
                y = path.module(x)
            assert y.dtype == dtype
            assert y.is_contiguous(memory_format=torch.channels_last)
            seen.add((it.phase, path.name in it.dropped))
    assert {("droppath", True), ("droppath", False)} < seen


# Gradient checkpointing computes forwards again, and these must see the masks of the first.

# Besides one model of each common kind, all in which a DropPath is called more than once and that
# support gradient checkpointing.
MULTIPLE_CALLS = [
    "cait",
    "edgenext",
    "efficientvim",
    "gemma4_vit",
    "mlp_mixer",
    "swiftformer",
    "tnt",
    "visformer",
]
SINGLE_CALLS = ["convnext", "resnet", "swin_transformer", "vision_transformer"]


def traces_of(rdp, images, iteration=None):
    """Loss, gradients and masks of a forward and backward, within an iteration if one is given."""
    model = rdp.model
    model.zero_grad()
    torch.manual_seed(3)
    if iteration is None:
        loss, masks = forward_and_backward(model, images)
    else:
        with iteration:
            loss, masks = forward_and_backward(model, images)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients
    after_backward = all_masks(model)
    assert same_bits(masks, after_backward)  # a recomputation leaves no trace
    return {"loss": loss, "gradients": gradients, "masks": masks}


def all_masks(model):
    return [m.masks for m in model.modules() if isinstance(m, DropPath)]


def forward_and_backward(model, images):
    loss = first_tensor(model(images)).square().mean()
    masks = all_masks(model)
    loss.backward()
    return loss.detach(), masks


@pytest.mark.parametrize(
    "family",
    [
        *(SINGLE_CALLS[:1] + MULTIPLE_CALLS[:1]),
        *(
            pytest.param(family, marks=pytest.mark.slow)
            for family in SINGLE_CALLS[1:] + MULTIPLE_CALLS[1:]
        ),
    ],
)
def test_gradient_checkpointing_gives_the_same_gradients_as_without(family):
    name, size, options = FAMILIES[family]
    images = digit_images(3, size)[0].double()
    plain, checkpointed = (
        ResidualDropPath(create(name, {**options, "drop_path_rate": 0.5}), 2, 1, images)
        for _ in range(2)
    )
    more_than_one = {p.name for p in plain.paths if "#" in p.name}
    assert bool(more_than_one) is (family in MULTIPLE_CALLS)
    recomputed = count_recomputations(checkpointed.model)
    checkpointed.model.set_grad_checkpointing(True)

    phases = []
    assert same_bits(traces_of(plain, images), traces_of(checkpointed, images))
    for _ in range(2):
        for it, same_it in zip(plain.cycle(), checkpointed.cycle(), strict=True):
            assert it.dropped == same_it.dropped
            expected = traces_of(plain, images, it)
            assert same_bits(expected, traces_of(checkpointed, images, same_it))
            assert expected["gradients"].keys() <= it.trainable
            phases.append(it.phase)
    assert same_bits(traces_of(plain, images), traces_of(checkpointed, images))
    assert {"droppath", "complement"} == set(phases)
    assert recomputed()


def count_recomputations(model):
    in_backward = []
    for module in model.modules():
        module.register_forward_pre_hook(
            lambda *_: in_backward.append(torch._C._current_graph_task_id() != -1)
        )
    return lambda: any(in_backward)


@pytest.mark.parametrize("family", ["coat", "convit", "sequencer"])
def test_models_left_out_cannot_checkpoint(family):
    name, _, options = FAMILIES[family]
    with pytest.raises(AssertionError, match="gradient checkpointing not supported"):
        create(name, options).set_grad_checkpointing(True)
