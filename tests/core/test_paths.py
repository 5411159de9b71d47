"""A model's paths and their dropped parts, where the right answer is known beforehand."""

import gc
import random

import numpy as np
import pytest
import timm
import torch
from core_helpers import batch, buffers_of, same_bits, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import DropPath
from timm.models import VisionTransformer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from timm_rdp import ResidualDropPath
from timm_rdp.core.trace import trace_paths


def names_in(model, *modules):
    """Names of the parameters within these modules, in the model's order."""
    prefixes = tuple(f"{module}." for module in modules)
    return tuple(n for n, _ in model.named_parameters() if n.startswith(prefixes))


def test_a_vits_paths_are_its_branches_in_call_order():
    model = small_model("test_vit")
    rdp = ResidualDropPath(model)
    expected = {}
    for i in range(1, 6):  # block 0 has rate 0 and no DropPath
        block = f"blocks.{i}"
        expected[f"{block}.drop_path1"] = names_in(model, f"{block}.norm1", f"{block}.attn")
        expected[f"{block}.drop_path2"] = names_in(model, f"{block}.norm2", f"{block}.mlp")
    assert {p.name: p.parameters for p in rdp.paths} == expected
    assert [p.name for p in rdp.paths] == list(expected)
    assert [p.drop_prob for p in rdp.paths] == pytest.approx(
        [rate for i in range(1, 6) for rate in [0.1 * i] * 2]
    )


def test_drop_prob_is_what_the_module_has_now():
    model = small_model("test_vit")
    rdp = ResidualDropPath(model)
    model.blocks[2].drop_path1.drop_prob = 0.25
    assert {p.name: p.drop_prob for p in rdp.paths}["blocks.2.drop_path1"] == 0.25


def test_a_module_that_is_called_twice_makes_two_paths():
    model = small_model("cait_xxs24_224")
    paths = {p.name: p.parameters for p in ResidualDropPath(model).paths}
    assert list(paths) == [f"blocks.{i}.drop_path#{k}" for i in range(3) for k in range(2)]
    for i in range(3):
        attention, mlp = (paths[f"blocks.{i}.drop_path#{k}"] for k in range(2))
        block = f"blocks.{i}"
        assert set(attention) == {
            f"{block}.gamma_1",
            *names_in(model, f"{block}.norm1", f"{block}.attn"),
        }
        assert set(mlp) == {f"{block}.gamma_2", *names_in(model, f"{block}.norm2", f"{block}.mlp")}


def test_a_drop_path_that_is_never_called_is_no_path():
    model = small_model("mobilenetv3_small_050")
    paths = {p.name for p in ResidualDropPath(model).paths}
    modules = {n for n, m in model.named_modules() if isinstance(m, DropPath)}
    without_skip = {
        f"{n}.drop_path" for n, m in model.named_modules() if not getattr(m, "has_skip", True)
    }
    assert modules & without_skip
    assert paths == modules - without_skip


def test_the_downsampling_shortcut_of_a_resnet_stays_live():
    model = small_model("test_resnet")
    for path in ResidualDropPath(model).paths:
        block = path.name.removesuffix(".drop_path")
        carried = set(names_in(model, block)) - set(names_in(model, f"{block}.downsample"))
        assert names_in(model, f"{block}.downsample")
        assert set(path.parameters) == carried


def test_a_drop_path_that_is_not_around_a_residual_is_left_to_timm():
    model = small_model("mobilevit_xxs")
    rdp = ResidualDropPath(model)
    not_residual = [f"stages.{i}.0.drop_path" for i in (1, 2, 3, 4)]
    assert [p.name for p in rdp.non_residual] == not_residual
    assert not {p.name for p in rdp.paths} & set(not_residual)


def test_shared_parameters_are_dropped_with_the_last_path_that_uses_them():
    # The two blocks of coat's first stage share their relative position encoding, and the parallel
    # blocks use it no more than that of the first stage.
    model = timm.create_model(
        "coat_lite_tiny", img_size=64, embed_dims=[16] * 4, drop_path_rate=0.2, num_classes=5
    )
    rdp = ResidualDropPath(model, example_input=torch.ones(2, 3, 64, 64))
    shared = set(names_in(model, "crpe1"))
    users = [f"serial_blocks1.{i}.drop_path#0" for i in range(2)]
    assert shared
    for user in users:
        assert not shared & rdp.dropped_part([user])
    assert shared <= rdp.dropped_part(users)


class Nested(nn.Module):
    """A path within a path, then the same Linear on two paths, then a head."""

    def __init__(self, rate=0.5):
        super().__init__()
        self.a, self.b, self.shared, self.head = (nn.Linear(4, 4) for _ in range(4))
        self.never_used = nn.Linear(4, 4)
        self.outer, self.inner, self.left, self.right = (DropPath(rate) for _ in range(4))

    def forward(self, x):
        x = x + self.outer(self.a(x) + self.inner(self.b(x)))
        x = x + self.left(self.shared(x))
        x = x + self.right(self.shared(x).relu())
        return self.head(x)


NESTED = {
    (): "",
    ("inner",): "b",
    ("outer",): "a b",
    ("outer", "inner"): "a b",
    ("left",): "",
    ("right",): "",
    ("left", "right"): "shared",
    ("inner", "left", "right"): "b shared",
    ("inner", "outer", "left", "right"): "a b shared",
}


@pytest.mark.parametrize("dropped", NESTED, ids=" ".join)
def test_dropped_parts_of_nested_paths_and_shared_parameters(dropped):
    rdp = ResidualDropPath(Nested(), example_input=torch.ones(2, 4))
    modules = NESTED[dropped].split()
    assert rdp.dropped_part(dropped) == {f"{m}.{p}" for m in modules for p in ("weight", "bias")}
    assert [p.name for p in rdp.paths] == ["inner", "outer", "left", "right"]


COAT = timm.create_model(
    "coat_tiny", img_size=64, embed_dims=[16] * 4, drop_path_rate=0.2, num_classes=5
)
COAT_GRAPH = trace_paths(COAT, torch.ones(2, 3, 64, 64))
SETS = st.sets(st.sampled_from([p.name for p in COAT_GRAPH.paths]))


@given(SETS, SETS)
@settings(max_examples=200, deadline=None)
def test_a_larger_set_of_paths_drops_no_less(first, second):
    both = COAT_GRAPH.dropped_part(first | second)
    assert both >= COAT_GRAPH.dropped_part(first) | COAT_GRAPH.dropped_part(second)
    assert both <= dict(COAT.named_parameters()).keys()


def test_the_dropped_part_of_one_path_is_what_the_path_lists():
    assert COAT_GRAPH.dropped_part([]) == frozenset()
    for path in COAT_GRAPH.paths:
        assert COAT_GRAPH.dropped_part([path.name]) == set(path.parameters)
        assert len(path.parameters) == len(set(path.parameters))


def test_an_unknown_path_is_an_error_that_names_the_nearest():
    rdp = ResidualDropPath(small_model("test_vit"))
    with pytest.raises(
        ValueError, match=r"no path is named 'blocks.1.drop_path'.*blocks\.1\.drop_path[12]'"
    ):
        rdp.dropped_part(["blocks.1.drop_path"])
    with pytest.raises(ValueError, match=r"no path is named 'xyz'.*ResidualDropPath\.paths"):
        rdp.dropped_part(["xyz"])


# Tracing.


def contents(value):
    """What an attribute of a module holds, down to the tensors in its containers."""
    if isinstance(value, torch.Tensor):
        return (type(value), value.requires_grad, value.grad, value.detach().clone())
    if isinstance(value, dict):
        return [(key, contents(v)) for key, v in value.items()]
    if isinstance(value, list | tuple):
        return [contents(v) for v in value]
    return id(value)


def everything_of(model):
    return {
        "classes": [type(m) for m in model.modules()],
        "attributes": [contents(vars(m)) for m in model.modules()],
        "identities": [[id(p) for p in model.parameters()], [id(b) for b in model.buffers()]],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
    }


def busy(model, raises):
    """Has its forward leave behind whatever one may."""
    model.cache, model.seen, model.plain = {"of": []}, [], torch.ones(2)
    base = type(model)

    def forward(self, x):
        self.last_input = x
        self.cache.setdefault(tuple(x.shape), []).append(x + 1)
        self.cache["of"].append(self.plain.add_(1))
        self.seen.append(len(self.seen))
        self.register_buffer("late", torch.ones(3))
        for parameter in self.parameters():
            parameter.data.mul_(0.5)
        list(self.parameters())[-1].requires_grad_(False)
        self.register_forward_hook(lambda *_: None)
        self.eval()
        np.random.rand(), random.random(), torch.rand(3)
        self.train()
        output = base.forward(self, x)
        if raises:
            raise RuntimeError("as it may")
        return output

    model.__class__ = type("Busy", (base,), {"forward": forward})


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "cait_xxs24_224", "mobilevit_xxs"])
@pytest.mark.parametrize("needs_values", [False, True], ids=["fake", "real"])
@pytest.mark.parametrize("does", ["little", "much", "raise"])
def test_tracing_leaves_the_model_and_every_random_state_untouched(name, needs_values, does):
    model = small_model(name).eval()
    nn.utils.spectral_norm(next(m for m in model.modules() if isinstance(m, nn.Conv2d)))
    model.register_forward_pre_hook(lambda *_: None)
    next(model.parameters()).requires_grad_(False)
    if does != "little":
        busy(model, raises=does == "raise")
    if needs_values:
        model.__class__ = type("NeedsValues", (model.__class__,), {"forward": forward_with_values})
    before = everything_of(model)
    if does == "raise":
        with pytest.raises(ValueError, match="as it may"):
            trace_paths(model)
    else:
        assert trace_paths(model).paths
    assert same_bits(before, everything_of(model))


def forward_with_values(self, x):
    if x.sum().item() > 1e9:  # no fake tensor has a value
        return x
    return super(type(self), self).forward(x)


def test_a_model_that_needs_values_is_traced_by_a_real_forward():
    model, usual = small_model("test_resnet"), small_model("test_resnet")
    model.__class__ = type("NeedsValues", (model.__class__,), {"forward": forward_with_values})
    assert paths_of(model) == paths_of(usual)


def paths_of(model, example_input=None):
    return [(p.name, p.parameters, p.residual) for p in trace_paths(model, example_input).paths]


def test_tracing_computes_nothing():
    model = small_model("test_vit")
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            output = func(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, tuple | list) else [output]:
                if not isinstance(tensor, torch.Tensor) or isinstance(tensor, FakeTensor):
                    continue  # a fake tensor has no memory
                if tensor.device.type != "meta":
                    largest = max(largest, tensor.numel())
            return output

    with Watch():
        trace_paths(model)
        assert largest < 1000  # the smallest weight of a branch has 4096 elements
        model(batch("test_vit")[0])
    assert largest > 1000


class Recurrent(nn.Module):
    """Two recurrences in a row, each on a path of its own, over (B, T, 8) images."""

    def __init__(self, kind, layers, bidirectional, batch_first):
        super().__init__()
        self.batch_first = batch_first
        width = 4 if bidirectional else 8
        options = {"num_layers": layers, "bidirectional": bidirectional, "batch_first": batch_first}
        self.rnns = nn.ModuleList(kind(8, width, **options) for _ in range(2))
        self.drop_paths = nn.ModuleList(DropPath(0.5) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        state = None
        for rnn, drop_path in zip(self.rnns, self.drop_paths, strict=True):
            y, state = rnn(x if self.batch_first else x.transpose(0, 1), state)
            x = x + drop_path(y if self.batch_first else y.transpose(0, 1))
        return self.head(x[:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("layers, bidirectional", [(1, False), (2, True)])
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrences_have_the_paths_of_a_real_forward(kind, layers, bidirectional, batch_first):
    model = Recurrent(kind, layers, bidirectional, batch_first)
    example = torch.ones(2, 5, 8)
    carried = [parameters for _, parameters, _ in paths_of(model, example)]
    assert carried == [(), names_in(model, "rnns.1")]  # the first one hands its state on as well
    by_meta = trace_paths(model, example)
    model.__class__ = type("NeedsValues", (model.__class__,), {"forward": forward_with_values})
    real = trace_paths(model, example)
    assert [vars(p) | {"module": None} for p in by_meta.paths] == [
        vars(p) | {"module": None} for p in real.paths
    ]
    assert by_meta.reached_parameters([]) == set(dict(model.named_parameters()))


def test_tracing_a_recurrence_takes_no_longer_for_more_steps():
    model = Recurrent(nn.LSTM, 2, True, batch_first=True)
    counts = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts[-1] += 1
            return func(*args, **(kwargs or {}))

    for steps in (2, 50):
        counts.append(0)
        with Count():
            trace_paths(model, torch.ones(2, steps, 8))
    assert counts[0] == counts[1] > 0


class Adapter(nn.Module):
    """A forward hook that is a module, with parameters of its own."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def __call__(self, module, args, output):
        return output + self.linear(output)


@pytest.mark.parametrize("how", ["a lambda", "a module"])
def test_parameters_that_act_through_a_users_hooks_belong_to_their_path(how):
    model = small_model("test_vit")
    for block in model.blocks:
        block.adapter = Adapter()
        adapt = block.adapter
        if how == "a lambda":
            adapt = lambda module, args, output, adapter=block.adapter: (
                output + adapter.linear(output)
            )
        block.mlp.register_forward_hook(adapt)
    paths = {p.name: p.parameters for p in trace_paths(model).paths}
    for i in range(1, 6):
        block = f"blocks.{i}"
        expected = names_in(model, f"{block}.norm2", f"{block}.mlp", f"{block}.adapter")
        assert set(paths[f"{block}.drop_path2"]) == set(expected)


def test_a_users_hook_may_convert_the_input():
    model = small_model("test_vit")
    model.register_forward_pre_hook(lambda _, args: (args[0].permute(0, 3, 1, 2) / 255,))
    assert paths_of(model, torch.zeros(2, 32, 32, 3)) == PATHS_OF_TEST_VIT


def test_backward_hooks_do_not_join_what_is_apart():
    model = small_model("test_vit")
    for module in model.modules():
        module.register_full_backward_hook(lambda *_: pytest.fail("called without a backward"))
    assert paths_of(model) == PATHS_OF_TEST_VIT


def own_forward(attention):
    def forward(x, *args, **kwargs):
        b, n, c = x.shape
        qkv = attention.qkv(x).reshape(b, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attention.map = (q @ k.transpose(-2, -1) * attention.scale).softmax(dim=-1)
        return attention.proj((attention.map @ v).transpose(1, 2).reshape(b, n, c))

    return forward


def wrapped_forward(module):
    original = module.forward
    return lambda *args, **kwargs: original(*args, **kwargs)


def test_forwards_that_were_replaced_by_closures_are_followed():
    model = small_model("test_vit")
    for block in model.blocks:
        block.attn.forward = own_forward(block.attn)
        block.mlp.forward = wrapped_forward(block.mlp)
    model.forward = wrapped_forward(model)
    assert paths_of(model) == PATHS_OF_TEST_VIT
    assert not any(hasattr(block.attn, "map") for block in model.blocks)


@pytest.mark.parametrize("wrapped", ["layer4.0", "layer4.0.bn1", ""])
def test_a_wrapped_forward_of_a_model_with_batch_norm_moves_no_statistics(wrapped):
    model, plain = small_model("test_resnet"), small_model("test_resnet")
    module = model.get_submodule(wrapped)
    module.forward = wrapped_forward(module)
    before = buffers_of(model)
    assert paths_of(model) == paths_of(plain)
    assert same_bits(before, buffers_of(model))


def test_a_drop_path_whose_forward_was_replaced_is_refused():
    model = small_model("test_vit")
    model.blocks[2].drop_path1.forward = wrapped_forward(model.blocks[2].drop_path1)
    with pytest.raises(ValueError, match=r"^blocks\.2\.drop_path1 has a forward of its own"):
        ResidualDropPath(model)


def test_fast_norm_does_not_keep_a_model_from_being_traced(monkeypatch):
    monkeypatch.setattr(timm.layers.fast_norm, "_USE_FAST_NORM", True)
    model = small_model("test_vit")
    assert timm.layers.is_fast_norm()
    assert paths_of(model) == PATHS_OF_TEST_VIT


@pytest.mark.parametrize("needs_values", [False, True], ids=["fake", "real"])
def test_nothing_of_the_graph_outlives_tracing(needs_values):
    def nodes_and_fakes():
        return sum(
            isinstance(o, FakeTensor) or type(o).__name__.endswith("Backward0")
            for o in gc.get_objects()
            if type(o).__module__ in ("torch.autograd.graph", FakeTensor.__module__, "builtins")
        )

    model = small_model("test_vit")
    if needs_values:
        model.__class__ = type("NeedsValues", (model.__class__,), {"forward": forward_with_values})
    trace_paths(model)  # torch imports and caches at the first time
    gc.collect()
    gc.disable()  # a cycle of references would have to wait for it
    try:
        before = nodes_and_fakes()
        graph = trace_paths(model)
        assert nodes_and_fakes() == before
    finally:
        gc.enable()
    assert graph.paths


def test_hooks_that_compute_weights_are_followed():
    model = small_model("test_vit")
    nn.utils.spectral_norm(model.blocks[2].mlp.fc1)
    nn.utils.parametrizations.weight_norm(model.blocks[3].mlp.fc1)
    paths = {p.name: p.parameters for p in trace_paths(model).paths}
    assert "blocks.2.mlp.fc1.weight_orig" in paths["blocks.2.drop_path2"]
    fc1 = "blocks.3.mlp.fc1.parametrizations.weight"
    assert {f"{fc1}.original0", f"{fc1}.original1"} <= set(paths["blocks.3.drop_path2"])


def test_what_the_user_froze_still_belongs_to_its_path():
    frozen = small_model("test_vit").requires_grad_(False)
    assert paths_of(frozen) == paths_of(small_model("test_vit"))


@pytest.mark.parametrize("context", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_tracing_works_within_a_users_contexts(context):
    with context():
        assert paths_of(small_model("test_vit")) == PATHS_OF_TEST_VIT


PATHS_OF_TEST_VIT = paths_of(small_model("test_vit"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_every_dtype_are_traced(dtype):
    assert paths_of(small_model("test_vit").to(dtype)) == PATHS_OF_TEST_VIT


def test_a_model_on_meta_is_traced():
    with torch.device("meta"):
        model = timm.create_model("test_vit", img_size=32, drop_path_rate=0.5, num_classes=10)
    assert paths_of(model) == PATHS_OF_TEST_VIT


def test_gradient_checkpointing_does_not_hide_the_graph():
    model = small_model("test_vit")
    model.set_grad_checkpointing(True)
    assert paths_of(model) == PATHS_OF_TEST_VIT
    assert model.grad_checkpointing


def test_timms_reentrant_checkpointing_is_refused(monkeypatch):
    monkeypatch.setattr(timm.layers.config, "_USE_REENTRANT_CKPT", True)
    model = small_model("test_vit")
    model.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match=r"timm\.layers\.set_reentrant_ckpt\(False\)") as error:
        ResidualDropPath(model)
    assert "\n" not in str(error.value)


def test_a_graph_hidden_by_reentrant_checkpointing_is_an_error():
    class Hidden(Nested):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=True)

    with pytest.raises(ValueError, match=r"^.*use_reentrant=True.*use_reentrant=False$"):
        ResidualDropPath(Hidden(), example_input=torch.ones(2, 4))


# The example input.


@pytest.mark.parametrize(
    "name, options",
    [
        ("test_vit", {"in_chans": 1}),
        ("test_resnet", {"in_chans": 5}),
        ("vit_tiny_patch16_224", {"img_size": 48, "depth": 2}),
        ("vit_tiny_patch16_224", {"img_size": (32, 64), "depth": 2}),
        ("vit_tiny_patch16_224", {"img_size": 48, "depth": 2, "in_chans": 2}),
        ("coat_tiny", {"img_size": 64}),
        ("levit_128s", {"img_size": 96}),
        ("gmlp_s16_224", {"img_size": (32, 64)}),
        ("hiera_tiny_224", {"img_size": 64}),
        ("efficientformerv2_s0", {"img_size": (96, 64)}),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_example_input_fits_the_model_by_itself(name, options, wrapped):
    with torch.device("meta"):
        model = timm.create_model(name, drop_path_rate=0.2, num_classes=5, **options)
    if wrapped:
        model = nn.Sequential(nn.Identity(), model)
    assert trace_paths(model).paths


def test_the_example_input_fits_a_module_that_says_its_size_without_timms_factory():
    model = VisionTransformer(img_size=48, patch_size=8, in_chans=2, drop_path_rate=0.2)
    assert trace_paths(model).paths
    model = nn.Sequential(nn.Conv2d(3, 2, 1), model)
    assert trace_paths(model).paths


@pytest.mark.parametrize("name", ["tresnet_m", "csatv2"])
def test_the_example_input_fits_a_stem_that_rearranges_the_image(name):
    model = timm.create_model(name, drop_path_rate=0.2, num_classes=5)
    assert trace_paths(model).paths


def test_the_dict_of_a_naflex_model_is_an_example_input():
    model = timm.create_model(
        "naflexvit_base_patch16_gap", embed_dim=48, num_heads=3, depth=3, drop_path_rate=0.2
    )
    example = {
        "patches": torch.rand(2, 6, 16 * 16 * 3),
        "patch_coord": torch.tensor([[[y, x] for y in range(2) for x in range(3)]] * 2),
        "patch_valid": torch.ones(2, 6, dtype=torch.bool),
    }
    by_dict = paths_of(model, example)
    assert by_dict == paths_of(model, torch.ones(2, 3, 32, 48))
    assert [name for name, _, _ in by_dict] == [
        f"blocks.{i}.drop_path{k}" for i in (1, 2) for k in (1, 2)
    ]


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Nested()

    def forward(self, image, scale, flags=None):
        if flags is not None:
            assert flags.dtype == torch.int64
        return {"out": [self.inner(image) * scale]}


@pytest.mark.parametrize(
    "example_input",
    [
        (torch.ones(2, 4), 2.0),
        (torch.ones(2, 4), torch.ones(2, 1), torch.zeros(2, dtype=torch.int64)),
        {"image": torch.ones(2, 4), "scale": 1},
        {"scale": torch.ones(2, 1), "image": torch.ones(2, 4), "flags": torch.tensor([1, 2])},
    ],
)
def test_example_input_is_a_tuple_or_dict_that_the_forward_takes(example_input):
    rdp = ResidualDropPath(TwoInputs(), example_input=example_input)
    assert [p.name for p in rdp.paths] == [
        f"inner.{n}" for n in ("inner", "outer", "left", "right")
    ]


class TwoStreams(nn.Module):
    """The DropPath of the text's stream is not around a residual, that of the image's is."""

    def __init__(self):
        super().__init__()
        self.image, self.text, self.head = (nn.Linear(4, 4) for _ in range(3))
        self.around, self.alone = DropPath(0.5), DropPath(0.5)

    def forward(self, image, text):
        image = image + self.around(self.image(image))
        return self.head(image + self.alone(self.text(text)))


def test_a_path_that_alone_feeds_one_of_two_inputs_is_not_residual():
    rdp = ResidualDropPath(TwoStreams(), example_input=(torch.ones(2, 4), torch.ones(2, 4)))
    assert [p.name for p in rdp.paths] == ["around"]
    assert [p.name for p in rdp.non_residual] == ["alone"]


def test_example_input_overrides_the_models_default_size():
    model = small_model("test_resnet")
    sizes = []

    class Watched(type(model)):
        def forward(self, x):
            sizes.append(tuple(x.shape))
            return super().forward(x)

    model.__class__ = Watched
    trace_paths(model, torch.ones(3, 3, 72, 40))
    assert set(sizes) == {(3, 3, 72, 40)}


def test_example_input_is_not_changed():
    example = torch.randn(2, 4)
    before = example.clone()
    ResidualDropPath(Nested(), example_input=example)
    assert same_bits(example, before)
    assert not example.requires_grad
    assert example.grad is None


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: (Nested(), None), r"Nested cannot be traced with an image of its default size"),
        (lambda: (Nested(), torch.ones(2, 5)), r"Nested cannot be traced with example_input"),
        (
            lambda: (
                small_model("test_vit", img_size=32, dynamic_img_size=False),
                torch.ones(2, 3, 99, 99),
            ),
            r"VisionTransformer cannot be traced with example_input",
        ),
        (
            lambda: (timm.create_model("crossvit_tiny_240", img_size=64, drop_path_rate=0.1), None),
            r"CrossVit cannot be traced with an image of its default size \(RuntimeError: .*size",
        ),
    ],
)
def test_an_input_that_does_not_fit_is_one_line_that_says_what_to_pass(make, message):
    model, example_input = make()
    with pytest.raises(ValueError, match=message) as error:
        ResidualDropPath(model, example_input=example_input)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("pass example_input, the input that its forward takes")


def test_an_output_that_does_not_depend_on_the_input_is_an_error():
    class Embedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.inner = nn.Embedding(3, 4), Nested()

        def forward(self, x):
            return self.inner(self.table(x))

    with pytest.raises(ValueError, match="floating-point input") as error:
        ResidualDropPath(Embedding(), example_input=torch.tensor([0, 1]))
    assert "\n" not in str(error.value)
