"""Counted floating-point operations."""

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_rdp.study.compare.flops import FlopCounter


def counted(module: nn.Module, x: torch.Tensor) -> int:
    with FlopCounter() as counter:
        module(x).sum().backward()
    return counter.flops


class Apart(nn.Module):
    """A grouped convolution as so many convolutions of a group each."""

    def __init__(self, kind: type[nn.Module], channels: int, groups: int, **kwargs):
        super().__init__()
        share = channels // groups
        self.convs = nn.ModuleList([kind(share, 2 * share, **kwargs) for _ in range(groups)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.chunk(len(self.convs), 1)
        return torch.cat([conv(part) for conv, part in zip(self.convs, parts, strict=True)], 1)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("frozen", [None, "weight", "input"])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_a_grouped_convolution_costs_what_its_groups_cost(kind, frozen, groups):
    kwargs = dict(kernel_size=3, stride=2, padding=1)
    counts = []
    for module in (kind(8, 16, groups=groups, **kwargs), Apart(kind, 8, groups, **kwargs)):
        for parameter in module.parameters():
            parameter.requires_grad_(frozen != "weight")
        counts.append(counted(module, torch.randn(2, 8, 9, 7, requires_grad=frozen != "input")))
    outputs = 2 * 9 * 7 if kind is nn.ConvTranspose2d else 2 * 5 * 4
    passes = 3 if frozen is None else 2
    assert counts == [passes * 2 * outputs * 9 * 8 * 16 // groups] * 2


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_model_without_groups_costs_what_torch_counts(name):
    model = timm.create_model(name, num_classes=10).to("meta")
    images = torch.empty(2, *model.default_cfg["input_size"], device="meta")
    with FlopCounterMode(display=False) as torchs:
        model(images).sum().backward()
    assert counted(model, images) == torchs.get_total_flops()


@pytest.mark.parametrize("name", ["convnext_atto", "efficientnet_b0", "mobilenetv3_small_100"])
def test_a_depthwise_models_backward_costs_twice_its_forward(name):
    model = timm.create_model(name).to("meta")
    images = torch.empty(2, *model.default_cfg["input_size"], device="meta", requires_grad=True)
    with FlopCounter() as forward:
        model(images)
    assert counted(model, images) == pytest.approx(3 * forward.flops, rel=0.01)
