"""attach(batch="same") is cycle() written out, to the bit, in a loop that stays as it was."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from core_helpers import batch, loss_of, optimizer_state_of, parameters_of, same_bits, small_model
from timm.task import ClassificationTask
from timm.utils import ModelEmaV3
from torch import nn

from timm_rdp import ResidualDropPath

STEPS = 6


class WithLoss(nn.Module):
    """A model that returns its loss, in one of the ways that trainers look for it."""

    def __init__(self, model, kind):
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, images, labels):
        loss = loss_of(self.model, images, labels)
        outputs = {"scalar": loss, "dict": {"loss": loss, "logits": None}, "tuple": (loss, images)}
        if self.kind == "attribute":
            return type("Output", (), {"loss": loss})()
        return outputs[self.kind]


def loss_in(output):
    if isinstance(output, dict):
        return output["loss"]
    if isinstance(output, tuple):
        return output[0]
    return getattr(output, "loss", output)


def clip_gradients(model):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)


def train(
    name="test_vit", kind="dict", attached=False, every=1, accumulate=1, clip=False, autocast=False,
    scaler=None, closure=False, optimizer=torch.optim.AdamW, ema=False, drop_rate=0.0, modes=False,
):  # fmt: skip
    """Train a few steps, by hooks or written out; everything that training left behind."""
    model = small_model(name, drop_rate=drop_rate)
    outer = WithLoss(model, kind)
    optimizer = optimizer(model.parameters(), lr=1e-3)
    rdp = ResidualDropPath(model, every=every)
    if attached:
        rdp.follow(outer)
        rdp.attach(optimizer, batch="same", clip=(lambda: clip_gradients(model)) if clip else None)
    average = ModelEmaV3(model, decay=0.9) if ema else None
    torch.manual_seed(7)

    def backward(step):
        for part in range(accumulate):
            images, labels = batch(name, start=4 * (step * accumulate + part))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = loss_in(outer(images, labels)) / accumulate
            if modes:  # pseudo-labels, say; and a training step that begins with train()
                with torch.no_grad():
                    outer.eval()(images, labels)
                outer.train()
            (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    def update(step):
        if closure:
            optimizer.step(lambda: (optimizer.zero_grad(), backward(step))[1])
            return optimizer.zero_grad()
        backward(step)
        if scaler is not None:
            scaler.unscale_(optimizer)
        if clip:
            clip_gradients(model)
        optimizer.step() if scaler is None else scaler.step(optimizer)
        optimizer.zero_grad()

    phases = []
    for step in range(STEPS):
        if attached:
            update(step)
        else:
            for it in rdp.cycle():
                phases.append(it.phase)
                with it:
                    update(step)
                if scaler is not None:
                    scaler.update()
        if attached and scaler is not None:
            scaler.update()  # scales are powers of two, whose choice changes no bit
        if average is not None:
            average.update(model)
    assert attached or "complement" in phases
    return {
        "parameters": parameters_of(model),
        "optimizer": optimizer_state_of(optimizer, model),
        "rdp": rdp.state_dict(),
        "average": average and parameters_of(average.module),
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"name": "test_resnet"},
        {"every": 2},
        {"accumulate": 3},
        {"clip": True, "accumulate": 2},
        {"autocast": True},
        {"closure": True},
        {"closure": True, "clip": False, "name": "test_resnet"},
        {"optimizer": torch.optim.RMSprop},
        {"ema": True, "drop_rate": 0.3},
        {"kind": "scalar"},
        {"kind": "tuple"},
        {"kind": "attribute"},
        {"modes": True, "accumulate": 2},
        {"modes": True, "closure": True},
    ],
    ids=str,
)
def test_hooks_train_as_the_cycle_written_out(options):
    assert same_bits(train(attached=True, **options), train(**options))


@pytest.mark.parametrize("clip", [False, True])
def test_a_gradient_scaler_is_followed(clip):
    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)

    hooked = train(attached=True, scaler=scaler(), clip=clip)
    assert same_bits(hooked, train(scaler=scaler(), clip=clip))


def test_an_overflow_skips_the_cycle_as_a_whole():
    model = small_model("test_vit")
    outer, optimizer = WithLoss(model, "dict"), torch.optim.SGD(model.parameters(), 1e-3)
    rdp = ResidualDropPath(model).follow(outer).attach(optimizer, batch="same")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = parameters_of(model)
    scaler.scale(outer(*batch("test_vit"))["loss"] * 1e30).backward()
    scaler.step(optimizer)
    scaler.update()
    assert same_bits(before, parameters_of(model))
    assert (rdp.current_cycle, rdp.phase) == (0, "droppath")


def test_timms_task_returns_the_loss():
    def trained(attached):
        model = small_model("test_vit")
        task = ClassificationTask(model, criterion=nn.CrossEntropyLoss(), verbose=False)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        rdp = ResidualDropPath(model)
        if attached:
            rdp.follow(task).attach(optimizer, batch="same")
        for step in range(STEPS):
            for it in [None] if attached else rdp.cycle():
                with it or torch.enable_grad():
                    task(*batch("test_vit", start=4 * step))["loss"].backward()
                    optimizer.step()
                    optimizer.zero_grad()
        return parameters_of(model)

    assert same_bits(trained(True), trained(False))


def test_where_no_loss_is_found_the_step_says_what_to_do():
    model = small_model("test_vit")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    rdp = ResidualDropPath(model).attach(optimizer, batch="same")
    with pytest.raises(RuntimeError, match=r"follow\(\).*closure.*rdp.cycle\(\)"):
        for step in range(STEPS):
            loss_of(model, *batch("test_vit", start=4 * step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(p.requires_grad for p in model.parameters())
    assert rdp._active is None


def test_a_closure_without_the_batches_accumulated_before_is_refused():
    model = small_model("test_vit")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    rdp = ResidualDropPath(model).attach(optimizer, batch="same")

    def backward(start):
        loss = loss_of(model, *batch("test_vit", start=start)) / 2
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"closure.*accumulation.*\"next\".*rdp.cycle\(\)"):
        for step in range(STEPS):  # as Lightning does
            optimizer.zero_grad()
            backward(8 * step)
            optimizer.step(lambda start=8 * step + 4: backward(start))
    assert all(p.requires_grad for p in model.parameters())
    assert rdp._active is None


def test_validation_and_paused_forwards_are_not_repeated():
    def trained(attached):
        model = small_model("test_vit")
        outer, optimizer = WithLoss(model, "dict"), torch.optim.SGD(model.parameters(), 0.01)
        rdp = ResidualDropPath(model)
        if attached:
            rdp.follow(outer).attach(optimizer, batch="same")
        for step in range(STEPS):
            with rdp.pause():
                outer(*batch("test_vit"))
            outer.eval()(*batch("test_vit"))
            outer.train()
            for it in [None] if attached else rdp.cycle():
                with it or torch.enable_grad():
                    outer(*batch("test_vit", start=4 * step))["loss"].backward()
                    optimizer.step()
                    optimizer.zero_grad()
        return parameters_of(model)

    assert same_bits(trained(True), trained(False))


def test_what_an_epoch_left_over_is_not_repeated():
    models = []
    for left_over in (False, True):
        model = small_model("test_vit")
        outer, optimizer = WithLoss(model, "dict"), torch.optim.SGD(model.parameters(), 0.01)
        ResidualDropPath(model).follow(outer).attach(optimizer, batch="same")
        for step in range(4):
            if left_over:
                outer(*batch("test_vit", start=20))["loss"].backward()
                optimizer.zero_grad()
                outer.train()
            outer(*batch("test_vit", start=4 * step))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(parameters_of(model))
    assert same_bits(*models)


def test_calls_of_a_copy_are_not_repeated():
    model = small_model("test_vit")
    outer, optimizer = WithLoss(model, "dict"), torch.optim.SGD(model.parameters(), 0.01)
    rdp = ResidualDropPath(model).follow(outer).attach(optimizer, batch="same")
    outer(*batch("test_vit"))["loss"].backward()
    for twin in (copy.deepcopy(outer), pickle.loads(pickle.dumps(outer))):
        twin(*batch("test_vit", start=4))  # its loss would be looked for in vain
    optimizer.step()
    assert rdp.current_cycle == 1


def test_what_failed_while_it_was_repeated_is_not_repeated_again():
    model = small_model("test_vit")
    outer, optimizer = WithLoss(model, "dict"), torch.optim.SGD(model.parameters(), 0.01)
    rdp = ResidualDropPath(model).follow(outer).attach(optimizer, batch="same")
    seen = []

    def watch(module, args):
        if rdp.phase == "complement":
            seen.append(args[0].sum().item())
            if len(seen) == 1:
                raise MemoryError

    outer.register_forward_pre_hook(watch)
    images, labels = (tensor.clone() for tensor in batch("test_vit"))
    held = weakref.ref(images)
    outer(images, labels)["loss"].backward()
    with pytest.raises(MemoryError):
        optimizer.step()
    optimizer.zero_grad()
    assert rdp.phase == "complement"  # which comes next, on the next batch
    del images
    gc.collect()
    assert held() is None
    for _ in range(2):
        outer(*batch("test_vit", start=4))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = batch("test_vit", start=4)[0].sum().item()
    assert seen[1:] == [expected] * 2 and rdp.current_cycle == 2


def test_inputs_are_let_go_of_and_another_batch_mode_is_refused():
    model = small_model("test_vit")
    outer, optimizer = WithLoss(model, "dict"), torch.optim.SGD(model.parameters(), 0.01)
    with pytest.raises(ValueError, match="batch='both'"):
        ResidualDropPath(model).attach(optimizer, batch="both")
    gc.collect()
    rdp = ResidualDropPath(model).follow(outer).attach(optimizer, batch="same")
    images, labels = (tensor.clone() for tensor in batch("test_vit"))
    held = weakref.ref(images)
    outer(images, labels)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    del images
    gc.collect()
    assert held() is None
    rdp.detach()
