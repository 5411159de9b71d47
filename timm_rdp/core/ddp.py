"""Gradients of one iteration, averaged over the ranks of DistributedDataParallel."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class GradientReducer:
    """Averages the gradients of the parameters that an iteration trains, and of no others.

    DistributedDataParallel settles what it reduces when it is built, so it cannot follow flags
    that change with every iteration. Within an iteration it is therefore told not to synchronise,
    and the gradients are reduced here the way it does it: in buckets, in the order in which the
    backward pass makes them, while it goes on.

    Args:
        ddp: the wrapper whose process group, buffers and `no_sync()` are followed.
        parameters: the parameters of the module inside, by name.

    Raises:
        ValueError: the wrapper has a communication hook or a static graph.
    """

    def __init__(self, ddp: DistributedDataParallel, parameters: dict[str, nn.Parameter]):
        if ddp.static_graph:
            raise ValueError(
                "DistributedDataParallel was built with static_graph=True, but the graph changes "
                "with every iteration: leave it out"
            )
        if ddp._comm_hooks:
            raise ValueError(
                "DistributedDataParallel has a communication hook, which ResidualDroppath would "
                "not run: do not register one"
            )
        self._ddp = ddp
        self._group: Any = ddp.process_group
        self._names: dict[Tensor, str] = {p: n for n, p in reversed(parameters.items())}
        self._others: list[Tensor] = []
        self._buckets: list[list[Tensor]] = []
        self._bucket_of: dict[Tensor, int] = {}
        self._waiting: list[int] = []
        self._launched: list[tuple[Any, Tensor, list[Tensor]]] = []
        self._armed = False
        self._running = False
        self._handles = [
            ddp.register_forward_pre_hook(self._before_forward),
            ddp.register_forward_hook(self._after_forward, always_call=True),
        ]
        self._synchronise = True

    def remove(self) -> None:
        """Take the hooks off the wrapper."""
        for handle in self._handles:
            handle.remove()

    def begin(self, trainable: frozenset[str], reached: frozenset[str]) -> None:
        """Reduce, from the next backward pass on, the gradients of an iteration.

        Args:
            trainable: names of the parameters that it trains.
            reached: those that get a gradient in every backward pass. Any others get one where the
                loss uses them directly, as CLIP's does its temperature.
        """
        mine = {p: n for p, n in self._names.items() if n in trainable}
        reduced: list[Tensor] = [p for p, name in mine.items() if name in reached]
        self._others = [p for p, name in mine.items() if name not in reached]
        # As in DistributedDataParallel, a small first bucket starts communication early.
        limits = [1024 * 1024, self._ddp.bucket_bytes_cap]
        assign = dist._compute_bucket_assignment_by_size  # pyright: ignore
        buckets = assign(reduced, limits)[0] if reduced else []
        self._buckets = [[reduced[i] for i in bucket] for bucket in buckets]
        self._bucket_of = {p: i for i, bucket in enumerate(self._buckets) for p in bucket}
        self._armed = True

    def end(self) -> None:
        """Leave the gradients of further backward passes to DistributedDataParallel again."""
        self._armed = self._running = False
        self._launched = []

    def ready(self, parameter: nn.Parameter) -> None:
        """Note that the backward pass has finished with this parameter's gradient."""
        if not (self._armed and self._synchronise):
            return
        if not self._running:
            self._running = True
            self._waiting = [len(bucket) for bucket in self._buckets]
            self._launched = []
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        if parameter in self._bucket_of:
            self._waiting[self._bucket_of[parameter]] -= 1
            # All ranks must launch in one order, whatever order their buckets get ready in.
            while (n := len(self._launched)) < len(self._buckets) and not self._waiting[n]:
                self._launch(self._buckets[n])

    def _launch(self, bucket: list[Tensor]) -> None:
        gradients = [p.grad.flatten() for p in bucket if p.grad is not None]
        flat = torch.cat(gradients).div_(self._group.size())
        work = dist.all_reduce(flat, group=self._group, async_op=True)
        self._launched.append((work, flat, bucket))

    def _finish(self) -> None:
        """End of the backward pass: write the averages back."""
        self._running = False
        if len(self._launched) < len(self._buckets):
            bucket = self._buckets[len(self._launched)]
            name = next((self._names[p] for p in bucket if p.grad is None), self._names[bucket[0]])
            raise RuntimeError(
                f"parameter {name} got no gradient in this backward pass, though the model's graph "
                "reaches it: build the loss from the output of the whole model"
            )
        if self._others:
            # Those of them that got a gradient on any rank; its average counts none as zero.
            got = torch.tensor([p.grad is not None for p in self._others], dtype=torch.uint8)
            got = got.to(self._others[0].device)
            dist.all_reduce(got, dist.ReduceOp.MAX, group=self._group)
            for parameter, reduce in zip(self._others, got.tolist(), strict=True):
                if reduce:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    self._launch([parameter])
        for work, flat, bucket in self._launched:
            work.wait()
            parts = flat.split([p.numel() for p in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                assert parameter.grad is not None
                parameter.grad.copy_(part.view_as(parameter.grad))
        self._launched = []

    def _before_forward(self, *_: object) -> None:
        if self._armed and torch.is_grad_enabled():
            # False within no_sync(): gradients accumulate until a backward pass synchronises.
            self._synchronise = self._ddp.require_backward_grad_sync
            self._ddp.require_backward_grad_sync = False

    def _after_forward(self, *_: object) -> None:
        if self._armed and torch.is_grad_enabled():
            self._ddp.require_backward_grad_sync = self._synchronise
            # Buffers are broadcast before each forward that follows a synchronised one, complement
            # iterations among them: what is frozen stays in train mode there, so its BatchNorms go
            # on counting on each rank, and other buffers (spectral norm's) enter the outputs.
            self._ddp.require_forward_param_sync = self._synchronise


def check_same_on_all_ranks(ddp: DistributedDataParallel, what: dict) -> None:
    """Compare what determines the masks between ranks.

    Raises:
        ValueError: ranks differ, with the first thing in which they do.
    """
    everyone: list = [None] * dist.get_world_size(ddp.process_group)
    dist.all_gather_object(everyone, what, group=ddp.process_group)
    for key in what:
        values = {repr(w[key]) for w in everyone}
        if len(values) > 1:
            shown = " and ".join(sorted(v[:60] for v in values)[:2])
            raise ValueError(
                f"ranks differ in the {key} of ResidualDropPath: {shown}; give all the same"
            )
