"""An overflow under GradScaler skips the step: the same iteration comes again."""

import pytest
import torch
from core_helpers import batch, loss_of, same_bits, small_model

from timm_rdp import ResidualDropPath


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_that_skips_the_step_repeats_the_same_iteration(fused):
    # A fused optimizer is stepped even then, and skips the overflow itself.
    model = small_model("test_vit")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    rdp = ResidualDropPath(model).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    images, labels = batch("test_vit")
    seen = []
    for overflow in (False, True, False, True, True, False, False):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        it = rdp.iteration()
        seen.append((it.cycle, it.phase))
        loss = loss_of(model, images, labels)
        scaler.scale(loss * (float("inf") if overflow else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        after = {n: p.detach() for n, p in model.named_parameters()}
        changed = {n for n in before if not same_bits(before[n], after[n])}
        assert changed == (set() if overflow else it.trainable)
    assert seen[1] == seen[2] and seen[3] == seen[4] == seen[5]
    assert len(set(seen)) == 4
