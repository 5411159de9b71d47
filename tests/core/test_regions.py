"""Rule 8, by regions: the updates and the savings of eager mode, in a bounded number of graphs."""

import copy
import logging
import pickle

import pytest
import timm
import torch
from compile_helpers import check_same_training, drop_paths, graphs, train
from core_helpers import batch, buffers_of, changed, loss_of, parameters_of, small_model
from functorch.compile import make_boxed_func
from test_families import FAMILIES, create, first_tensor
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from timm_rdp import ResidualDropPath
from timm_rdp.core.regions import find_regions

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    # torch's own, without RDP too: it looks at .grad of what enters a compiled part of a model.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

CAIT = "cait_xxs24_224"  # calls each of its DropPaths twice per forward
SWIN = "swin_tiny_patch4_window7_224"
# How many graphs they may need: 16 for a ViT, else 6 for each kind of block and size of it.
MOST_GRAPHS = {
    "test_vit": 16,
    "test_resnet": 6 * 4,
    CAIT: 6 * 2,
    "convnext_atto": 6 * 3,
    SWIN: 6 * 2 * 2,
}
SMALLER = {"test_vit": {"depth": 3}, CAIT: {"depth": 2}}
SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("test_resnet", "convnext_atto", CAIT, SWIN)
]


def pair(name, backend="aot_eager", dtype=torch.float32, **options):
    """The same model twice, in eager mode and compiled by regions: (model, its controller)."""
    options = {**SMALLER.get(name, {}), **options}
    eager, model = (small_model(name, **options).to(dtype) for _ in range(2))
    rdp = ResidualDropPath(model)
    assert rdp.compile(backend=backend) is model
    return (eager, ResidualDropPath(eager)), (model, rdp)


@pytest.mark.parametrize("name", ["test_vit", *SLOW])
def test_updates_are_those_of_eager_in_a_few_graphs_per_kind_of_block(name):
    eager, compiled = pair(name, depth=6) if name == "test_vit" else pair(name)
    check_same_training(eager, compiled, name=name, tolerance=2e-5)
    assert 2 <= graphs() <= MOST_GRAPHS[name]
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_inductor_gives_the_updates_of_eager(name):
    eager, compiled = pair(name, "inductor", torch.float64)
    check_same_training(eager, compiled, name=name, cycles=12)


@pytest.mark.slow
def test_a_vit_of_twelve_blocks_needs_sixteen_graphs_and_none_after_cycle_30_of_200():
    model = timm.create_model(
        "vit_small_patch16_224",
        img_size=32,
        embed_dim=48,
        num_heads=2,
        drop_path_rate=0.1,
        num_classes=10,
    )
    rdp = ResidualDropPath(model.train())
    rdp.compile(backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    by_cycle = []
    for cycle in range(200):
        for it in rdp.cycle():
            with it:
                loss_of(model, *batch("test_vit", 2, 2 * cycle)).backward()
                optimizer.step()
                optimizer.zero_grad()
        by_cycle.append(graphs())
    assert len(set(by_cycle)) > 1
    assert by_cycle[-1] == by_cycle[30] <= 16


class Counting:
    """A backend that counts the matrix products of what it runs, forward and backward."""

    products = 0

    def __call__(self, graph, inputs):
        return aot_autograd(fw_compiler=self.compiled, bw_compiler=self.compiled)(graph, inputs)

    def compiled(self, graph, inputs):
        of_graph = sum("mm" in str(node.target) for node in graph.graph.nodes)

        def run(*args):
            self.products += of_graph
            return graph.forward(*args)

        return make_boxed_func(run)


class Products(TorchDispatchMode):
    """Counts the matrix products that run in eager mode."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += "mm" in str(function)
        return function(*args, **(kwargs or {}))


def test_what_is_dropped_or_frozen_is_not_computed():
    """The blocks run as many matrix products as in eager mode, whatever is dropped."""
    eager, model = (small_model("test_vit") for _ in range(2))
    theirs, ours = ResidualDropPath(eager), ResidualDropPath(model)
    backend = Counting()
    ours.compile(backend=backend)
    seen = set()
    for _ in range(25):
        for of_eager, of_regions in zip(theirs.cycle(), ours.cycle(), strict=True):
            with of_eager, Products() as in_eager:
                loss_of(eager, *batch("test_vit")).backward()
                eager.zero_grad()
            backend.products = 0
            with of_regions:
                loss_of(model, *batch("test_vit")).backward()
                model.zero_grad()
            assert of_eager.dropped == of_regions.dropped
            if of_eager.phase == "droppath":
                # The head is in no region. Eager mode runs one sample through the two linear layers
                # of each dropped path.
                expected = in_eager.products - 3 - 2 * len(of_eager.dropped)
            else:
                expected = in_eager.products - 2  # the head, less the gradient of its weights
            assert backend.products == expected
            seen.add(backend.products)
    assert len(seen) > 10


def test_batch_norms_of_dropped_paths_rest_and_those_of_others_do_not():
    eager, compiled = pair("test_resnet")
    steps = check_same_training(eager, compiled, name="test_resnet", cycles=12)
    everything = set(buffers_of(eager[0]))
    dropping = [s for s in steps if s["phase"] == "droppath" and s["dropped"]]
    assert dropping
    assert all(set() < s["buffers moved"] < everything for s in dropping)
    assert all(m.training for m in compiled[0].modules())


@pytest.mark.slow
def test_gradients_accumulate_and_clipping_sees_what_is_trained():
    eager, compiled = pair("test_vit")
    check_same_training(eager, compiled, name="test_vit", cycles=12, accumulate=2, clip=0.5)


@pytest.mark.slow
def test_zero_gradients_left_by_the_loop_train_nothing():
    eager, compiled = pair("test_vit")
    check_same_training(eager, compiled, name="test_vit", cycles=12, set_to_none=False)


@pytest.mark.slow
def test_mixed_precision_trains_the_same_sets():
    eager, compiled = pair("test_vit")
    check_same_training(eager, compiled, 2e-2, name="test_vit", cycles=12, autocast=True)


@pytest.mark.slow
def test_channels_last_stays():
    eager, compiled = pair("test_resnet")
    for model, _ in (eager, compiled):
        model.to(memory_format=torch.channels_last)
    check_same_training(eager, compiled, 2e-5, name="test_resnet", cycles=8, channels_last=True)


def test_what_the_user_froze_never_trains():
    frozen = {"cls_token", "blocks.2.mlp.fc1.weight", "head.bias"}
    eager, compiled = pair("test_vit")
    for _, rdp in (eager, compiled):
        for name in frozen:
            rdp.model.get_parameter(name).requires_grad_(False)
    steps = check_same_training(eager, compiled, name="test_vit", cycles=12)
    assert not any(frozen & step["trained"] for step in steps)


@pytest.mark.slow
def test_gradient_checkpointing_recomputes_with_the_masks_of_the_iteration():
    eager, compiled = pair("test_vit")
    for model, _ in (eager, compiled):
        model.set_grad_checkpointing()
    check_same_training(eager, compiled, name="test_vit", cycles=12)


@pytest.mark.slow
def test_gradient_scaler_skips_an_overflow_and_the_iteration_comes_again():
    outcomes = []
    for model, rdp in pair("test_vit"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        rdp.attach(optimizer)
        for step in range(12):
            loss = loss_of(model, *batch("test_vit", 4, 4 * step))
            scaler.scale(loss * (float("inf") if step == 5 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        outcomes.append((rdp.state_dict(), parameters_of(model)))
    assert outcomes[0][0] == outcomes[1][0]
    torch.testing.assert_close(outcomes[0][1], outcomes[1][1])


class WithLoss(nn.Module):
    """Its call returns the loss, which `same` repeats; the model itself is gone around."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, labels):
        output = self.model.forward_head(self.model.forward_features(images))
        return nn.functional.cross_entropy(output, labels)


@pytest.mark.parametrize(
    "first, batches",
    [
        pytest.param("attach", "same", marks=pytest.mark.slow),
        ("compile", "next"),
        pytest.param("attach", "next", marks=pytest.mark.slow),
        pytest.param("compile", "same", marks=pytest.mark.slow),
    ],
)
def test_attached_loop_gives_the_updates_of_the_eager_one(batches, first):
    states = []
    for compiled in (False, True):
        model = small_model("test_resnet")
        task = WithLoss(model)
        rdp = ResidualDropPath(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        if compiled and first == "compile":
            rdp.compile(backend="aot_eager")
        if batches == "same":
            rdp.follow(task)
        rdp.attach(optimizer, batch=batches)
        if compiled and first == "attach":
            rdp.compile(backend="aot_eager")
        trained = []
        for step in range(8):
            before = parameters_of(model)
            task(*batch("test_resnet", 8, 8 * step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            trained.append(changed(before, parameters_of(model)))
        states.append((trained, rdp.state_dict(), parameters_of(model)))
    assert states[0][:2] == states[1][:2]
    torch.testing.assert_close(states[0][2], states[1][2], rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("name", ["test_vit", pytest.param("test_resnet", marks=pytest.mark.slow)])
def test_outside_iterations_and_in_eval_mode_it_is_the_unpatched_model(name):
    plain, patched = (small_model(name) for _ in range(2))
    rdp = ResidualDropPath(patched)
    rdp.compile(backend="aot_eager")

    def run(model, train):
        model.train(train)
        torch.manual_seed(5)
        loss = loss_of(model, *batch(name))
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        model.zero_grad()
        return {"loss": loss.detach(), **gradients}

    for train_mode in (True, False):
        torch.testing.assert_close(run(patched, train_mode), run(plain, train_mode))
        if train_mode:
            assert {mask.shape for m in drop_paths(patched) for mask in m.masks} == {(4,)}
    with torch.no_grad():
        expected = plain.eval()(batch(name)[0])
    for it in rdp.cycle():
        with it, torch.no_grad():
            torch.testing.assert_close(patched.eval()(batch(name)[0]), expected)
            patched.train()


@pytest.mark.slow
def test_an_exception_leaves_nothing_behind_and_the_same_iteration_comes_again():
    _, (model, rdp) = pair("test_resnet")
    it = rdp.iteration()
    while not it.dropped:
        with it:
            pass
        it = rdp.iteration()
    before, modes = buffers_of(model), [m.training for m in model.modules()]
    with pytest.raises(KeyboardInterrupt), it:
        loss_of(model, *batch("test_resnet"))
        raise KeyboardInterrupt
    carried = {n.rpartition(".")[0] for n in rdp.dropped_part(it.dropped)}
    rested = {n for n in before if n.rpartition(".")[0] in carried}
    assert rested
    assert not rested & changed(before, buffers_of(model))
    assert modes == [m.training for m in model.modules()]
    assert all(p.requires_grad for p in model.parameters())
    assert rdp.iteration().dropped == it.dropped


def test_blocks_compiled_in_place_are_regions_whether_patched_before_or_after():
    def compile_blocks(model):
        for block in model.blocks:
            block.compile(backend="aot_eager")

    eager, before, after = (small_model("test_vit", depth=3) for _ in range(3))
    compile_blocks(before)
    of_before, of_after = ResidualDropPath(before), ResidualDropPath(after)
    compile_blocks(after)
    assert of_after.follow(after) is of_after
    expected = train((eager, ResidualDropPath(eager)), "test_vit", 10)
    for model, rdp in ((before, of_before), (after, of_after)):
        assert not rdp._patch.compiled
        for ours, theirs in zip(train((model, rdp), "test_vit", 10), expected, strict=True):
            assert ours["trained"] == theirs["trained"]
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.mark.slow
def test_copies_and_pickles_are_plain_models_with_a_controller_of_their_own():
    _, (model, rdp) = pair("test_vit")
    train((model, rdp), "test_vit", 2)
    for twin, of_twin in (copy.deepcopy((model, rdp)), pickle.loads(pickle.dumps((model, rdp)))):
        assert of_twin.model is twin
        steps = train((twin, of_twin), "test_vit", 3)
        assert {s["phase"] for s in steps} == {"droppath", "complement"}
        assert all(s["trained"] <= s["trainable"] for s in steps)


@pytest.mark.slow
def test_detached_model_is_the_unpatched_one_compiled():
    _, (model, rdp) = pair("test_resnet")
    train((model, rdp), "test_resnet", 2)
    plain = small_model("test_resnet")
    plain.load_state_dict(rdp.model.state_dict())
    assert rdp.detach() is model
    gradients = []
    for called in (model, plain):
        torch.manual_seed(5)
        loss_of(called, *batch("test_resnet")).backward()
        gradients.append({n: p.grad for n, p in called.named_parameters()})
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(buffers_of(model), buffers_of(plain))
    # Patched again, its compiled blocks are regions again.
    steps = train((model, ResidualDropPath(model)), "test_resnet", 4)
    assert all(s["trained"] == s["trainable"] & s["with gradient"] for s in steps)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_are_refused(mode):
    rdp = ResidualDropPath(small_model("test_vit"))
    with pytest.raises(ValueError, match=f"mode='{mode}' records CUDA graphs"):
        rdp.compile(mode=mode)
    assert not any(m._compiled_call_impl for m in rdp.model.modules())


def test_compiling_twice_or_within_an_iteration_is_refused():
    _, (model, rdp) = pair("test_vit")
    with pytest.raises(ValueError, match="compiled already"):
        rdp.compile()
    with pytest.raises(ValueError, match="compiled already"):
        rdp.follow(torch.compile(model, backend="aot_eager"))
    rdp = ResidualDropPath(small_model("test_vit"))
    with rdp.iteration(), pytest.raises(RuntimeError, match="within an iteration"):
        rdp.compile()


def test_a_model_without_regions_is_compiled_as_a_whole():
    class OfOneFunction(nn.Module):
        """All its paths are in the forward of the model itself."""

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.drop = nn.ModuleList(timm.layers.DropPath(0.5) for _ in range(3))

        def forward(self, x):
            for layer, drop in zip(self.layers, self.drop, strict=True):
                x = x + drop(layer(x))
            return x

    model = OfOneFunction().train()
    rdp = ResidualDropPath(model, example_input=torch.randn(4, 8))
    assert find_regions(model, rdp._graph) == {}
    rdp.compile(backend="aot_eager")
    for _ in range(6):
        for it in rdp.cycle():
            before = parameters_of(model)
            with it:
                model(torch.randn(4, 8)).square().mean().backward()
                torch.optim.SGD(model.parameters(), lr=0.1).step()
                model.zero_grad()
            assert changed(before, parameters_of(model)) == it.trainable
    assert graphs() == 1


def test_who_compiles_the_whole_model_is_told_once_what_regions_would_save(caplog):
    caplog.set_level(logging.WARNING, "timm_rdp")
    model = small_model("test_vit", depth=3)
    rdp = ResidualDropPath(torch.compile(model, backend="aot_eager"))
    rdp.follow(model)
    (record,) = caplog.records
    assert "rdp.compile() instead saves that for 4 paths" in record.message


@pytest.mark.sweep
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_gradients_of_eager_mode(family):
    name, size, options = FAMILIES[family]
    eager, model = (create(name, options) for _ in range(2))
    images = torch.randn(4, 3, size, size, dtype=torch.float64)
    found = []
    for each in (eager, model):
        for module in drop_paths(each):
            module.drop_prob = 0.5
        rdp = ResidualDropPath(each, example_input=images)
        if each is model:
            rdp.compile(backend="eager")  # torch's aot_eager cannot run cpubone, unpatched either
        found.append([])
        for _ in range(1 if len(rdp.paths) > 8 else 2):  # each compiles as many graphs again
            for it in rdp.cycle():
                torch.manual_seed(it.cycle)
                with it:
                    first_tensor(each(images)).square().mean().backward()
                    gradients = {
                        n: p.grad for n, p in each.named_parameters() if p.grad is not None
                    }
                    found[-1].append((it.phase, it.dropped, gradients, buffers_of(each)))
                    each.zero_grad()
    for ours, theirs in zip(*found, strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2].keys() == theirs[2].keys()
        torch.testing.assert_close(ours[2:], theirs[2:], rtol=1e-6, atol=1e-8)
