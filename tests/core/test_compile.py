"""Rule 8: torch.compile gives the updates of eager mode, without a graph for every mask."""

import copy

import pytest
import torch
from compile_helpers import check_same_training, drop_paths, graphs, train
from core_helpers import batch, buffers_of, changed, loss_of, parameters_of, same_bits, small_model

from timm_rdp import ResidualDropPath

pytestmark = pytest.mark.usefixtures("fresh_compiler")

CAIT = "cait_xxs24_224"  # calls each of its DropPaths twice per forward
MODELS = ["test_vit", "test_resnet", CAIT]
SMALLER = {"test_vit": {"depth": 3}, CAIT: {"depth": 2}}  # where the paths' number does not matter


def compiled_pair(name, backend="aot_eager", order="given", small=True, dtype=torch.float32):
    """The same model twice, in eager mode and compiled: (what is called, its controller)."""
    options = SMALLER.get(name, {}) if small else {}
    eager, model = (small_model(name, **options).to(dtype) for _ in range(2))
    if order == "given":
        compiled = torch.compile(model, backend=backend)
        rdp = ResidualDropPath(compiled)
    else:
        rdp = ResidualDropPath(model)
        compiled = torch.compile(model, backend=backend)
        assert rdp.follow(compiled) is rdp
    return (eager, ResidualDropPath(eager)), (compiled, rdp)


@pytest.mark.parametrize(
    "name, order",
    [
        ("test_vit", "given"),
        pytest.param("test_vit", "followed", marks=pytest.mark.slow),
        pytest.param("test_resnet", "followed", marks=pytest.mark.slow),
        pytest.param(CAIT, "given", marks=pytest.mark.slow),
    ],
)
def test_compiled_updates_are_those_of_eager_in_one_graph(name, order):
    eager, compiled = compiled_pair(name, order=order, small=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        steps = check_same_training(eager, compiled, name=name)
    assert graphs() == 1
    if name == "test_resnet":
        everything = set(buffers_of(eager[0]))
        for step in steps:
            rests = step["phase"] == "droppath" and step["dropped"]
            assert (step["buffers moved"] < everything) if rests else True
            assert step["buffers moved"] == everything or rests


# In float32 inductor's rounding alone, which is not that of eager mode, drives a small network with
# BatchNorm apart within 20 updates, with or without RDP.
def check_inductor(name, small, **options):
    eager, compiled = compiled_pair(name, "inductor", small=small, dtype=torch.float64)
    check_same_training(eager, compiled, name=name, **options)
    assert graphs() == 1


@pytest.mark.slow
def test_inductor_gives_the_updates_of_eager_in_one_graph():
    check_inductor("test_vit", small=True, cycles=30)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_inductor_gives_the_updates_of_eager_in_one_graph_for_more_models(name):
    check_inductor(name, small=False)


def test_a_pause_before_the_backward_pass_leaves_the_gradients():
    _, (compiled, rdp) = compiled_pair("test_vit")
    gradients = []
    for paused in (False, True):
        it = rdp.iteration()
        with pytest.raises(KeyError), it:
            loss = loss_of(compiled, *batch("test_vit"))
            if paused:
                with rdp.pause():
                    compiled(batch("test_vit")[0])
            loss.backward()
            gradients.append(
                {n: p.grad.clone() for n, p in rdp.model.named_parameters() if n in it.trainable}
            )
            raise KeyError  # the same iteration comes again
        compiled.zero_grad()
    assert it.dropped and same_bits(*gradients)


def test_what_the_user_froze_before_compiling_never_trains():
    frozen = {"cls_token", "blocks.2.mlp.fc1.weight", "head.bias"}
    eager, compiled = compiled_pair("test_vit")
    for _, rdp in (eager, compiled):
        for name in frozen:
            rdp.model.get_parameter(name).requires_grad_(False)
    steps = check_same_training(eager, compiled, name="test_vit")
    assert not any(frozen & step["with gradient"] for step in steps)
    assert not any(frozen & step["trained"] for step in steps)
    flags = {n for n, p in compiled[1].model.named_parameters() if not p.requires_grad}
    assert flags == frozen


@pytest.mark.slow
def test_gradients_accumulate_and_clipping_sees_what_is_trained():
    eager, compiled = compiled_pair("test_vit")
    check_same_training(eager, compiled, name="test_vit", cycles=15, accumulate=2, clip=0.5)
    assert graphs() == 1


@pytest.mark.slow
def test_zero_gradients_left_by_the_loop_train_nothing():
    eager, compiled = compiled_pair("test_vit")
    check_same_training(eager, compiled, name="test_vit", cycles=15, set_to_none=False)


@pytest.mark.slow
def test_mixed_precision_trains_the_same_sets():
    eager, compiled = compiled_pair("test_vit")
    check_same_training(eager, compiled, tolerance=2e-2, name="test_vit", autocast=True)


@pytest.mark.slow
def test_gradient_checkpointing_recomputes_with_the_masks_of_the_iteration():
    eager, compiled = compiled_pair("test_vit")
    compiled[1].model.set_grad_checkpointing()
    check_same_training(eager, compiled, name="test_vit")


@pytest.mark.parametrize(
    "name",
    [
        "test_vit",
        pytest.param("test_resnet", marks=pytest.mark.slow),
        pytest.param(CAIT, marks=pytest.mark.slow),
    ],
)
def test_outside_iterations_and_in_eval_mode_it_is_the_unpatched_model_compiled(name):
    plain, patched = (small_model(name, **SMALLER.get(name, {})) for _ in range(2))
    compiled = torch.compile(patched, backend="aot_eager")
    reference = torch.compile(plain, backend="aot_eager")
    rdp = ResidualDropPath(compiled)

    def run(model, training):
        model.train(training)
        torch.manual_seed(5)
        loss = loss_of(model, *batch(name))
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        model.zero_grad()
        return {"loss": loss.detach(), "random state": torch.get_rng_state(), **gradients}

    for training in (True, False):
        ours = {n.removeprefix("_orig_mod."): v for n, v in run(compiled, training).items()}
        theirs = {n.removeprefix("_orig_mod."): v for n, v in run(reference, training).items()}
        assert not changed(theirs, ours)
        assert not changed(buffers_of(plain), buffers_of(patched))
        if training:
            assert {mask.shape for m in drop_paths(patched) for mask in m.masks} == {(4,)}
            assert not all(mask.all() for m in drop_paths(patched) for mask in m.masks)

    # Within iterations too an evaluation is that of the whole network.
    with torch.no_grad():
        expected = plain.eval()(batch(name)[0])
    for it in rdp.cycle():
        with it, torch.no_grad():
            compiled.eval()
            torch.testing.assert_close(compiled(batch(name)[0]), expected)
            compiled.train()


@pytest.mark.slow
def test_iterations_may_alternate_with_plain_training_and_evaluation_in_few_graphs():
    eager, compiled = compiled_pair("test_vit")
    outputs = []
    for model, rdp in (eager, compiled):
        torch.manual_seed(3)
        outputs.append([])
        for _ in range(5):
            outputs[-1].append(loss_of(model, *batch("test_vit")).item())
            outputs[-1] += [step["loss"] for step in train((model, rdp), "test_vit", 1)]
            model.eval()
            outputs[-1].append(loss_of(model, *batch("test_vit")).item())
            model.train()
    torch.testing.assert_close(torch.tensor(outputs[0]), torch.tensor(outputs[1]))
    assert graphs() <= 4


def test_masks_show_what_each_iteration_decided():
    _, (model, rdp) = compiled_pair(CAIT)
    seen = set()
    for _ in range(6):
        for it in rdp.cycle():
            with it:
                loss_of(model, *batch(CAIT)).backward()
            names = {m: n for n, m in rdp.model.named_modules()}
            for module in drop_paths(rdp.model):
                calls = [p for p in rdp.paths if p.module is module]
                assert [tuple(mask.shape) for mask in module.masks] == [()] * len(calls)
                for path, mask in zip(calls, module.masks, strict=True):
                    dropped = it.phase == "droppath" and path.name in it.dropped
                    assert mask.item() is not dropped, names[module]
                    seen.add(bool(mask))
    assert seen == {True, False}


@pytest.mark.slow
def test_attached_loop_gives_the_updates_of_the_written_out_one():
    eager, compiled = compiled_pair("test_resnet")
    model, rdp = compiled
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    reference = torch.optim.SGD(eager[0].parameters(), lr=0.02, momentum=0.9)
    rdp.attach(optimizer)
    for step in range(20):
        images = batch("test_resnet", 8, 8 * step)
        before = parameters_of(rdp.model)
        loss = loss_of(model, *images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        trained = changed(before, parameters_of(rdp.model))
        it = eager[1].iteration()
        before = parameters_of(eager[0])
        with it:
            expected = loss_of(eager[0], *images)
            expected.backward()
            reference.step()
            reference.zero_grad()
        torch.testing.assert_close(loss, expected)
        assert trained == changed(before, parameters_of(eager[0]))
    assert graphs() == 1


@pytest.mark.slow
def test_an_exception_leaves_nothing_behind_and_the_same_iteration_comes_again():
    _, (model, rdp) = compiled_pair("test_resnet")
    it = rdp.iteration()
    while not it.dropped:
        with it:
            pass
        it = rdp.iteration()
    before = buffers_of(rdp.model)
    with pytest.raises(KeyboardInterrupt), it:
        loss_of(model, *batch("test_resnet"))
        raise KeyboardInterrupt
    carried = {n.rpartition(".")[0] for n in rdp.dropped_part(it.dropped)}
    rested = {n for n in before if n.rpartition(".")[0] in carried}
    assert rested
    assert not rested & changed(before, buffers_of(rdp.model))
    again = rdp.iteration()
    assert (again.cycle, again.phase, again.dropped) == (it.cycle, it.phase, it.dropped)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.slow
def test_detached_model_is_the_unpatched_one():
    _, (model, rdp) = compiled_pair("test_resnet")
    train((model, rdp), "test_resnet", 2)
    plain = small_model("test_resnet")
    plain.load_state_dict(rdp.model.state_dict())
    rdp.detach()
    for called in (model, plain):
        torch.manual_seed(5)
        loss_of(called, *batch("test_resnet")).backward()
    for ours, theirs in zip(rdp.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert not any(p._post_accumulate_grad_hooks for p in rdp.model.parameters())


@pytest.mark.slow
def test_a_copy_of_the_compiled_model_is_a_plain_model():
    _, (model, rdp) = compiled_pair("test_vit")
    train((model, rdp), "test_vit", 1)
    with rdp.iteration():
        twin = copy.deepcopy(model)
    assert twin.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        images, _ = batch("test_vit")
        torch.testing.assert_close(twin.eval()(images), model.eval()(images))


# torch's own: it looks at .grad of whatever it holds when it stops compiling a function.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("how", ["torch.compile", "Module.compile"])
def test_a_compiled_model_that_the_controller_was_not_told_about_is_refused(how):
    model = small_model("test_vit", **SMALLER["test_vit"])
    rdp = ResidualDropPath(model)
    before = parameters_of(model)
    if how == "torch.compile":
        called = torch.compile(model, backend="aot_eager")
    else:
        called = model
        called.compile(backend="aot_eager")
    message = "compiled after it was patched: pass the compiled model"
    with pytest.raises(RuntimeError, match=message), rdp.iteration():
        loss_of(called, *batch("test_vit")).backward()
    assert not changed(before, parameters_of(model))
    assert all(p.requires_grad for p in model.parameters())


# torch's own, without RDP too: it looks at .grad of what enters a compiled part of a model.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("what", ["model", pytest.param("blocks", marks=pytest.mark.slow)])
def test_a_model_compiled_in_place_trains_as_in_eager_mode(what):
    eager, model = (small_model("test_vit", **SMALLER["test_vit"]) for _ in range(2))
    for module in [model] if what == "model" else model.blocks:
        module.compile(backend="aot_eager")
    compiled = (model, ResidualDropPath(model))
    check_same_training((eager, ResidualDropPath(eager)), compiled, name="test_vit", cycles=12)


def test_follow_refuses_what_does_not_wrap_the_patched_model():
    rdp = ResidualDropPath(small_model("test_vit"))
    other = torch.compile(small_model("test_vit"), backend="aot_eager")
    with pytest.raises(ValueError, match="OptimizedModule does not wrap the model"):
        rdp.follow(other)
