"""What a droppath iteration leaves alone, and the flags that every iteration gives back."""

import contextlib

import pytest
import torch
from core_helpers import (
    batch,
    buffers_of,
    changed,
    loss_of,
    optimizer_state_of,
    parameters_of,
    same_bits,
    small_model,
)
from timm.layers import DropPath
from timm.optim import create_optimizer_v2
from torch import nn

from timm_rdp import ResidualDropPath

WITH_BATCH_NORM = ["test_resnet", "test_byobnet", "mobilenetv3_small_050", "mobilevit_xxs"]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.05)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05)


def update(model, optimizer, name):
    loss = loss_of(model, *batch(name))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def run_cycles(rdp, optimizer, name, cycles):
    for _ in range(cycles):
        for it in rdp.cycle():
            with it:
                update(rdp.model, optimizer, name)


def buffers_beside(parameters, buffers):
    """Names of the buffers whose module owns one of these parameters."""
    modules = {name.rpartition(".")[0] for name in parameters}
    return {name for name in buffers if name.rpartition(".")[0] in modules}


# Rule 2.


@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_dropped_parameters_state_and_batch_norm_statistics_keep_every_bit(name, make_optimizer):
    model = small_model(name)
    rdp = ResidualDropPath(model)
    optimizer = make_optimizer(model)
    run_cycles(rdp, optimizer, name, 2)
    dropped_buffers = 0
    for _ in range(3):
        for it in rdp.cycle():
            before = parameters_of(model), optimizer_state_of(optimizer, model), buffers_of(model)
            with it:
                update(model, optimizer, name)
            after = parameters_of(model), optimizer_state_of(optimizer, model), buffers_of(model)
            parameters, state, buffers = map(changed, before, after)
            if it.phase == "complement":
                # The network in train mode: statistics are no parameters and follow the data.
                assert buffers == before[2].keys()
                continue
            dropped_part = rdp.dropped_part(it.dropped)
            at_rest = buffers_beside(dropped_part, before[2])
            assert parameters == before[0].keys() - dropped_part
            assert state == before[0].keys() - dropped_part
            assert buffers == before[2].keys() - at_rest
            dropped_buffers += len(at_rest)
    assert dropped_buffers > 0


@pytest.mark.parametrize(
    "normalise", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm]
)
def test_dropped_spectral_norms_rest(normalise):
    model = small_model("test_vit")
    for name, module in list(model.named_modules()):
        if name.startswith("blocks.") and isinstance(module, nn.Linear):
            normalise(module)
    rdp = ResidualDropPath(model)
    assert all(path.entrances for path in rdp.paths)
    optimizer = sgd(model)
    dropped_buffers = 0
    for _ in range(4):
        for it in rdp.cycle():
            before = buffers_of(model)
            with it:
                update(model, optimizer, "test_vit")
            branch = lambda path: path.replace("drop_path1", "attn.").replace("drop_path2", "mlp.")
            at_rest = {name for name in before if name.startswith(tuple(map(branch, it.dropped)))}
            if it.phase == "complement":
                at_rest = set()
            assert changed(before, buffers_of(model)) == before.keys() - at_rest
            dropped_buffers += len(at_rest)
    assert dropped_buffers > 0


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "cait_xxs24_224", "mobilevit_xxs"])
def test_what_is_dropped_cannot_be_seen_in_loss_or_gradients(name):
    def first_iteration(poison):
        model = small_model(name)
        rdp = ResidualDropPath(model)
        with rdp.iteration() as it:
            assert it.dropped
            dropped_part = rdp.dropped_part(it.dropped)
            for n, parameter in model.named_parameters():
                if n in dropped_part and poison:
                    parameter.data.fill_(float("nan"))
            torch.manual_seed(5)  # for the DropPaths that are left to timm
            loss = loss_of(model, *batch(name))
            loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert gradients.keys() == it.trainable
        return loss.detach(), gradients

    clean, poisoned = first_iteration(False), first_iteration(True)
    assert torch.isfinite(clean[0])
    assert same_bits(clean, poisoned)


def test_the_complement_iteration_runs_the_network_as_in_inference():
    model = small_model("test_vit")  # it has neither dropout nor batch statistics
    rdp = ResidualDropPath(model)
    images, _ = batch("test_vit")
    phases = []
    for it in rdp.cycle():
        with it:
            output = model(images)
        phases.append(it.phase)
        with torch.no_grad():
            expected = model.eval()(images)
        model.train()
        assert same_bits(output.detach(), expected) is (it.phase == "complement")
    assert phases == ["droppath", "complement"]


# Rule 4.

FROZEN_BY_THE_USER = (
    "patch_embed.proj.weight",
    "blocks.2.",
    "blocks.5.mlp.fc1.weight",
    "head.bias",
)


def vit_with_frozen_parameters():
    model = small_model("test_vit")
    for name, parameter in model.named_parameters():
        if name.startswith(FROZEN_BY_THE_USER):
            parameter.requires_grad_(False)
    return model


def flags_of(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


def modes_of(model):
    return {name: m.training for name, m in model.named_modules()}


@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
def test_what_the_user_froze_never_trains_even_with_stale_gradients(make_optimizer):
    model = vit_with_frozen_parameters()
    flags = flags_of(model)
    rdp = ResidualDropPath(model)
    optimizer = make_optimizer(model)
    start = parameters_of(model)
    trained, dropped = set(), set()
    for _ in range(6):
        for it in rdp.cycle():
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            with it:
                assert not {n for n in it.trainable if n.startswith(FROZEN_BY_THE_USER)}
                assert {n for n, flag in flags_of(model).items() if flag} == it.trainable
                update(model, optimizer, "test_vit")
            assert flags_of(model) == flags
            trained |= it.trainable
            dropped |= it.dropped
    assert any(n.startswith("blocks.2.") for n in dropped)
    assert changed(start, parameters_of(model)) == trained
    assert trained == {n for n, flag in flags.items() if flag}


def test_frozen_by_the_user_between_iterations_counts_at_once():
    model = small_model("test_vit")
    rdp = ResidualDropPath(model)
    optimizer = adamw(model)
    run_cycles(rdp, optimizer, "test_vit", 2)
    model.blocks[4].requires_grad_(False)
    before = parameters_of(model)
    run_cycles(rdp, optimizer, "test_vit", 3)
    moved = changed(before, parameters_of(model))
    assert moved == {n for n in before if not n.startswith("blocks.4.")}
    model.blocks[4].requires_grad_(True)
    run_cycles(rdp, optimizer, "test_vit", 2)
    assert changed(before, parameters_of(model)) == before.keys()


def test_what_the_user_freezes_before_entering_never_trains():
    model = small_model("test_vit")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    it = ResidualDropPath(model).iteration()
    model.head.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = model.head.weight.detach().clone()
    with it:
        loss_of(model, *batch("test_vit")).backward()
        optimizer.step()
    assert same_bits(model.head.weight.detach(), before)
    assert "head.weight" not in it.trainable


ENDINGS = {
    "an error before the backward": ("forward", RuntimeError),
    "an error after the backward": ("backward", ValueError),
    "an interrupt after the optimizer step": ("step", KeyboardInterrupt),
    "an error before anything": ("start", ZeroDivisionError),
}


def interrupted(model, optimizer, name, where, error):
    loss = None
    for stage in ("start", "forward", "backward", "step"):
        if stage == "forward":
            loss = loss_of(model, *batch(name))
        elif stage == "backward":
            loss.backward()
        elif stage == "step":
            optimizer.step()
        if stage == where:
            raise error("in the user's loop")


@pytest.mark.parametrize("phase", ["droppath", "complement"])
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "cait_xxs24_224"])
def test_an_exception_restores_everything_and_the_same_iteration_comes_again(name, ending, phase):
    where, error = ENDINGS[ending]
    model = small_model(name)
    next(model.parameters()).requires_grad_(False)
    flags, modes = flags_of(model), modes_of(model)
    rdp = ResidualDropPath(model)
    optimizer = adamw(model)
    if phase == "complement":
        with rdp.iteration():
            update(model, optimizer, name)
    expected = rdp.iteration()
    assert expected.phase == phase
    state = rdp.state_dict()
    for _ in range(2):
        with pytest.raises(error):
            for it in rdp.cycle():
                with it:
                    interrupted(model, optimizer, name, where, error)
        assert flags_of(model) == flags
        assert modes_of(model) == modes
        assert described(rdp.iteration()) == described(expected)
        after = rdp.state_dict()
        assert {k: after[k] for k in ("cycle", "phase")} == {
            k: state[k] for k in ("cycle", "phase")
        }
    seen = []
    for it in rdp.cycle():
        with it:
            update(model, optimizer, name)
        seen.append(described(it))
    assert seen[0] == described(expected)
    assert flags_of(model) == flags
    assert [s[0] for s in seen] == (
        ["complement"] if phase == "complement" else ["droppath", "complement"]
    )


def described(it):
    return it.phase, it.cycle, it.dropped, it.trainable


def test_leaving_the_loop_by_break_completes_the_iteration_and_keeps_the_place():
    model = small_model("test_vit")
    rdp = ResidualDropPath(model)
    for it in rdp.cycle():
        with it:
            break
    assert all(flags_of(model).values())
    assert (rdp.iteration().phase, rdp.iteration().cycle) == ("complement", 0)
    assert [i.phase for i in _enter_all(rdp.cycle())] == ["complement"]
    assert rdp.iteration().cycle == 1


def _enter_all(iterations):
    for it in iterations:
        with it:
            pass
        yield it


def test_the_optimizer_factory_sees_the_users_flags_between_iterations():
    model = vit_with_frozen_parameters()
    expected = sorted(n for n, flag in flags_of(model).items() if flag)
    rdp = ResidualDropPath(model)
    names = {p: n for n, p in model.named_parameters()}
    for it in _enter_all(rdp.cycle()):
        optimizer = create_optimizer_v2(model, opt="adamw", lr=0.1, weight_decay=0.1)
        held = sorted(names[p] for group in optimizer.param_groups for p in group["params"])
        assert held == expected, it


def test_two_micro_batches_within_an_iteration_share_its_masks_and_their_gradients_add_up():
    name = "cait_xxs24_224"
    model = small_model(name)
    rdp = ResidualDropPath(model)
    images, labels = batch(name, count=8)
    for _ in range(2):
        for it in rdp.cycle():
            sums = {}
            masks = []
            for start in (0, 4):
                part = slice(start, start + 4)
                with pytest.raises(InterruptedError), it:
                    loss_of(model, images[part], labels[part]).backward()
                    for n, p in model.named_parameters():
                        if p.grad is not None:
                            sums[n] = sums.get(n, 0) + p.grad
                    model.zero_grad()
                    raise InterruptedError
            with it:
                for start in (0, 4):
                    part = slice(start, start + 4)
                    loss_of(model, images[part], labels[part]).backward()
                    masks.append([p.module.masks for p in rdp.paths])
                together = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
                assert together.keys() == sums.keys() == it.trainable
                for n in sums:
                    torch.testing.assert_close(together[n], sums[n])
                assert same_bits(*masks)
                model.zero_grad()


@pytest.mark.parametrize("case", ["only the head trains", "the dropped paths carry nothing"])
def test_a_cycle_with_nothing_to_train_ends_without_a_complement_iteration(case):
    model = small_model("test_vit")
    if case == "only the head trains":
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    else:
        model.blocks[5].norm1, model.blocks[5].attn = model.blocks[4].norm1, model.blocks[4].attn
        for module in model.modules():
            if isinstance(module, DropPath):
                module.drop_prob = float(module is model.blocks[4].drop_path1)
    rdp = ResidualDropPath(model)
    optimizer = adamw(model)
    flags = flags_of(model)
    for cycle in range(3):
        phases = []
        for it in rdp.cycle():
            with it:
                update(model, optimizer, "test_vit")
            phases.append(it.phase)
        assert it.dropped
        assert phases == ["droppath"]
        assert rdp.iteration().cycle == cycle + 1
    assert flags_of(model) == flags


def test_train_called_within_an_iteration_does_not_wake_what_is_dropped():
    model = small_model("test_resnet")
    rdp = ResidualDropPath(model)
    with rdp.iteration() as it:
        before = buffers_of(model)
        model.train()  # as many a training step begins
        loss_of(model, *batch("test_resnet")).backward()
    at_rest = buffers_beside(rdp.dropped_part(it.dropped), before)
    assert at_rest
    assert changed(before, buffers_of(model)) == before.keys() - at_rest


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_model_in_part_in_eval_mode_keeps_its_modes(interrupted):
    model = small_model("test_resnet").eval()
    for name, module in model.named_modules():
        if name.startswith(("layer3", "layer4")) or isinstance(module, DropPath):
            module.training = True
    modes = modes_of(model)
    rdp = ResidualDropPath(model)
    optimizer = sgd(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    for _ in range(4):
        for it in rdp.cycle():
            norms = [m for m in model.layer4.modules() if isinstance(m, nn.BatchNorm2d)]
            hooks = [m.register_forward_pre_hook(interrupt) for m in norms if interrupted]
            with contextlib.suppress(KeyboardInterrupt), it:
                update(model, optimizer, "test_resnet")
                assert modes_of(model) == modes
            for hook in hooks:
                hook.remove()
            assert modes_of(model) == modes
            if interrupted:
                with rdp.iteration():
                    update(model, optimizer, "test_resnet")


def test_eval_called_within_an_iteration_stays():
    model = small_model("test_resnet")
    with ResidualDropPath(model).iteration():
        model.eval()
    assert not any(modes_of(model).values())


# Dropped means dropped, frozen means frozen: else an error.


def test_an_iteration_that_was_run_in_eval_mode_is_an_error():
    model = small_model("test_vit").eval()
    rdp = ResidualDropPath(model)
    refused = pytest.raises(RuntimeError, match=r"eval mode: call its train\(\)")
    with refused as error, rdp.iteration() as it:
        assert it.dropped
        update(model, sgd(model), "test_vit")
    assert "\n" not in str(error.value)
    assert rdp.current_cycle == 0
    assert all(p.requires_grad for p in model.parameters())
    with rdp.iteration():
        model(batch("test_vit")[0])  # of a saliency map, say
        update(model.train(), sgd(model), "test_vit")
    assert rdp.phase == "complement"


def test_a_dropped_path_in_eval_mode_among_others_is_an_error():
    model = small_model("test_resnet", drop_path_rate=0.9)
    rdp = ResidualDropPath(model)
    dropped = sorted(rdp.iteration().dropped)
    model.get_submodule(dropped[0].removesuffix(".drop_path")).eval()
    message = rf"^{dropped[0]} is to be dropped.*drop_prob to 0$"
    with pytest.raises(RuntimeError, match=message), rdp.iteration():
        model(batch("test_resnet")[0])
    with rdp.iteration(), torch.no_grad():
        model(batch("test_resnet")[0])
    model.get_submodule(dropped[0]).drop_prob = 0.0
    rdp.load_state_dict({**rdp.state_dict(), "cycle": 0, "phase": "droppath", "dropped": []})
    with rdp.iteration() as it:
        assert dropped[0] not in it.dropped
        update(model, sgd(model), "test_resnet")


class ZerosForNone(torch.optim.SGD):
    """Takes a missing gradient for one of zero, so that momentum and decay move what is frozen."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
        return super().step(closure)


def test_an_interrupted_complement_iteration_raises_no_false_alarm():
    model = small_model("test_vit")
    rdp, optimizer = ResidualDropPath(model), sgd(model)
    start = rdp.state_dict()
    for it in rdp.cycle():
        with contextlib.suppress(KeyboardInterrupt), it:
            if it.phase == "complement":
                raise KeyboardInterrupt
            update(model, optimizer, "test_vit")
        if it.phase == "complement":
            break
    rdp.load_state_dict(start)
    run_cycles(rdp, optimizer, "test_vit", 2)
    assert rdp.current_cycle == 2


@pytest.mark.parametrize("kind", ["LBFGS", "zeros for None"])
def test_an_optimizer_that_moves_what_is_frozen_is_found_in_the_first_complement_iteration(kind):
    model = small_model("test_vit")
    rdp = ResidualDropPath(model)
    if kind == "LBFGS":
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    else:
        optimizer = ZerosForNone(model.parameters(), lr=0.1, momentum=0.9)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, *batch("test_vit"))
        loss.backward()
        return loss

    phases = []
    with pytest.raises(RuntimeError, match="frozen in this iteration") as error:
        for it in rdp.cycle():
            phases.append(it.phase)
            with it:
                closure()
                optimizer.step(closure if kind == "LBFGS" else None)
    assert phases == ["droppath", "complement"]
    assert "without a gradient" in str(error.value)
    assert "\n" not in str(error.value)
