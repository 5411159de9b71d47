"""What the tests of compiled models share: training in eager mode and compiled, compared."""

import math

import torch
from core_helpers import batch, buffers_of, changed, loss_of, parameters_of
from timm.layers import DropPath
from torch._dynamo.utils import counters

CYCLES = 20


def graphs():
    return counters["stats"]["unique_graphs"]


def train(
    pair,
    name,
    cycles=CYCLES,
    accumulate=1,
    autocast=False,
    clip=None,
    set_to_none=True,
    channels_last=False,
):
    """Run whole cycles; what each iteration did."""
    model, rdp = pair
    # Momentum and decay move whatever has a gradient, be it zero.
    optimizer = torch.optim.SGD(
        rdp.model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True
    )
    dtype = next(model.parameters()).dtype
    steps = []
    start = 0
    for _ in range(cycles):
        for it in rdp.cycle():
            before, buffers = parameters_of(rdp.model), buffers_of(rdp.model)
            loss = 0.0
            with it:
                for part in range(accumulate):
                    images, labels = batch(name, 8, start + 8 * part)
                    if channels_last:
                        images = images.to(memory_format=torch.channels_last)
                    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                        part_loss = loss_of(model, images.to(dtype), labels) / accumulate
                    part_loss.backward()
                    loss += part_loss.item()
                with_gradient = {n for n, p in rdp.model.named_parameters() if p.grad is not None}
                masks = [m.masks for m in drop_paths(rdp.model)]
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=set_to_none)
            steps.append(
                {
                    "phase": it.phase,
                    "dropped": it.dropped,
                    "trainable": it.trainable,
                    "loss": loss,
                    "with gradient": with_gradient,
                    "trained": changed(before, parameters_of(rdp.model)),
                    "buffers moved": changed(buffers, buffers_of(rdp.model)),
                    "masks": masks,
                }
            )
        start = (start + 8 * accumulate) % 1600
    return steps


def drop_paths(model):
    return [m for m in model.modules() if isinstance(m, DropPath)]


def check_same_training(eager, compiled, tolerance=1e-5, **options):
    """Both do the same: the sets to the last bit, the numbers within tolerance."""
    eager_steps, compiled_steps = train(eager, **options), train(compiled, **options)
    assert graphs() >= 1
    assert len({step["dropped"] for step in eager_steps}) > 5
    assert {step["phase"] for step in eager_steps} == {"droppath", "complement"}
    for ours, theirs in zip(compiled_steps, eager_steps, strict=True):
        assert math.isclose(
            ours.pop("loss"), theirs.pop("loss"), rel_tol=tolerance, abs_tol=tolerance
        )
        assert ours == theirs
        assert ours["trained"] <= ours["trainable"]
    for a, b in zip(eager[1].model.parameters(), compiled[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=10 * tolerance)
    return compiled_steps
