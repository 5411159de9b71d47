"""timm_rdp.fastai.RDPCallback: a Learner runs the iterations of the method."""

import functools
import pickle
import warnings

import pytest
import torch
from core_helpers import parameters_of, same_bits, small_model
from trained import Iterations, adamw, loader, written_out

with warnings.catch_warnings():  # fastai has deprecated calls of torch at its top
    warnings.simplefilter("ignore")
    pytest.importorskip("fastai.basics", reason='needs the extra "clients"')
from fastai.basics import (
    SGD,
    Callback,
    CrossEntropyLossFlat,
    DataLoaders,
    Learner,
    OptimWrapper,
)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import LRFinder
from fastai.callback.training import GradientAccumulation, GradientClip

from timm_rdp.fastai import RDPCallback

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

WRAPPED = functools.partial(OptimWrapper, opt=torch.optim.AdamW)
OWN = functools.partial(SGD, mom=0.9)  # fastai's own, which is no optimizer of torch


def learner(*callbacks, opt_func=WRAPPED, **options):
    batches = DataLoaders(loader(), loader(8), device="cpu")
    return Learner(
        batches,
        small_model("test_vit"),
        loss_func=CrossEntropyLossFlat(),
        opt_func=opt_func,
        lr=1e-3,
        cbs=[*callbacks],
        **{"wd": 0.1, "wd_bn_bias": True, "train_bn": False, **options},
    )


def fit(learn, epochs=2):
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs)
    return parameters_of(learn.model)


def fastai_sgd(model):
    """fastai's, in a loop that is written out: its zero_grad() leaves zeros."""
    return SGD([*model.parameters()], lr=1e-3, mom=0.9, wd=0.1, decouple_wd=True)


@pytest.mark.parametrize("how", ["same", "next"])
@pytest.mark.parametrize("opt_func, by_hand", [(WRAPPED, adamw), (OWN, fastai_sgd)])
def test_every_step_of_the_learner_is_the_iterations_of_the_method(
    monkeypatch, how, opt_func, by_hand
):
    iterations = Iterations(monkeypatch)
    learn = learner(RDPCallback(how), opt_func=opt_func)
    weights = fit(learn)
    assert learn.train_iter == 10
    assert iterations.are_those_of(10, how)
    assert same_bits(weights, written_out(10, how, optimizer=by_hand))


@pytest.mark.parametrize("how", ["same", "next"])
def test_accumulation_and_the_learners_clipping_are_followed(how):
    # Its GradientAccumulation divides by 20 / 4 and counts 20 images.
    callbacks = [GradientAccumulation(20), GradientClip(0.3)]
    weights = fit(learner(RDPCallback(how), *callbacks), 4)
    expected = written_out(4, how, accumulate=5, clip=0.3)
    assert same_bits(weights, expected)
    assert not same_bits(expected, written_out(4, how, accumulate=5))


class OnCPU(MixedPrecision):
    """Which has a scaler for CUDA alone."""

    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast("cpu", torch.bfloat16)
        self.learn.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_mixed_precisions_autocast_and_scale_hold_in_complement_iterations():
    # Plain SGD, to which a gradient that is too large by its scale is not the same. Scales are
    # powers of two, which change no bit.
    sgd = functools.partial(OptimWrapper, opt=torch.optim.SGD)
    scaled = fit(learner(RDPCallback(), OnCPU(), opt_func=sgd))

    class Unscaled(OnCPU):
        def before_fit(self):
            super().before_fit()
            self.learn.scaler = torch.amp.GradScaler("cpu", enabled=False)

    assert same_bits(scaled, fit(learner(RDPCallback(), Unscaled(), opt_func=sgd)))
    assert not same_bits(scaled, fit(learner(RDPCallback(), opt_func=sgd)))


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_an_overflow_skips_the_step_and_the_iterations_of_it(monkeypatch):
    class Overflows(Callback):
        def after_backward(self):
            if self.train_iter == 3:
                next(self.model.parameters()).grad.fill_(float("inf"))

    iterations = Iterations(monkeypatch)
    fit(learner(RDPCallback(), OnCPU(), Overflows()))
    assert iterations.are_those_of(9, "same")


@pytest.mark.parametrize("how", ["same", "next"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, how):
    whole = learner(RDPCallback(how), path=tmp_path)
    fit(whole, 1)
    whole.save("half")
    state = pickle.loads(pickle.dumps(whole.rdp.state_dict()))
    assert state["phase"] == ("complement" if how == "next" else "droppath")
    expected = fit(whole, 1)
    callback = RDPCallback(how)
    resumed = learner(callback, path=tmp_path)
    resumed.create_opt()
    resumed.load("half")
    callback.load_state_dict(state)
    assert same_bits(fit(resumed, 1), expected)


@pytest.mark.parametrize("opt_func", [WRAPPED, OWN])
@pytest.mark.parametrize("call", [2, 3])
def test_an_exception_leaves_nothing_behind_after_detach_or_the_next_fit(call, opt_func):
    callback = RDPCallback()
    learn = learner(callback, opt_func=opt_func)
    loss, calls = learn.loss_func, []

    def fails(*args):
        calls.append(1)
        if len(calls) == call:  # 2: of a complement iteration
            raise ArithmeticError("once")
        return loss(*args)

    learn.loss_func = fails
    with pytest.raises(ArithmeticError, match="once"):
        fit(learn)
    callback.detach()
    assert "step" not in vars(learn.opt)
    for module, other in zip(learn.model.modules(), small_model("test_vit").modules(), strict=True):
        assert type(module) is type(other)
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(p.requires_grad for p in learn.model.parameters())
    fit(learn)
    assert callback.controller is None


def test_the_learning_rate_finder_leaves_the_cycles_where_they_stood(tmp_path):
    callback = RDPCallback()
    learn = learner(callback, path=tmp_path)
    before = parameters_of(learn.model)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, cbs=LRFinder(1e-5, 1e-3, 7))
    assert same_bits(before, parameters_of(learn.model))
    assert callback.state_dict() == {}
    assert same_bits(fit(learn), written_out(10, "same"))


def test_a_loss_that_another_callback_replaced_is_an_error_in_the_step():
    class Replaces(Callback):
        def after_loss(self):
            if self.training:
                self.learn.loss_grad = self.model(*self.xb).square().mean()

    with pytest.raises(RuntimeError, match=r"that backward\(\) went through") as error:
        fit(learner(RDPCallback(), Replaces()))
    assert "\n" not in str(error.value)
    fit(learner(RDPCallback("next"), Replaces()))


def test_what_cannot_be_trained_so_is_refused_in_one_line():
    with pytest.raises(ValueError, match='"next" or "same"'):
        RDPCallback("other")
    opt_func = functools.partial(OptimWrapper, opt=torch.optim.LBFGS)
    learn = learner(RDPCallback(), opt_func=opt_func, wd=None)
    with pytest.raises(ValueError) as error:
        fit(learn)
    # fastai puts a line of its own before it.
    event, message = str(error.value).split("\n")
    assert "RDPCallback" in event and "LBFGS" in message
