"""attach(): where iterations of a user's own loop begin and end, and what cannot be followed."""

from contextlib import nullcontext

import pytest
import torch
from core_helpers import (
    batch,
    buffers_of,
    changed,
    loss_of,
    parameters_of,
    same_bits,
    small_model,
)
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from timm_rdp import ResidualDropPath


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)


def update(model, optimizer, start=0, name="test_vit"):
    loss_of(model, *batch(name, start=start)).backward()
    optimizer.step()
    optimizer.zero_grad()


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    return all(part in message for part in parts)


def written_out(name, updates):
    """A model after as many iterations written out with `with`."""
    model = small_model(name)
    rdp, optimizer = ResidualDropPath(model), sgd(model)
    for i in range(updates):
        with rdp.iteration():
            update(model, optimizer, 4 * i, name)
    return model


# Where an iteration begins.


class CallsParts(nn.Module):
    """Never calls the model that is patched, but its parts."""

    def __init__(self, name, how):
        super().__init__()
        self.body, self.how = small_model(name), how

    def forward(self, x):
        body = self.body
        if self.how == "forward_head(forward_features())":
            return body.forward_head(body.forward_features(x))
        if self.how == "forward_intermediates()":
            return body.forward_head(body.forward_intermediates(x, indices=1)[0])
        if self.how == "forward()":
            return body.forward(x)
        tokens = body.norm_pre(body._pos_embed(body.patch_embed(x)))
        return body.forward_head(body.norm(body.blocks(tokens)))


@pytest.mark.parametrize(
    "name, how",
    [
        ("test_vit", "forward_head(forward_features())"),
        ("test_vit", "forward_intermediates()"),
        ("test_vit", "forward()"),
        ("test_vit", "the parts one by one"),
        ("test_resnet", "forward_head(forward_features())"),
        ("test_resnet", "forward_intermediates()"),
    ],
)
def test_forwards_that_go_around_the_model_are_iterations_all_the_same(name, how):
    model = CallsParts(name, how)
    optimizer = sgd(model)
    rdp = ResidualDropPath(model.body).attach(optimizer)
    for i in range(6):
        it, before, buffers = rdp.iteration(), parameters_of(model.body), buffers_of(model.body)
        update(model, optimizer, 4 * i, name)
        assert changed(before, parameters_of(model.body)) == it.trainable
        if it.phase == "droppath":
            at_rest = {
                buffer
                for buffer in buffers
                if f"{buffer.rpartition('.')[0]}.weight" in rdp.dropped_part(it.dropped)
            }
            assert changed(buffers, buffers_of(model.body)) == buffers.keys() - at_rest
    assert rdp.current_cycle == 3
    if how != "forward_intermediates()":
        expected = written_out(name, 6)
        assert same_bits(parameters_of(model.body), parameters_of(expected))


def test_a_forward_that_begins_behind_the_first_path_is_refused():
    model = small_model("test_vit")
    rdp = ResidualDropPath(model).attach(sgd(model))
    tokens = torch.randn(2, 5, 64)
    with pytest.raises(RuntimeError, match=r"pause\(\)") as error:
        model.blocks[3](tokens)
    assert one_line(error, "call the model itself")
    with rdp.pause():
        model.blocks[3](tokens).sum().backward()
    with torch.no_grad():
        model.blocks[3](tokens)
    assert rdp.masks == {}


def test_the_mode_that_counts_is_that_of_the_drop_paths():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    model = Wrapper(small_model("test_vit"))
    optimizer = sgd(model)
    rdp = ResidualDropPath(model, example_input=torch.zeros(2, 3, 32, 32)).attach(optimizer)
    model.eval()
    model.module.train()  # as Lightning restores modes after a validation
    assert not model.training
    for i in range(4):
        update(model, optimizer, 4 * i)
    assert rdp.current_cycle == 2


def test_training_in_eval_mode_is_refused_at_the_first_step():
    model = small_model("test_vit")
    optimizer = sgd(model)
    ResidualDropPath(model).attach(optimizer)
    optimizer.step()  # without gradients, as before a scheduler's first step
    with pytest.raises(RuntimeError, match="no iteration ran before this step") as error:
        update(model.eval(), optimizer)
    assert one_line(error, "VisionTransformer", "train mode")


def test_a_closure_that_runs_the_forward_within_the_step_is_one_iteration():
    model = small_model("test_vit")
    optimizer = sgd(model)
    ResidualDropPath(model).attach(optimizer)
    for i in range(6):

        def closure(start=4 * i):
            optimizer.zero_grad()
            loss = loss_of(model, *batch("test_vit", start=start))
            loss.backward()
            return loss

        optimizer.step(closure)
    assert same_bits(parameters_of(model), parameters_of(written_out("test_vit", 6)))


# Where it ends, or is set aside.


@pytest.mark.parametrize("meanwhile", ["validation", "epoch"])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_an_iteration_without_a_step_is_set_aside_for_a_validation_or_an_epoch(name, meanwhile):
    model, plain = small_model(name), small_model(name)
    optimizer = sgd(model)
    rdp = ResidualDropPath(model).attach(optimizer)
    for _ in range(3):
        update(model, optimizer, name=name)
    at = rdp.state_dict()
    loss_of(model, *batch(name)).backward()  # the rest of an epoch
    optimizer.zero_grad()
    assert not all(p.requires_grad for p in model.parameters())
    if meanwhile == "validation":
        for module in model.modules():
            module.training = False
        with torch.no_grad():
            model(batch(name)[0])
    else:
        model.train()
    assert all(p.requires_grad for p in model.parameters())
    model.train()
    plain.load_state_dict(model.state_dict())
    for each in (model, plain):
        torch.manual_seed(1)
        update_bn([batch(name)[0]], each)
    assert same_bits(buffers_of(model), buffers_of(plain))
    assert rdp.state_dict()["cycle"] == at["cycle"]
    it = rdp.iteration()
    assert it.phase == rdp.phase == at["phase"]
    before = parameters_of(model)
    update(model, optimizer, name=name)
    assert changed(before, parameters_of(model)) == it.trainable


def test_a_validation_between_forward_and_step_changes_nothing():
    models = []
    for validated in (False, True):
        model = small_model("test_vit")
        optimizer = sgd(model)
        ResidualDropPath(model).attach(optimizer)
        for i in range(6):
            loss = loss_of(model, *batch("test_vit", start=4 * i))
            if validated:
                with torch.no_grad():
                    model.eval()(batch("test_vit")[0])
                model.train()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(parameters_of(model))
    assert same_bits(*models)


def test_a_checkpointed_forward_cannot_be_recomputed_after_its_iteration():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = small_model("test_vit")

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False)

    model = Checkpointed()
    rdp = ResidualDropPath(model, example_input=torch.zeros(2, 3, 32, 32))
    with rdp.iteration() as it:
        assert it.dropped
        loss = loss_of(model, *batch("test_vit"))
    with pytest.raises(RuntimeError, match=r"call backward\(\) before leaving it"):
        loss.backward()
    loss_of(model, *batch("test_vit")).backward()  # outside iterations as ever


def freeze_all_but_the_head(model):
    for name, parameter in model.named_parameters():
        if not name.startswith("head"):
            parameter.requires_grad_(False)


@pytest.mark.parametrize("within", ["an attached iteration", "with"])
def test_what_the_user_freezes_while_an_iteration_is_open_stays_frozen(within):
    model = small_model("test_vit")
    optimizer = sgd(model)
    rdp = ResidualDropPath(model)
    if within == "with":
        with rdp.iteration() as it:
            assert it.dropped
            freeze_all_but_the_head(model)
    else:
        rdp.attach(optimizer)
        loss_of(model, *batch("test_vit")).backward()
        optimizer.zero_grad()
        freeze_all_but_the_head(model)
        update(model, optimizer)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "head.weight",
        "head.bias",
    }
    before = parameters_of(model)
    for i in range(4):
        with rdp.iteration():
            update(model, optimizer, 4 * i)
    assert changed(before, parameters_of(model)) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("frozen", ["blocks.1.", "blocks.3.", "patch_embed."])
def test_freezing_one_part_while_an_iteration_is_open_leaves_the_others(frozen):
    model = small_model("test_vit")
    rdp = ResidualDropPath(model)
    with rdp.iteration() as it:
        assert {"blocks.1.drop_path1", "blocks.3.drop_path1", "blocks.4.drop_path1"} == it.dropped
        for name, parameter in model.named_parameters():
            if name.startswith(frozen):
                parameter.requires_grad_(False)
    flags = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert flags == {n for n, _ in model.named_parameters() if n.startswith(frozen)}


# pause().


@pytest.mark.parametrize("within", ["nothing", "an attached iteration", "with"])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_paused_forward_is_that_of_the_unpatched_model(name, within):
    model, plain = small_model(name), small_model(name)
    optimizer = sgd(model)
    rdp = ResidualDropPath(model).attach(optimizer)

    def pause():
        plain.load_state_dict(model.state_dict())
        results = []
        with rdp.pause():
            assert all(p.requires_grad for p in model.parameters())
            for each in (model, plain):
                torch.manual_seed(2)
                output = each(batch(name)[0])
                results.append([output.detach(), buffers_of(each)])
            with pytest.raises(RuntimeError, match=r"within pause\(\)"), rdp.iteration():
                pytest.fail("entered an iteration")
        assert same_bits(*results)

    it, before = rdp.iteration(), parameters_of(model)
    if within == "with":
        with it:
            loss_of(model, *batch(name)).backward()
            pause()
            optimizer.step()
    else:
        if within == "an attached iteration":
            loss_of(model, *batch(name)).backward()
        pause()
        loss_of(model, *batch(name)).backward()
        optimizer.step()
    assert changed(before, parameters_of(model)) == it.trainable
    assert rdp.phase == "complement"


# Optimizers.


class Accelerated(torch.optim.Optimizer):
    """As Accelerate's: an optimizer by class, but without what a constructor makes."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def step(self, closure=None):
        self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


class Fastai:
    """As fastai's wrapper of an optimizer of torch."""

    def __init__(self, optimizer):
        self.opt = optimizer

    def step(self):
        self.opt.step()

    def zero_grad(self):
        self.opt.zero_grad()


@pytest.mark.parametrize("wrapper", [Accelerated, Fastai])
def test_wrapped_optimizers_are_followed(wrapper):
    model = small_model("test_vit")
    optimizer = wrapper(sgd(model))
    ResidualDropPath(model).attach(optimizer)
    for i in range(6):
        update(model, optimizer, 4 * i)
    assert same_bits(parameters_of(model), parameters_of(written_out("test_vit", 6)))


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation in two steps, as in the usual implementation."""

    def __init__(self, parameters, inside=True):
        super().__init__(parameters, {})
        base = torch.optim.SGD(self.param_groups, lr=0.01)
        self.moved_by = base
        if inside:
            self.base_optimizer = base

    @torch.no_grad()
    def first_step(self):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self.state[p]["old"] = p.clone()
                p.add_(p.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.copy_(self.state[p]["old"])
                if not hasattr(self, "base_optimizer"):
                    p.add_(p.grad, alpha=-0.01)
        if hasattr(self, "base_optimizer"):
            self.base_optimizer.step()
        self.zero_grad()


def sam_update(model, optimizer):
    loss_of(model, *batch("test_vit")).backward()
    optimizer.first_step()
    loss_of(model, *batch("test_vit")).backward()
    optimizer.second_step()


def test_both_steps_of_sam_are_one_iteration():
    model = small_model("test_vit")
    optimizer = SAM(model.parameters())
    rdp = ResidualDropPath(model).attach(optimizer)
    for _ in range(6):
        it, before = rdp.iteration(), parameters_of(model)
        sam_update(model, optimizer)
        assert changed(before, parameters_of(model)) == it.trainable
    assert rdp.current_cycle == 3


def test_an_optimizer_whose_steps_are_not_seen_is_refused():
    model = small_model("test_vit")
    optimizer = SAM(model.parameters(), inside=False)
    ResidualDropPath(model).attach(optimizer)
    with pytest.raises(RuntimeError, match="attach the optimizer that moves them") as error:
        for _ in range(2):
            sam_update(model, optimizer)
    assert one_line(error, "SAM")


class NotOfTorch:
    def __init__(self, model):
        self.param_groups = [{"params": [*model.parameters()]}]


@pytest.mark.parametrize(
    "make, parts",
    [
        (NotOfTorch, ("NotOfTorch", "no optimizer of torch", "iteration()")),
        (lambda model: torch.optim.LBFGS(model.parameters()), ("LBFGS", "frozen")),
        (lambda _: sgd(small_model("test_vit")), ("holds no parameter",)),
    ],
)
def test_an_optimizer_is_refused_before_anything_is_changed(make, parts):
    model = small_model("test_vit")
    rdp = ResidualDropPath(model)
    with pytest.raises(ValueError) as error:
        rdp.attach(make(model))
    assert one_line(error, *parts)
    assert not any(m._forward_pre_hooks for m in model.modules())
    optimizer = sgd(model)
    rdp.attach(optimizer)
    for i in range(6):
        update(model, optimizer, 4 * i)
    assert same_bits(parameters_of(model), parameters_of(written_out("test_vit", 6)))


@pytest.mark.parametrize("held", ["all", "patched", "frozen"])
def test_parameters_outside_of_the_patched_model_are_told_of(held, caplog):
    network, head = small_model("test_vit"), torch.nn.Linear(10, 2)
    head.requires_grad_(held != "frozen")
    parameters = [*network.parameters()] + [*head.parameters()] * (held != "patched")
    ResidualDropPath(network).attach(torch.optim.SGD(parameters, 0.01))
    told = [r.message for r in caplog.records if "outside of the patched" in r.message]
    assert len(told) == (held == "all")
    if told:
        assert "2 parameters" in told[0] and "VisionTransformer" in told[0]


# What a complement iteration has nothing to train.


def frozen_but_the_head(model):
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    return [{"params": model.parameters()}]


def only_the_head(model):
    return [{"params": model.head.parameters()}]


def no_rate_but_for_the_head(model):
    body = [p for name, p in model.named_parameters() if not name.startswith("head.")]
    return [{"params": body, "lr": 0.0}, {"params": model.head.parameters()}]


@pytest.mark.parametrize("how", ["cycle()", "next", "same"])
@pytest.mark.parametrize(
    "groups",
    [frozen_but_the_head, only_the_head, no_rate_but_for_the_head],
    ids=lambda f: f.__name__,
)
def test_nothing_to_complement_is_logged_once(how, groups, caplog):
    model = small_model("test_vit")
    with_loss = ModelWithLoss(model)
    optimizer = torch.optim.SGD(groups(model), lr=0.01)
    rdp = ResidualDropPath(model)
    if how != "cycle()":
        rdp.follow(with_loss).attach(optimizer, batch=how)
    for i in range(8):
        for it in rdp.cycle() if how == "cycle()" else [nullcontext()]:
            with it:
                with_loss(*batch("test_vit", start=4 * i)).backward()
                optimizer.step()
                optimizer.zero_grad()
    told = [r.message for r in caplog.records if "nothing to complement" in r.message]
    # The groups of an optimizer are known to attach() alone.
    assert len(told) == (how != "cycle()" or groups is frozen_but_the_head)


@pytest.mark.parametrize("rate", [0.01, 0.0])
def test_a_complement_with_the_learning_rate_of_the_rest_logs_nothing(rate, caplog):
    model = small_model("test_vit")
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)  # 0.0 as a warmup begins
    ResidualDropPath(model).attach(optimizer)
    for i in range(6):
        update(model, optimizer, 4 * i)
    assert not caplog.records


class ModelWithLoss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, targets):
        return nn.functional.cross_entropy(self.model(images), targets)


@pytest.mark.parametrize("how", ["next", "same"])
def test_a_forward_hook_logs_the_losses_of_both_iterations_apart(how):
    """As docs/your_own_script.md says."""
    losses, model = {"droppath": [], "complement": []}, small_model("test_vit")
    with_loss = ModelWithLoss(model)
    optimizer = sgd(model)
    rdp = ResidualDropPath(model).follow(with_loss).attach(optimizer, batch=how)
    with_loss.register_forward_hook(lambda _, __, loss: losses[rdp.phase].append(loss.item()))
    for i in range(6):
        with_loss(*batch("test_vit", start=4 * i)).backward()
        optimizer.step()
        optimizer.zero_grad()

    expected, by_hand = {"droppath": [], "complement": []}, small_model("test_vit")
    rdp, optimizer = ResidualDropPath(by_hand), sgd(by_hand)
    for i in range(6):
        for it in rdp.cycle() if how == "same" else [rdp.iteration()]:
            with it:
                loss = loss_of(by_hand, *batch("test_vit", start=4 * i))
                expected[it.phase].append(loss.item())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    assert losses == expected
    assert all(losses.values())
