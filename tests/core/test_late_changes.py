"""What comes between the iterations, or from outside, cannot break the rules."""

import pytest
import torch
from core_helpers import batch, loss_of, same_bits, small_model

from timm_rdp import ResidualDropPath


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


@pytest.mark.parametrize("bad", [{"every": "2"}, {"every": 1.5}, {"seed": 1.5}])
def test_a_seed_or_every_that_is_no_whole_number_is_named(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value!r} must be a whole number"):
        ResidualDropPath(small_model("test_vit"), **bad)


@pytest.mark.parametrize("bad", [None, {"phase": "other"}, {"dropped": ["nowhere"]}])
def test_a_state_that_makes_no_sense_is_refused_and_nothing_changes(bad):
    rdp = ResidualDropPath(small_model("test_vit"))
    state = rdp.state_dict()
    with pytest.raises(ValueError, match="state"):
        rdp.load_state_dict(bad and {**state, **bad})
    assert rdp.state_dict() == state
