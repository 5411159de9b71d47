"""Gradient checkpointing computes forwards again, and these must see the masks of the first."""

import pytest
import torch
from core_helpers import same_bits
from digits import digit_images
from test_families import FAMILIES, create, first_tensor
from timm.layers import DropPath

from timm_rdp import ResidualDropPath

# Besides one model of each common kind, all in which a DropPath is called more than once and that
# support gradient checkpointing.
MULTIPLE_CALLS = [
    "cait",
    "edgenext",
    "efficientvim",
    "gemma4_vit",
    "mlp_mixer",
    "swiftformer",
    "tnt",
    "visformer",
]
SINGLE_CALLS = ["convnext", "resnet", "swin_transformer", "vision_transformer"]


def run(rdp, images, iteration=None):
    """Loss, gradients and masks of a forward and backward, within an iteration if one is given."""
    model = rdp.model
    model.zero_grad()
    torch.manual_seed(3)
    if iteration is None:
        loss, masks = forward_and_backward(model, images)
    else:
        with iteration:
            loss, masks = forward_and_backward(model, images)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients
    after_backward = all_masks(model)
    assert same_bits(masks, after_backward)  # a recomputation leaves no trace
    return {"loss": loss, "gradients": gradients, "masks": masks}


def all_masks(model):
    return [m.masks for m in model.modules() if isinstance(m, DropPath)]


def forward_and_backward(model, images):
    loss = first_tensor(model(images)).square().mean()
    masks = all_masks(model)
    loss.backward()
    return loss.detach(), masks


@pytest.mark.parametrize("family", SINGLE_CALLS + MULTIPLE_CALLS)
def test_gradient_checkpointing_gives_the_same_gradients_as_without(family):
    name, size, options = FAMILIES[family]
    images = digit_images(3, size)[0].double()
    plain, checkpointed = (
        ResidualDropPath(create(name, {**options, "drop_path_rate": 0.5}), 2, 1, images)
        for _ in range(2)
    )
    more_than_one = {p.name for p in plain.paths if "#" in p.name}
    assert bool(more_than_one) is (family in MULTIPLE_CALLS)
    recomputed = count_recomputations(checkpointed.model)
    checkpointed.model.set_grad_checkpointing(True)

    phases = []
    assert same_bits(run(plain, images), run(checkpointed, images))
    for _ in range(2):
        for it, same_it in zip(plain.cycle(), checkpointed.cycle(), strict=True):
            assert it.dropped == same_it.dropped
            expected = run(plain, images, it)
            assert same_bits(expected, run(checkpointed, images, same_it))
            assert expected["gradients"].keys() <= it.trainable
            phases.append(it.phase)
    assert same_bits(run(plain, images), run(checkpointed, images))
    assert {"droppath", "complement"} == set(phases)
    assert recomputed()


def count_recomputations(model):
    in_backward = []
    for module in model.modules():
        module.register_forward_pre_hook(
            lambda *_: in_backward.append(torch._C._current_graph_task_id() != -1)
        )
    return lambda: any(in_backward)


@pytest.mark.parametrize("family", ["coat", "convit", "sequencer"])
def test_models_left_out_cannot_checkpoint(family):
    name, _, options = FAMILIES[family]
    with pytest.raises(AssertionError, match="gradient checkpointing not supported"):
        create(name, options).set_grad_checkpointing(True)
