"""ResidualDroppath in fastai: `Learner(..., cbs=RDPCallback())`."""

from typing import Any

import torch
from fastai.callback.core import Callback  # pyright: ignore
from fastai.callback.training import GradientClip  # pyright: ignore
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from timm_rdp.callbacks import TrainsWithRDP
from timm_rdp.core.checks import unwrap


class RDPCallback(TrainsWithRDP, Callback):  # pyright: ignore
    """Trains a Learner's model, in every fit; the learning rate finder leaves no trace.

    `learn.save()` does not know of callbacks: keep `learn.rdp.state_dict()` beside its file.
    """

    learn: Any
    order = -5  # the loss is noted before other callbacks scale it
    _hooked: Any = None  # fastai's own optimizer

    def before_fit(self) -> None:
        """Clear away what an exception left over."""
        self.detach()

    def before_train(self) -> None:
        """Patch the model and attach to the optimizer, when others have wrapped them."""
        if self.controller is None:
            model, optimizer = self.learn.model, self.learn.opt
            if not hasattr(optimizer, "opt"):
                optimizer = self._hooked = _Hooked(optimizer)
            self._attach(unwrap(model), model, optimizer, self._clip, self._again)

    def after_loss(self) -> None:
        """Note what the loss was computed from."""
        loop = None if self.controller is None else self.controller._loop
        if loop is not None and loop._same is not None and loop._is_noted():
            loop._same._module = _Loss(self.learn)
            loop._same._note((self.xb, self.yb), {}, self.learn.loss_grad)
            # Others scale it in place, and fastai's tensors are views, which lose hooks by that.
            self.learn.loss_grad = self.learn.loss_grad.clone()

    def _again(self) -> None:
        self.controller._loop._same._repeat()  # pyright: ignore
        scaler = getattr(self.learn, "scaler", None)  # MixedPrecision's, which has unscaled before
        if scaler is not None and scaler.is_enabled():
            gradients = [p.grad for p in self.learn.model.parameters() if p.grad is not None]
            torch._foreach_div_(gradients, scaler.get_scale())
            if not all(bool(g.isfinite().all()) for g in gradients):
                self.learn.model.zero_grad()  # an overflow: the step finds nothing to do

    def _clip(self) -> None:
        for clip in (c for c in self.learn.cbs if isinstance(c, GradientClip)):
            clip_grad_norm_(self.learn.model.parameters(), clip.max_norm, clip.norm_type)

    def after_fit(self) -> None:
        """Give the model back."""
        before = self._state
        self.detach()
        if hasattr(self.learn, "lr_finder"):
            self._state = before

    def detach(self) -> None:
        """Give the model back, also after an exception, which fastai does not report."""
        if self._hooked is not None:
            del self._hooked._own.step
            self._hooked = None
        super().detach()


class _Loss(nn.Module):
    def __init__(self, learn: Any):
        super().__init__()
        self.model, self.loss_func = learn.model, learn.loss_func

    def forward(self, inputs: tuple, targets: tuple) -> Tensor:
        return self.loss_func(self.model(*inputs), *targets)


class _Hooked(torch.optim.Optimizer):
    """fastai's own optimizer as one of torch, with hooks that run after each step."""

    def __init__(self, own: Any):
        super().__init__(own.param_groups, {})
        self._own, self._run = own, own.step
        own.step = self.step

    def step(self, *_: Any) -> None:
        self._run()
