"""DropPaths of torchvision, Hugging Face and other repositories: found, and trained like timm's."""

import copy
import functools
import pickle
import random

import numpy as np
import pytest
import torch
import torchvision
import transformers
from core_helpers import batch, buffers_of, changed, parameters_of, same_bits, small_model
from digits import digit_images
from timm.layers import DropPath
from torch import nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.ops import StochasticDepth
from transformers.models.beit.modeling_beit import BeitDropPath

from timm_rdp import ResidualDropPath, skip_dropped

RATE = 0.5


def hugging_face(name, **config):
    """A small Hugging Face model with random weights."""
    config = getattr(transformers, f"{name}Config")(
        image_size=32, num_labels=10, drop_path_rate=RATE, **config
    )
    return getattr(transformers, f"{name}ForImageClassification")(config)


MODELS = {
    # the model, its class of DropPaths, the size of its images
    "torchvision Swin": (
        lambda: torchvision.models.SwinTransformer(
            patch_size=[4, 4],
            embed_dim=24,
            depths=[2, 2],
            num_heads=[1, 2],
            window_size=[4, 4],
            stochastic_depth_prob=RATE,
            num_classes=10,
        ),
        "StochasticDepth",
        32,
    ),
    "torchvision ConvNeXt": (
        lambda: torchvision.models.ConvNeXt(
            [CNBlockConfig(8, 16, 1), CNBlockConfig(16, 24, 3), CNBlockConfig(24, None, 2)],
            stochastic_depth_prob=RATE,
            num_classes=10,
        ),
        "StochasticDepth",
        32,
    ),
    "torchvision efficientnet_b0": (
        lambda: torchvision.models.efficientnet_b0(num_classes=10, stochastic_depth_prob=RATE),
        "StochasticDepth",
        32,
    ),
    "transformers Swin": (
        lambda: hugging_face(
            "Swin", patch_size=4, embed_dim=24, depths=[2, 2], num_heads=[1, 2], window_size=4
        ),
        "SwinDropPath",
        32,
    ),
    "transformers ConvNext": (
        lambda: hugging_face("ConvNext", hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 2, 2]),
        "ConvNextDropPath",
        32,
    ),
    "transformers Beit": (
        lambda: hugging_face(
            "Beit",
            patch_size=8,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=64,
        ),
        "BeitDropPath",
        32,
    ),
}


def foreign_model(name):
    torch.manual_seed(0)
    model = MODELS[name][0]()
    for parameter in model.parameters():  # some start at zero, which hides what they do
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # EfficientNet's head; it would draw differently by hand
            module.p = 0.0
    return model.train()


def images_for(name):
    return digit_images(4, MODELS[name][2])


def logits_of(output):
    return getattr(output, "logits", output)


def loss_of(model, images, labels):
    return nn.functional.cross_entropy(logits_of(model(images)), labels)


def droppers_of(model):
    """The model's DropPaths by name, by the names of their classes."""
    kinds = {kind for _, kind, _ in MODELS.values()}
    return {n: m for n, m in model.named_modules() if type(m).__name__ in kinds}


class ByHand:
    """What each call of a model's DropPaths returns, set by hooks, without the package.

    Args:
        factor: takes a call's name, returns what its input is divided by; 0 for zeros.
    """

    def __init__(self, model, factor):
        self.model, self.factor, self.called = model, factor, []
        self.droppers = droppers_of(model)
        for module in self.droppers.values():
            module.eval()  # it hands on what it gets
        self.hooks = [
            module.register_forward_hook(functools.partial(self.divide, name))
            for name, module in self.droppers.items()
        ]

    def divide(self, name, module, args, output):
        self.called.append(name)
        if several_calls(self.model):
            name = f"{name}#{(self.called.count(name) - 1) % 2}"
        factor = self.factor(name)
        return torch.zeros_like(output) if factor == 0 else output / factor

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()
        for module in self.droppers.values():
            module.train()


def several_calls(model):
    return "SwinTransformer" in type(model).__name__ or "Beit" in type(model).__name__


def live_parameters(model, name, dropped):
    """Names of the parameters with a gradient that is not 0, where these paths return zeros."""
    with ByHand(model, lambda path: 0 if path in dropped else 1):
        loss_of(model, *images_for(name)).backward()
    live = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad()
    return live


def called_droppers(model, name):
    """Names of its DropPaths in call order; blocks without a shortcut call none."""
    model = copy.deepcopy(model)  # BatchNorms keep statistics
    with ByHand(model, lambda path: 1) as by_hand, torch.no_grad():
        model(images_for(name)[0])
    return by_hand.called


def rate_of(module):
    return module.p if isinstance(module, StochasticDepth) else module.drop_prob


@pytest.mark.parametrize("name", MODELS)
def test_the_dropped_part_is_what_gets_no_gradient_where_the_paths_are_cut(name):
    model = foreign_model(name)
    live = live_parameters(model, name, ())
    plain = copy.deepcopy(model)
    rdp = ResidualDropPath(model, example_input=images_for(name)[0])
    names = [p.name for p in rdp.paths]
    called = called_droppers(plain, name)
    assert [n.partition("#")[0] for n in names] == called
    assert [p.drop_prob for p in rdp.paths] == [rate_of(plain.get_submodule(n)) for n in called]
    assert not rdp.non_residual
    choose = random.Random(0)
    for dropped in (names[:1], names, choose.sample(names, 2), choose.sample(names, 3)):
        assert rdp.dropped_part(dropped) == live - live_parameters(plain, name, dropped)


def cycles_by_hand(name, masks):
    """Parameters and buffers after cycles with these masks, and what trained, by iteration."""
    model = foreign_model(name)
    images, labels = images_for(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05)
    rates = {n: rate_of(m) for n, m in droppers_of(model).items()}
    live = live_parameters(copy.deepcopy(model), name, ())

    def update(factor, trained, resting=()):
        before = buffers_of(model)
        for n, p in model.named_parameters():
            p.requires_grad_(n in trained)
        with ByHand(model, factor):
            loss_of(model, images, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        for n, buffer in model.named_buffers():
            if n.rpartition(".")[0] in resting:
                buffer.copy_(before[n])
        for p in model.parameters():
            p.requires_grad_(True)

    for kept in masks:
        dropped = {path for path, k in kept.items() if not k}
        part = live - live_parameters(copy.deepcopy(model), name, dropped)
        everything = {n for n, _ in model.named_parameters()}
        update(
            lambda path, kept=kept: kept[path] and 1 - rates[path.partition("#")[0]],
            everything - part,
            resting={n.rpartition(".")[0] for n in part},
        )
        if part:
            update(lambda path: 1, part)
    return parameters_of(model), buffers_of(model)


@pytest.mark.parametrize("name", MODELS)
def test_cycles_equal_the_same_cycles_by_hand_and_leave_all_else_alone(name):
    model = foreign_model(name)
    images, labels = images_for(name)
    rdp = ResidualDropPath(model, seed=4, example_input={first_argument(model): images})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05)
    masks = []
    for _ in range(2):
        for it in rdp.cycle():
            before, statistics = parameters_of(model), buffers_of(model)
            with it:
                loss_of(model, images, labels).backward()
                optimizer.step()
                optimizer.zero_grad()
            assert changed(before, parameters_of(model)) == it.trainable
            if it.phase == "droppath":
                owners = {n.rpartition(".")[0] for n in rdp.dropped_part(it.dropped)}
                moved = changed(statistics, buffers_of(model))
                assert not owners & {n.rpartition(".")[0] for n in moved}
                for module_masks in (p.module.masks for p in rdp.paths):
                    assert all(mask.shape == () for mask in module_masks)
        masks.append(rdp.masks)
    assert not all(all(kept.values()) for kept in masks)
    parameters, buffers = cycles_by_hand(name, masks)
    assert changed(parameters, parameters_of(model)) == set()
    assert changed(buffers, buffers_of(model)) == set()


def first_argument(model):
    return "pixel_values" if isinstance(model, transformers.PreTrainedModel) else "x"


@pytest.mark.parametrize("name, count", [("swin_t", 24), ("convnext_tiny", 18)])
def test_torchvisions_models_are_traced_with_an_image_of_224_pixels(name, count):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    rdp = ResidualDropPath(model)
    assert len(rdp.paths) == count
    assert all(path.entrances for path in rdp.paths)  # none is run where it is dropped


@pytest.mark.parametrize("name", MODELS)
def test_outside_iterations_the_model_is_the_unpatched_one(name):
    model = foreign_model(name)
    plain = copy.deepcopy(model)
    images, labels = images_for(name)
    attributes = {n: dict(vars(m)) for n, m in droppers_of(model).items()}
    rdp = ResidualDropPath(model, example_input=images)
    own = {n: type(m) for n, m in droppers_of(plain).items()}
    called = called_droppers(plain, name)
    for n, kind in own.items():
        patched = model.get_submodule(n)
        assert isinstance(patched, kind)
        assert repr(patched) == f"Masked{plain.get_submodule(n)!r}"
    assert model.state_dict().keys() == plain.state_dict().keys()
    rows = []
    for module in droppers_of(plain).values():
        module.register_forward_hook(lambda m, args, y: rows.append(y.flatten(1).any(1)))

    def results(model, training):
        model.train(training)
        torch.manual_seed(1)
        loss = loss_of(model, images, labels)
        model.zero_grad()
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss, "state": torch.get_rng_state(), **gradients, **buffers_of(model)}

    patched = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for training in (True, False):
        rows.clear()
        expected = results(plain, training)
        for other in (model, *patched):
            assert changed(expected, results(other, training)) == set()
            if training:
                masks = [other.get_submodule(n).masks for n in own]
                by_name = [rows[i] for n in own for i, c in enumerate(called) if c == n]
                assert same_bits([m for calls in masks for m in calls], by_name)
    with rdp.iteration(), rdp.pause():
        assert changed(results(plain, True), results(model, True)) == set()
    assert rdp.detach() is model
    assert {n: type(model.get_submodule(n)) for n in own} == own
    assert {n: {**vars(model.get_submodule(n)), "training": True} for n in own} == attributes


# Copies of a DropPath, as they stand in repositories.


class OldDropPath(nn.Module):
    def __init__(self, drop_prob=None):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        noise = keep_prob + torch.rand(shape, dtype=x.dtype, device=x.device)
        return x.div(keep_prob) * noise.floor_()


class Survival(nn.Module):
    """Of sequences (B, N, C) alone; its rate is a tensor behind a property."""

    def __init__(self, rate):
        super().__init__()
        self._rate, self.eps = torch.tensor(rate), 1e-6

    @property
    def drop_prob(self):
        return self._rate

    def forward(self, tokens):
        if not self.training:
            return tokens
        keep = torch.rand(len(tokens), 1, 1) >= self._rate
        return tokens * keep / (1 - self._rate)


class Coin(nn.Module):
    """Drops the whole batch, by Python's random state."""

    def __init__(self, probability):
        super().__init__()
        self.probability = probability

    def forward(self, x):
        if self.training and random.random() < self.probability:
            return torch.zeros_like(x)
        return x / (1 - self.probability) if self.training else x


class Inherited(DropPath):
    def forward(self, x):
        return super().forward(x)


class Unscaled(DropPath):
    """timm's, kept samples not divided."""

    def __init__(self, drop_prob):
        super().__init__(drop_prob, scale_by_keep=False)


def torchvisions_by_row(p):
    return StochasticDepth(p, "row")


HOME_MADE = {
    "timm's old one": OldDropPath,
    "one of sequences": Survival,
    "one of whole batches": Coin,
    "a subclass of timm's": Inherited,
    "torchvision's by row": torchvisions_by_row,
    "torchvision's by batch": lambda p: StochasticDepth(p, "batch"),
    "Hugging Face's": BeitDropPath,
}


def vit_with(make, some=lambda i: True):
    """timm's test_vit, in which some DropPaths are others of the same rate."""
    model = small_model("test_vit")
    names = [n for n, m in model.named_modules() if isinstance(m, DropPath)]
    for i, name in enumerate(names):
        if some(i):
            model.set_submodule(name, make(model.get_submodule(name).drop_prob))
    return model.train()


def trained(model, cycles=3, compiled=False):
    rdp = ResidualDropPath(model, seed=4)
    if compiled:
        torch.compiler.reset()
        rdp.compile(backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05)
    for _ in range(cycles):
        for it in rdp.cycle():
            with it:
                loss_of(model, *batch("test_vit")).backward()
                optimizer.step()
                optimizer.zero_grad()
    return rdp, parameters_of(model)


@pytest.mark.parametrize(
    "some", [lambda i: True, lambda i: i % 2], ids=["all", "mixed with timm's"]
)
@pytest.mark.parametrize("make", HOME_MADE.values(), ids=HOME_MADE)
def test_a_copy_of_timms_is_taken_and_trains_like_timms_own(make, some):
    timms, expected = trained(small_model("test_vit"))
    rdp, parameters = trained(vit_with(make, some))
    assert [p.name for p in rdp.paths] == [p.name for p in timms.paths]
    assert [p.entrances for p in rdp.paths] == [p.entrances for p in timms.paths]
    assert changed(expected, parameters) == set()


def test_kept_samples_are_divided_where_the_module_does_it():
    class Bare(OldDropPath):
        def forward(self, x):
            return super().forward(x) * (1 - self.drop_prob) if self.training else x

    _, expected = trained(vit_with(lambda p: DropPath(p, scale_by_keep=False)))
    for make in (Bare, Unscaled):
        assert changed(expected, trained(vit_with(make))[1]) == set()


def test_the_drop_probability_is_read_and_set_as_the_module_has_it_now():
    model = vit_with(torchvisions_by_row)
    rdp = ResidualDropPath(model)
    path = rdp.paths[0]
    assert path.drop_prob == path.module.p == path.module.drop_prob == pytest.approx(0.1)
    path.module.p = 0.75
    assert path.drop_prob == path.module.drop_prob == 0.75
    path.module.drop_prob = 0.25
    assert path.drop_prob == path.module.p == 0.25
    rdp.detach()
    assert path.drop_prob == 0.25


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_by_regions_it_trains_as_in_eager_mode():
    expected = trained(vit_with(OldDropPath))[1]
    rdp, parameters = trained(vit_with(OldDropPath), compiled=True)
    for name, value in parameters.items():
        torch.testing.assert_close(value, expected[name])
    torch.compiler.reset()
    assert rdp.detach()


def test_compiled_as_a_whole_it_is_one_graph_and_outside_iterations_the_unpatched_model():
    images, _ = batch("test_vit")
    model = vit_with(torchvisions_by_row)
    plain = copy.deepcopy(model)
    rdp = ResidualDropPath(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    rdp.follow(compiled)
    results = []
    for forward in (plain, compiled):
        torch.manual_seed(5)
        results.append(forward(images))
    torch.testing.assert_close(*results)
    with rdp.iteration() as it:
        compiled(images)
    assert it.dropped == {p.name for p in rdp.paths if not p.module.masks[0].all()}
    torch.compiler.reset()


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_masks_say_per_sample_or_whole_batch_as_the_module_drops(mode):
    model = vit_with(lambda p: StochasticDepth(p, mode))
    rdp = ResidualDropPath(model)
    module = rdp.paths[-1].module
    drawn = []
    module.register_forward_hook(lambda m, args, y: drawn.append(y.flatten(1).any(1)))
    for _ in range(8):
        model(batch("test_vit")[0])
        (mask,) = module.masks
        assert mask.dtype == torch.bool
        assert mask.shape == ((4,) if mode == "row" else ())
        assert torch.equal(mask.expand(4), drawn[-1])
    assert len({tuple(d.tolist()) for d in drawn}) > 1


def test_finding_it_moves_no_random_state_and_no_attribute():
    model = vit_with(Coin, lambda i: i % 2)
    model.blocks[1].drop_path1 = StochasticDepth(0.1, "row")
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    attributes = {n: dict(vars(m)) for n, m in model.named_modules() if not [*m.children()]}
    ResidualDropPath(model).detach()
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert attributes == {n: dict(vars(m)) for n, m in model.named_modules() if n in attributes}


@pytest.mark.filterwarnings("ignore:dropout[23]d")  # of sequences
@pytest.mark.parametrize(
    "make", [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity]
)
def test_dropout_is_no_drop_path(make):
    model = small_model("test_vit")
    expected = [p.name for p in ResidualDropPath(model).paths]
    model = vit_with(make, lambda i: i == 0)
    rdp = ResidualDropPath(model)
    assert [p.name for p in rdp.paths] == expected[1:]
    assert type(model.get_submodule(expected[0])) is make


def test_what_is_named_as_one_and_does_something_else_is_refused_in_one_line():
    class TokenDropPath(OldDropPath):
        def forward(self, x):
            return nn.functional.dropout1d(x, self.drop_prob, self.training)

    model = vit_with(TokenDropPath, lambda i: i == 3)
    with pytest.raises(ValueError) as error:
        ResidualDropPath(model)
    assert str(error.value) == (
        "blocks.2.drop_path2 is a TokenDropPath that does something else than timm's DropPath: use "
        "timm.layers.DropPath there"
    )


@pytest.mark.parametrize("samples", ["drawn", "fixed"])
@pytest.mark.parametrize("make", [torchvisions_by_row, OldDropPath, Survival])
def test_skip_dropped_computes_the_kept_samples_of_per_sample_ones(make, samples):
    model, full = vit_with(make), vit_with(DropPath)
    images, _ = batch("test_vit")
    skip = skip_dropped(model, samples=samples)
    assert not skip.computed
    torch.manual_seed(3)
    output = model(images)
    masks = {n: m.masks[0] for n, m in skip._drop_paths.items()}
    assert not all(mask.all() for mask in masks.values())
    for name, mask in masks.items():  # the same samples, dropped from the full computation
        module = full.get_submodule(name)
        kept = mask.float().mean() if samples == "fixed" else 1 - module.drop_prob
        keep = mask.float().view(-1, 1, 1) / kept
        module.eval().register_forward_hook(lambda m, args, y, keep=keep: y * keep)
    torch.testing.assert_close(output, full(images))
    skip.detach()


def test_skip_dropped_leaves_out_one_that_drops_whole_batches_and_says_why(caplog):
    model = vit_with(lambda p: StochasticDepth(p, "batch"), lambda i: i == 0)
    skip = skip_dropped(model)
    assert list(skip.computed) == ["blocks.1.drop_path1"]
    assert "StochasticDepth keeps or drops the batch as a whole" in caplog.text
    skip.detach()


def test_a_hugging_face_model_is_traced_with_an_image_of_its_configs_size():
    model = foreign_model("transformers Beit")
    shapes = []
    model.register_forward_pre_hook(lambda m, args: shapes.append(args[0].shape))
    assert len(ResidualDropPath(model).paths) == 6
    assert {*shapes} == {(2, 3, 32, 32)}


def test_a_model_that_takes_no_image_is_refused_with_what_to_pass():
    with pytest.raises(ValueError, match=r"cannot be traced .*pass example_input"):
        skip_dropped(
            transformers.BertModel(
                transformers.BertConfig(
                    hidden_size=8,
                    num_hidden_layers=1,
                    num_attention_heads=1,
                    intermediate_size=8,
                )
            )
        )
