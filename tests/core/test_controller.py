"""ResidualDropPath: the sequence of iterations, its state, and what it refuses."""

import contextlib
import copy
import gc
import io
import json
import random

import numpy as np
import pytest
import timm
import torch
from core_helpers import batch, loss_of, parameters_of, same_bits, small_model
from timm.layers import DropPath
from timm.optim import create_optimizer_v2

from timm_rdp import ResidualDropPath


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05)


def update(model, optimizer, start=0, name="test_vit"):
    loss_of(model, *batch(name, start=start)).backward()
    optimizer.step()
    optimizer.zero_grad()


def described(it):
    return it.phase, it.cycle, it.dropped, it.trainable


def sequence(rdp, count):
    """The next iterations as `next` batches meet them."""
    seen = []
    for _ in range(count):
        with rdp.iteration() as it:
            seen.append(described(it))
    return seen


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return True


# The sequence.


def test_a_cycle_is_a_droppath_and_a_complement_iteration_of_the_same_paths():
    model = small_model("test_vit")
    rdp = ResidualDropPath(model, seed=4)
    everything = {n for n, _ in model.named_parameters()}
    for cycle in range(4):
        its = []
        for it in rdp.cycle():
            with it as entered:
                assert entered is it
            its.append(it)
        droppath, complement = its
        assert (droppath.phase, complement.phase) == ("droppath", "complement")
        assert droppath.cycle == complement.cycle == cycle
        assert droppath.dropped == complement.dropped != frozenset()
        assert droppath.trainable == everything - rdp.dropped_part(droppath.dropped)
        assert complement.trainable == rdp.dropped_part(droppath.dropped)
        assert isinstance(droppath.dropped, frozenset)
        assert isinstance(droppath.trainable, frozenset)


def test_a_cycle_that_drops_nothing_ends_without_a_complement_iteration():
    rdp = ResidualDropPath(small_model("test_resnet"), seed=4)  # cycle 0 drops nothing
    first, second = ([described(it) for it in entered(rdp.cycle())] for _ in range(2))
    assert [d[:3] for d in first] == [("droppath", 0, frozenset())]
    assert [d[0] for d in second] == ["droppath", "complement"]
    assert second[0][1] == 1


def test_a_droppath_iteration_with_nothing_to_train_is_passed_over():
    # Where the path is dropped that carries all that the user trains, it waits for the complement.
    model = small_model("test_vit").requires_grad_(False)
    model.blocks[5].attn.requires_grad_(True)
    rdp = ResidualDropPath(model, seed=4)
    optimizer = adamw(model)
    phases = []
    for _ in range(6):
        for it in rdp.cycle():
            assert it.trainable
            with it:
                update(model, optimizer)
            phases.append((it.phase, "blocks.5.drop_path1" in it.dropped))
    assert set(phases) == {("droppath", False), ("complement", True)}


def test_a_model_that_is_frozen_altogether_is_told():
    rdp = ResidualDropPath(small_model("test_vit").requires_grad_(False))
    with pytest.raises(RuntimeError, match="requires a gradient") as error:
        rdp.iteration()
    assert one_line(error, "unfreeze some")


def entered(iterations):
    for it in iterations:
        with it:
            pass
        yield it


def test_iteration_gives_the_sequence_that_cycle_gives():
    by_iteration = ResidualDropPath(small_model("test_resnet"), seed=4)
    by_cycle = ResidualDropPath(small_model("test_resnet"), seed=4)
    expected = [described(it) for _ in range(8) for it in entered(by_cycle.cycle())]
    assert sequence(by_iteration, len(expected)) == expected


def test_the_same_iteration_comes_until_it_has_been_completed():
    rdp = ResidualDropPath(small_model("test_vit"))
    assert described(rdp.iteration()) == described(rdp.iteration())
    assert rdp.masks == {}
    with rdp.iteration():
        pass
    assert described(rdp.iteration()) == described(rdp.iteration())
    assert rdp.iteration().phase == "complement"


def test_cycle_gives_what_is_left_of_a_cycle():
    rdp = ResidualDropPath(small_model("test_vit"))
    sequence(rdp, 1)
    assert [(it.phase, it.cycle) for it in entered(rdp.cycle())] == [("complement", 0)]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_complement_iteration_follows_every_nth_droppath_iteration(every):
    rdp = ResidualDropPath(small_model("test_vit"), seed=4, every=every)
    masks = [rdp.iteration().dropped]
    phases = []
    for _ in range(6):
        phases.append([it.phase for it in entered(rdp.cycle())])
        masks.append(rdp.iteration().dropped)
    usual, last = ["droppath"], ["droppath", "complement"]
    assert phases == ([usual] * (every - 1) + [last]) * (6 // every)
    # Which paths a cycle drops does not depend on it.
    other = ResidualDropPath(small_model("test_vit"), seed=4)
    for dropped in masks:
        assert other.iteration().dropped == dropped
        list(entered(other.cycle()))


def test_masks_are_those_of_the_current_cycle():
    rdp = ResidualDropPath(small_model("test_vit"))
    assert rdp.masks == {}
    for _ in range(3):
        for it in rdp.cycle():
            with it:
                expected = {p.name: p.name not in it.dropped for p in rdp.paths}
                assert rdp.masks == expected
            assert rdp.masks == expected
    assert list(rdp.masks) == [p.name for p in rdp.paths]


def test_a_changed_drop_prob_holds_from_the_next_cycle_on():
    model = small_model("test_vit")
    rdp = ResidualDropPath(model)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    assert rdp.iteration().dropped == frozenset()
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 1.0  # kept ones would be divided by zero, but there are none
    with rdp.iteration() as it:
        assert it.dropped == {p.name for p in rdp.paths}
        loss_of(model, *batch("test_vit")).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_no_global_random_state_moves():
    model = small_model("test_vit")
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    rdp = ResidualDropPath(model)
    for _ in range(5):
        for it in entered(rdp.cycle()):
            assert it.trainable
    loss_of(model.eval(), *batch("test_vit")).backward()
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_iterations_do_not_nest():
    rdp = ResidualDropPath(small_model("test_vit"))
    with rdp.iteration() as outer:
        with pytest.raises(RuntimeError, match="do not nest") as error, rdp.iteration():
            pytest.fail("entered a second iteration")
        assert one_line(error, "droppath iteration of cycle 0")
        flags = {n for n, p in rdp.model.named_parameters() if p.requires_grad}
        assert flags == outer.trainable  # the outer one still holds
    assert rdp.iteration().phase == "complement"


def test_an_iteration_that_is_over_is_refused():
    rdp = ResidualDropPath(small_model("test_vit"))
    stale = rdp.iteration()
    list(entered(rdp.cycle()))
    with pytest.raises(RuntimeError, match="is over") as error, stale:
        pytest.fail("entered it again")
    assert one_line(error, "droppath iteration of cycle 0", "iteration() or cycle()")
    assert all(p.requires_grad for p in rdp.model.parameters())
    assert rdp.iteration().cycle == 1


def test_a_loop_that_does_not_enter_its_iterations_is_told():
    rdp = ResidualDropPath(small_model("test_vit"))
    with pytest.raises(RuntimeError, match="was not entered") as error:
        for _ in rdp.cycle():
            pass
    assert one_line(error, "with it:")


class CalledByWidth(torch.nn.Module):
    """Calls its DropPath once per column of its input, three at the most."""

    def __init__(self):
        super().__init__()
        self.drop_path = DropPath(0.5)
        self.linears = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(3))

    def forward(self, x):
        total = x[:, :1]
        for i, linear in enumerate(self.linears[: x.shape[1]]):
            total = total + self.drop_path(linear(x[:, i : i + 1]))
        return total


def test_a_forward_unlike_the_traced_one_is_named_and_leaves_nothing_behind():
    model = CalledByWidth()
    rdp = ResidualDropPath(model, example_input=torch.ones(2, 3))
    assert [p.name for p in rdp.paths] == ["drop_path#0", "drop_path#1", "drop_path#2"]
    with pytest.raises(RuntimeError, match="not called 3 times") as error, rdp.iteration():
        model(torch.ones(2, 2)).sum().backward()
    assert one_line(error, "drop_path", "example_input")
    assert all(p.requires_grad for p in model.parameters())
    assert rdp.iteration().cycle == 0
    with rdp.iteration():
        model(torch.ones(2, 3)).sum().backward()
    assert rdp.iteration().phase == "complement"


@pytest.mark.parametrize("seen", [2, 3])
def test_a_path_that_is_called_more_often_than_traced_is_named(seen):
    model = CalledByWidth()
    rdp = ResidualDropPath(model, example_input=torch.ones(2, 1))
    assert [p.name for p in rdp.paths] == ["drop_path"]
    for width in (seen, (1, seen), (seen, 1)):  # of the micro-batches of an iteration
        with pytest.raises(RuntimeError, match="not called once") as error, rdp.iteration():
            for each in np.atleast_1d(width):
                model(torch.ones(2, each, requires_grad=True)).sum().backward()
        assert one_line(error, "drop_path", "example_input")
        assert all(p.requires_grad for p in model.parameters())
        assert rdp.iteration().cycle == 0
    with rdp.iteration():
        for _ in range(seen):
            model(torch.ones(2, 1, requires_grad=True)).sum().backward()
    assert rdp.state_dict()["cycle"] == 1 or rdp.state_dict()["phase"] == "complement"


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["test_vit", "cait_xxs24_224"])
def test_forwards_however_they_are_made_are_counted_as_such(name, checkpointed):
    model = small_model(name)
    model.set_grad_checkpointing(checkpointed)
    rdp = ResidualDropPath(model)
    images, _ = batch(name)
    for _ in range(2):
        for it in rdp.cycle():
            with it:
                loss = model(images).sum() + model(images[:1]).sum()
                model.eval()(images)
                model.train()
                loss = loss + model.forward_head(model.forward_features(images)).sum()
                loss.backward()
                model(images).sum().backward()
                with torch.no_grad():
                    model(images)
    assert rdp.iteration().cycle == 2


def test_a_forward_that_was_interrupted_does_not_spoil_the_next():
    model = CalledByWidth()
    rdp = ResidualDropPath(model, example_input=torch.ones(2, 3))
    with rdp.iteration() as it:
        hook = model.linears[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(torch.ones(2, 3))
        hook.remove()
        model(torch.ones(2, 3)).sum().backward()
        (module,) = {p.module for p in rdp.paths}
        assert [bool(mask) for mask in module.masks] == list(rdp.masks.values())
    assert (it.phase, rdp.iteration().phase) == ("droppath", "complement")


# State.


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("done", [0, 1, 2, 3, 4])
def test_a_loaded_state_continues_the_sequence_where_it_stood(done):
    rdp = ResidualDropPath(small_model("test_vit"), seed=7, every=2)
    sequence(rdp, done)
    state = saved_and_loaded(rdp.state_dict())
    other = ResidualDropPath(small_model("test_vit"), seed=1)
    sequence(other, 2)
    other.load_state_dict(state)
    assert other.masks == rdp.masks
    assert other.state_dict() == rdp.state_dict() == json.loads(json.dumps(state))
    assert (other.seed, other.every) == (7, 2)
    assert sequence(other, 8) == sequence(rdp, 8)


@pytest.mark.parametrize("stop", [2, 3])
def test_training_goes_on_bitwise_from_a_checkpoint_within_a_cycle(stop):
    def make():
        model = small_model("test_vit")
        return model, adamw(model), ResidualDropPath(model, seed=4)

    def train(model, optimizer, rdp, updates):
        for i in updates:
            with rdp.iteration():
                update(model, optimizer, start=4 * i)

    straight = make()
    train(*straight, range(6))

    first = make()
    train(*first, range(stop))
    checkpoint = saved_and_loaded([part.state_dict() for part in first])
    assert checkpoint[2]["phase"] == ["droppath", "complement"][stop % 2]
    second = make()
    for part, state in zip(second, checkpoint, strict=True):
        part.load_state_dict(state)
    train(*second, range(stop, 6))
    assert same_bits(parameters_of(second[0]), parameters_of(straight[0]))


def test_the_state_is_a_copy():
    rdp = ResidualDropPath(small_model("test_vit"))
    sequence(rdp, 1)
    state = rdp.state_dict()
    before = json.dumps(state)
    other = ResidualDropPath(small_model("test_vit"))
    other.load_state_dict(state)
    sequence(rdp, 3)
    sequence(other, 3)
    assert json.dumps(state) == before


def test_a_state_that_does_not_fit_is_refused():
    rdp = ResidualDropPath(small_model("test_vit"))
    before = rdp.state_dict()
    with pytest.raises(ValueError, match="not the state of a ResidualDropPath") as error:
        rdp.load_state_dict({"seed": 1, "cycle": 3})
    assert one_line(error, "'dropped'")
    other = ResidualDropPath(small_model("test_vit", depth=4)).state_dict()
    with pytest.raises(ValueError, match="6 residual paths, this one has 10") as error:
        rdp.load_state_dict(other)
    assert one_line(error, "blocks.4.drop_path1", "create the model as it was then")
    assert rdp.state_dict() == before
    with rdp.iteration(), pytest.raises(RuntimeError, match="within an iteration"):
        rdp.load_state_dict(before)


@pytest.mark.parametrize("bad", [None, {"phase": "other"}, {"dropped": ["nowhere"]}])
def test_a_state_that_makes_no_sense_is_refused_and_nothing_changes(bad):
    rdp = ResidualDropPath(small_model("test_vit"))
    state = rdp.state_dict()
    with pytest.raises(ValueError, match="state"):
        rdp.load_state_dict(bad and {**state, **bad})
    assert rdp.state_dict() == state


# attach().


def user_loop(model, optimizer, updates, before_update=lambda i: None, name="test_vit"):
    for i in range(updates):
        before_update(i)
        update(model, optimizer, start=4 * i, name=name)


@pytest.mark.parametrize("optimizer_name", ["adamw", "sgd", "lookahead_adamw", "lamb"])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "cait_xxs24_224"])
def test_an_attached_loop_equals_the_one_with_iterations_written_out(name, optimizer_name):
    make = lambda model: create_optimizer_v2(model, opt=optimizer_name, lr=0.01, weight_decay=0.05)
    written, attached = small_model(name), small_model(name)
    rdp, optimizer = ResidualDropPath(written, seed=1), make(written)
    for i in range(9):
        with rdp.iteration():
            update(written, optimizer, start=4 * i, name=name)

    optimizer = make(attached)
    other = ResidualDropPath(attached, seed=1)
    assert other.attach(optimizer) is other
    user_loop(attached, optimizer, 9, name=name)
    assert same_bits(dict(attached.state_dict()), dict(written.state_dict()))
    assert other.state_dict() == rdp.state_dict()
    assert all(p.requires_grad for p in attached.parameters())

    untouched = small_model(name)
    user_loop(untouched, make(untouched), 9, name=name)
    assert not same_bits(dict(untouched.state_dict()), dict(written.state_dict()))


def test_attached_forwards_without_training_are_no_iterations():
    model = small_model("test_vit")
    optimizer = adamw(model)
    rdp = ResidualDropPath(model).attach(optimizer)
    images, labels = batch("test_vit")

    def evaluate(_):
        model.eval()
        with torch.no_grad():
            model(images)
        loss_of(model, images, labels).backward()  # saliency, say
        optimizer.zero_grad()
        model.train()
        with torch.no_grad():
            model(images)  # BatchNorm statistics, say
        assert rdp.state_dict() == expected[0]
        assert all(p.requires_grad for p in model.parameters())

    expected = [rdp.state_dict()]
    evaluate(0)
    update(model, optimizer)
    expected[0] = rdp.state_dict()
    assert expected[0]["phase"] == "complement"
    evaluate(1)
    update(model, optimizer)
    assert rdp.iteration().cycle == 1


def test_attached_micro_batches_are_one_iteration():
    written, attached = small_model("test_vit"), small_model("test_vit")
    optimizers = adamw(written), adamw(attached)
    rdp = ResidualDropPath(written)
    ResidualDropPath(attached).attach(optimizers[1])

    def accumulate(model):
        for start in (0, 4, 8):
            (loss_of(model, *batch("test_vit", start=start)) / 3).backward()

    for _ in range(4):
        with rdp.iteration():
            accumulate(written)
            optimizers[0].step()
            optimizers[0].zero_grad()
        accumulate(attached)
        optimizers[1].step()
        optimizers[1].zero_grad()
    assert same_bits(parameters_of(attached), parameters_of(written))


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_that_skips_the_attached_step_repeats_the_same_iteration(fused):
    # A fused optimizer is stepped even then, and skips the overflow itself.
    model = small_model("test_vit")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    rdp = ResidualDropPath(model, seed=4).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    seen = []
    for overflow in (False, True, True, False, False, True, False):
        before, at = parameters_of(model), rdp.iteration()
        loss = loss_of(model, *batch("test_vit"))
        scaler.scale(loss * float("inf") if overflow else loss).backward()
        if not fused:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        after = parameters_of(model)
        moved = {name for name in before if not same_bits(before[name], after[name])}
        assert moved == (set() if overflow else at.trainable)
        seen.append((at.phase, at.cycle))
    assert seen == [
        ("droppath", 0),
        ("complement", 0),
        ("complement", 0),
        ("complement", 0),
        ("droppath", 1),
        ("complement", 1),
        ("complement", 1),
    ]


def test_an_iteration_entered_by_hand_is_ended_by_hand_though_attached():
    model = small_model("test_vit")
    optimizer = adamw(model)
    rdp = ResidualDropPath(model, seed=4).attach(optimizer)
    for i in range(4):
        for it in rdp.cycle():
            with it:
                update(model, optimizer, start=4 * i)
                assert rdp.iteration().phase == it.phase
                with pytest.raises(RuntimeError, match="within an iteration"):
                    rdp.detach()
        assert rdp.iteration().cycle == i + 1
        update(model, optimizer)  # by the hooks
        update(model, optimizer)
        assert rdp.iteration().cycle == i + 2
        rdp.load_state_dict({**rdp.state_dict(), "cycle": i + 1})


def test_attach_refuses_what_it_cannot_follow():
    model = small_model("test_vit")
    rdp = ResidualDropPath(model)
    with pytest.raises(
        ValueError, match="holds no parameter of the patched VisionTransformer"
    ) as e:
        rdp.attach(adamw(small_model("test_resnet")))
    assert one_line(e, "AdamW", "pass the optimizer that trains it")
    rdp.attach(adamw(model))
    with pytest.raises(ValueError, match="already attached") as error:
        rdp.attach(adamw(model))
    assert one_line(error, "detach()")


# detach().


def test_a_detached_controller_says_so():
    model = small_model("test_vit")
    rdp = ResidualDropPath(model)
    assert rdp.detach() is model
    for use in (rdp.iteration, lambda: next(rdp.cycle()), lambda: rdp.attach(adamw(model))):
        with pytest.raises(RuntimeError, match="was detached") as error:
            use()
        assert one_line(error, "make a new one")
    assert rdp.detach() is model
    ResidualDropPath(model)


def test_detach_within_an_iteration_is_refused():
    model = small_model("test_vit")
    rdp = ResidualDropPath(model)
    with rdp.iteration(), pytest.raises(RuntimeError, match="within an iteration") as error:
        rdp.detach()
    assert one_line(error, "leave its `with` block first")
    rdp.detach()


def test_a_detached_attached_loop_is_the_users_own_again():
    model, plain = small_model("test_vit"), small_model("test_vit")
    optimizer, other = adamw(model), adamw(plain)
    rdp = ResidualDropPath(model).attach(optimizer)
    update(model, optimizer)
    state = rdp.state_dict()
    rdp.detach()
    plain.load_state_dict(model.state_dict())
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    for trained, by in ((model, optimizer), (plain, other)):
        torch.manual_seed(0)
        update(trained, by)
    assert same_bits(parameters_of(model), parameters_of(plain))
    assert rdp.state_dict() == state


# What it tells.


def test_phase_cycle_and_repr_tell_where_the_sequence_stands():
    rdp = ResidualDropPath(small_model("test_vit"), seed=3, every=2)
    for cycle in range(4):
        for it in rdp.cycle():
            assert (rdp.phase, rdp.current_cycle) == (it.phase, cycle)
            assert repr(rdp) == (
                "<ResidualDropPath of 10 paths of VisionTransformer: "
                f"cycle {cycle}, {it.phase} iteration>"
            )
            with it:
                assert (rdp.phase, rdp.current_cycle) == (it.phase, cycle)
    rdp.detach()
    assert "detached" in repr(rdp)


# A model that changes, and an iteration that cannot be entered.


def test_an_iteration_that_cannot_be_entered_leaves_nothing_open():
    model = small_model("test_vit")
    rdp = ResidualDropPath(model)
    with pytest.raises(RuntimeError, match="requires_grad_"):

        def loss(parameters):
            with rdp.iteration():
                return torch.func.functional_call(model, parameters, batch("test_vit")[0]).sum()

        torch.func.grad(loss)({n: p.detach() for n, p in model.named_parameters()})
    assert rdp.masks == {}
    assert all(p.requires_grad for p in model.parameters())
    assert len(sequence(rdp, 2)) == 2
    rdp.detach()


class LowRank(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.a = torch.nn.Linear(linear.in_features, 2, bias=False)
        self.b = torch.nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x):
        return self.linear(x) + self.b(self.a(x))


def with_low_rank(model):
    model.blocks[5].mlp.fc1 = LowRank(model.blocks[5].mlp.fc1)


def with_weight_norm(model):
    torch.nn.utils.parametrizations.weight_norm(model.blocks[5].mlp.fc1)


def with_another_parameter(model):
    model.blocks[5].mlp.fc1.weight = torch.nn.Parameter(model.blocks[5].mlp.fc1.weight.data.clone())


def with_a_parameter_where_none_was(model):
    module = model.blocks[5].mlp.norm
    assert not module._modules and not module._parameters
    module.scale = torch.nn.Parameter(torch.ones(()))
    module.register_forward_hook(lambda module, _, output: output * module.scale)


def with_a_new_head(model):
    model.reset_classifier(10)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize(
    "change, name",
    [
        (with_low_rank, "blocks.5.mlp.fc1"),
        (with_weight_norm, "blocks.5.mlp.fc1"),
        (with_another_parameter, "blocks.5.mlp.fc1.weight"),
        (with_a_parameter_where_none_was, "blocks.5.mlp.norm.scale"),
        (with_a_new_head, "head"),
    ],
)
def test_what_is_added_or_replaced_after_patching_is_named_and_can_be_followed(
    change, name, attached
):
    model = small_model("test_vit")
    rdp = ResidualDropPath(model)
    sequence(rdp, 3)
    change(model)
    optimizer = adamw(model)
    if attached:
        rdp.attach(optimizer)
    within = lambda it: contextlib.nullcontext() if attached else it
    refused = pytest.raises(RuntimeError, match=rf"^{name}\S* was added .*call follow\(model\)")
    with refused as error, within(rdp.iteration()):
        update(model, optimizer)
    assert one_line(error)
    assert rdp.follow(model) is rdp
    expected = ResidualDropPath(copy.deepcopy(model))
    assert [(p.name, p.parameters) for p in rdp.paths] == [
        (p.name, p.parameters) for p in expected.paths
    ]
    optimizer.zero_grad()
    for _ in range(4):
        it, before = rdp.iteration(), parameters_of(model)
        with within(it):
            update(model, optimizer)
        moved = {n for n, p in parameters_of(model).items() if not same_bits(p, before[n])}
        assert moved == it.trainable
    assert rdp.current_cycle == 3
    rdp.detach()
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_scalar_that_was_replaced_by_its_equal_is_named():
    model = small_model("test_vit")
    model.scale = torch.nn.Parameter(torch.ones(()))
    rdp = ResidualDropPath(model)
    sequence(rdp, 3)
    model.scale = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(RuntimeError, match=r"^scale was added .*call follow"), rdp.iteration():
        pass


# What the constructor refuses.


class OwnDropPath(DropPath):
    """Drops tokens, not paths."""

    def forward(self, x):
        return torch.nn.functional.dropout1d(x, self.drop_prob, self.training)


def with_own_drop_path():
    model = small_model("test_vit")
    model.blocks[2].drop_path1 = OwnDropPath(0.1)
    return model


def with_all_rates_zero():
    model = small_model("test_vit")
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    return model


def scripted():
    return torch.jit.trace(small_model("test_resnet").eval(), batch("test_resnet")[0])


REFUSED = {
    "no DropPath": (lambda: timm.create_model("vgg11", num_classes=2), "VGG", "drop_path_rate=0.1"),
    "created without a rate": (
        lambda: timm.create_model("test_vit"),
        "VisionTransformer",
        "drop_path_rate=0.1",
    ),
    "takes a rate but never calls a DropPath": (
        lambda: timm.create_model("lcnet_050", drop_path_rate=0.1, num_classes=2),
        "MobileNetV3",
        "use another model",
    ),
    "no DropPath around a residual": (
        lambda: timm.create_model("ese_vovnet19b_slim_dw", drop_path_rate=0.1, num_classes=2),
        "VovNet",
        "3 DropPaths",
        "use another one",
    ),
    "paths that carry nothing": (  # only the input of its shortcuts passes through them
        lambda: timm.create_model("resnest14d", drop_path_rate=0.1, num_classes=2),
        "ResNet",
        "none of its 3 paths carries a parameter (without layer2.0.drop_path all still reach",
        "use another one",
    ),
    "all rates zero": (with_all_rates_zero, "VisionTransformer", "10 paths", "drop_path_rate=0.1"),
    "wrapped in DataParallel": (
        lambda: torch.nn.DataParallel(small_model("test_vit")),
        "DataParallel",
        "model.module",
    ),
    "TorchScript": (scripted, "ScriptModule", "pass the original"),
    "a DropPath of its own": (
        with_own_drop_path,
        "blocks.2.drop_path1 is a OwnDropPath",
        "timm.layers.DropPath",
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("what", REFUSED)
def test_a_model_that_cannot_be_trained_so_is_refused_in_one_line(what):
    make, *parts = REFUSED[what]
    model = make()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError) as error:
        ResidualDropPath(model)
    assert one_line(error, *parts)
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_patched_model_is_scripted_only_after_detach():
    model = timm.create_model("test_vit", drop_path_rate=0.2, num_classes=2, scriptable=True)
    rdp = ResidualDropPath(model)
    with pytest.raises(RuntimeError) as error:
        torch.jit.script(model)
    assert one_line(error, "cannot be scripted", "detach()")
    images, _ = batch("test_vit")
    expected = model.eval()(images)
    for plain in (copy.deepcopy(model), rdp.detach()):
        assert same_bits(torch.jit.script(plain)(images), expected)


def test_what_is_no_module_is_refused_in_one_line():
    with pytest.raises(ValueError) as error:
        ResidualDropPath("test_vit")
    assert one_line(error, "a str is no torch.nn.Module")


def test_a_model_is_patched_by_one_controller_at_a_time():
    model = small_model("test_vit")
    rdp = ResidualDropPath(model)
    with pytest.raises(ValueError, match="patched by another ResidualDropPath") as error:
        ResidualDropPath(model)
    assert one_line(error, "detach() that first")
    assert sequence(rdp, 2)  # the first one works as before
    del rdp
    gc.collect()
    assert sequence(ResidualDropPath(model), 2)


@pytest.mark.parametrize("every", [0, -1])
def test_every_below_one_is_refused(every):
    with pytest.raises(ValueError, match=rf"^every={every} must be 1 or more$"):
        ResidualDropPath(small_model("test_vit"), every=every)


@pytest.mark.parametrize("bad", [{"every": "2"}, {"every": 1.5}, {"seed": 1.5}])
def test_a_seed_or_every_that_is_no_whole_number_is_named(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value!r} must be a whole number"):
        ResidualDropPath(small_model("test_vit"), **bad)
