"""Frozen means bitwise unchanged, for every optimizer that timm can create."""

import contextlib
import warnings
from dataclasses import dataclass

import pytest
import torch
from core_helpers import (
    batch,
    changed,
    loss_of,
    optimizer_state_of,
    parameters_of,
    small_model,
)
from timm.models import model_parameters
from timm.optim import create_optimizer_v2, list_optimizers
from timm.utils import ModelEmaV3, NativeScaler, dispatch_clip_grad
from torch.nn.attention import SDPBackend, sdpa_kernel

from timm_rdp import ResidualDropPath

# What cannot run on the CPU, and why.
NEEDS_CUDA = {
    "bnb": "bitsandbytes' 8-bit kernels are CUDA code, and timm refuses them without CUDA",
    "fused": "apex's fused kernels are CUDA code, and timm refuses them without CUDA",
}
OPTIMIZERS = [n for n in list_optimizers() if not n.startswith(tuple(NEEDS_CUDA))]
# Small also because kron's einsums over the patch embedding grow with the fourth power of its size.
TINY = {"depth": 3, "embed_dim": 16, "patch_size": 8}


@pytest.mark.parametrize("name", [n for n in list_optimizers() if n not in OPTIMIZERS])
def test_optimizers_left_out_cannot_be_created_here(name):
    if torch.cuda.is_available():
        pytest.skip("these run on CUDA")
    with pytest.raises(
        (AssertionError, ImportError, RuntimeError), match=r"CUDA|bitsandbytes|apex"
    ):
        create_optimizer_v2(small_model("test_vit"), opt=name, lr=0.01, weight_decay=0.05)


def make_optimizer(model, name):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*opt_einsum.*")  # kron's advice
        return create_optimizer_v2(model, opt=name, lr=0.01, weight_decay=0.05)


def backward(optimizer, loss):
    if not getattr(optimizer, "is_second_order", False):
        loss.backward()
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*create_graph=True.*")  # as timm's own loop does it
        loss.backward(create_graph=True)


@contextlib.contextmanager
def what_the_optimizer_needs(name):
    with contextlib.ExitStack() as stack:
        if name.startswith("kron"):
            # It compiles its arithmetic anew for every shape: minutes, for the same numbers.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if name == "adahessian":  # fused attention has no second derivative
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def state_of(model, optimizer):
    return {
        "parameters": parameters_of(model),
        "optimizer state": optimizer_state_of(optimizer, model),
    }


def check_cycle(rdp, optimizer, train):
    """Run one cycle; what it does not train keeps every bit, what it trains changes.

    Returns the phases of its iterations.
    """
    model = rdp.model
    phases = []
    for it in rdp.cycle():
        before = state_of(model, optimizer)
        with it:
            train()
        after = state_of(model, optimizer)
        moved = {part: changed(before[part], after[part]) for part in before}
        everything = set(before["parameters"])
        carried = rdp.dropped_part(it.dropped)
        should_train = carried if it.phase == "complement" else everything - carried
        assert it.trainable == should_train
        assert moved["parameters"] <= should_train
        assert moved["optimizer state"] <= should_train
        assert_trained(should_train, moved["parameters"])
        phases.append(it.phase)
    return phases


def assert_trained(should_train, moved):
    # A sign, a trust ratio or a missing statistic may leave single parameters where they are.
    assert len(moved) >= 0.8 * len(should_train)


@pytest.mark.parametrize("set_to_none", [True, False], ids=["none", "zero"])
@pytest.mark.parametrize("name", [*OPTIMIZERS, "lookahead_adamw"])
def test_frozen_parameters_and_their_optimizer_state_keep_every_bit(name, set_to_none):
    model = small_model("test_vit", **TINY)
    rdp = ResidualDropPath(model, seed=1)
    optimizer = make_optimizer(model, name)
    images, labels = batch("test_vit")

    def train():
        backward(optimizer, loss_of(model, images, labels))
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)

    phases = []
    with what_the_optimizer_needs(name):
        for _ in range(2):  # momentum and statistics of every parameter
            for it in rdp.cycle():
                with it:
                    train()
        assert all(optimizer_state_of(optimizer, model).values()) or name in ("sgd", "sgdw")
        for _ in range(4):
            phases += check_cycle(rdp, optimizer, train)
    assert phases.count("complement") >= 2
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_lookaheads_step_to_its_slow_weights_leaves_frozen_parameters_alone():
    model = small_model("test_vit", **TINY)
    rdp = ResidualDropPath(model, seed=1)
    optimizer = make_optimizer(model, "lookahead_adamw")
    for group in optimizer.param_groups:
        group["lookahead_k"] = 1  # at every step

    def train():
        loss_of(model, *batch("test_vit")).backward()
        optimizer.step()
        optimizer.zero_grad()

    phases = [phase for _ in range(6) for phase in check_cycle(rdp, optimizer, train)]
    assert phases.count("complement") >= 2


# What a training loop may do between the forward and the end of the iteration.


@dataclass
class Loop:
    """One update of a user's loop, with everything that it has switched on."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    clip_mode: str | None = None
    clip: float = 0.05
    accumulate: int = 1
    autocast: bool = False
    scaler: NativeScaler | None = None
    ema: ModelEmaV3 | None = None
    name: str = "test_vit"
    updates: int = 0

    def __call__(self):
        for i in range(self.accumulate):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                loss = loss_of(self.model, *batch(self.name, start=4 * (self.updates + i)))
            self.last = i == self.accumulate - 1
            self.backward(loss / self.accumulate)
        if self.scaler is None:
            if self.clip_mode is not None:
                dispatch_clip_grad(self.clipped(), self.clip, mode=self.clip_mode)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.updates += self.accumulate
        if self.ema is not None:
            self.ema.update(self.model, step=self.updates)

    def clipped(self):
        return model_parameters(self.model, exclude_head=self.clip_mode == "agc")

    def backward(self, loss):
        if self.scaler is None:
            loss.backward()
            return
        self.scaler(
            loss,
            self.optimizer,
            clip_grad=None if self.clip_mode is None else self.clip,
            clip_mode=self.clip_mode or "norm",
            parameters=self.clipped(),
            need_update=self.last,
        )


LOOPS = {
    "clip by norm": {"clip_mode": "norm"},
    "clip by value": {"clip_mode": "value", "clip": 1e-3},
    "adaptive clip": {"clip_mode": "agc"},
    "accumulation": {"accumulate": 3},
    "bf16 autocast": {"autocast": True},
    "grad scaler": {"scaler": NativeScaler(device="cpu"), "autocast": True},
    "ema": {"ema": True},
    "all together": {
        "clip_mode": "norm",
        "accumulate": 2,
        "autocast": True,
        "scaler": NativeScaler(device="cpu"),
        "ema": True,
    },
}


@pytest.mark.parametrize("optimizer_name", ["sgd", "adamw", "lamb"])
@pytest.mark.parametrize("loop", LOOPS)
def test_frozen_keeps_every_bit_whatever_else_the_loop_does(loop, optimizer_name):
    model = small_model("test_vit")
    options = dict(LOOPS[loop])
    rdp = ResidualDropPath(model, seed=1)
    if options.get("ema"):
        options["ema"] = ModelEmaV3(model, decay=0.5)
    optimizer = make_optimizer(model, optimizer_name)
    train = Loop(model, optimizer, **options)
    for _ in range(2):
        for it in rdp.cycle():
            with it:
                train()
    phases = []
    for _ in range(3):
        average = parameters_of(train.ema.module) if train.ema else None
        phases += check_cycle(rdp, optimizer, train)
        if train.ema:
            assert changed(average, parameters_of(train.ema.module)) == set(average)
    assert phases.count("complement") >= 2


def test_with_adamw_all_that_should_train_moves():
    model = small_model("test_vit")
    rdp = ResidualDropPath(model, seed=1)
    optimizer = make_optimizer(model, "adamw")
    phases = set()
    for _ in range(4):
        for it in rdp.cycle():
            before = parameters_of(model)
            with it:
                Loop(model, optimizer)()
            assert changed(before, parameters_of(model)) == it.trainable
            phases.add(it.phase)
    assert phases == {"droppath", "complement"}


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_clipping_norms_see_only_what_is_trained(name):
    model = small_model(name)
    rdp = ResidualDropPath(model, seed=1)
    parameters = dict(model.named_parameters())
    seen = set()
    for _ in range(4):
        for it in rdp.cycle():
            for parameter in parameters.values():  # stale, and large
                parameter.grad = torch.full_like(parameter, 1e6)
            with it:
                model.zero_grad(set_to_none=False)
                for n in parameters.keys() - it.trainable:
                    assert parameters[n].grad is None
                loss = loss_of(model, *batch(name))
                trained = sorted(it.trainable)
                alone = torch.autograd.grad(
                    loss, [parameters[n] for n in trained], retain_graph=True
                )
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
                assert norm.item() == pytest.approx(
                    torch.stack([g.norm() for g in alone]).norm().item(), rel=1e-5
                )
                assert all(p.grad is None for n, p in parameters.items() if n not in trained)
            seen.add(it.phase)
    assert seen == {"droppath", "complement"}
