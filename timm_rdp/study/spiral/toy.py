"""The paper's toy: two spirals, and a residual network of linear layers that tells them apart."""

import math
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath, calculate_drop_path_rates
from torch import Tensor, nn

import timm_rdp

VARIANTS = ("plain", "droppath", "rdp")
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh, "none": nn.Identity}


def two_spirals(points: int, noise: float, turns: float, seed: int) -> tuple[Tensor, Tensor]:
    """Two interleaved spirals of radius 1, one a class: (points, 2), and classes, 0 and 1 in turn.

    `noise` is the standard deviation of what is added to each coordinate, `turns` is how often each
    spiral winds around the centre.
    """
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(points) % 2
    # The square root spreads the points evenly along the arms.
    t = torch.rand(points, generator=generator).sqrt()
    angle = 2 * math.pi * turns * t + math.pi * label
    xy = torch.stack([t * angle.cos(), t * angle.sin()], dim=1)
    return xy + noise * torch.randn(points, 2, generator=generator), label


def playground_spirals(
    points: int, noise: float, turns: float, seed: int
) -> tuple[tuple[Tensor, Tensor], ...]:
    """TensorFlow Playground's two spirals, twice as many points, shuffled, as two halves.

    The radius grows evenly to 5; what is added to each coordinate is uniform, up to `noise`.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(2 * points, generator=generator)
    label, t = order % 2, order // 2 / points
    angle = 2 * math.pi * turns * t + math.pi * label
    xy = 5 * torch.stack([t * angle.sin(), t * angle.cos()], dim=1)
    xy += noise * (2 * torch.rand(2 * points, 2, generator=generator) - 1)
    return tuple(zip(xy.chunk(2), label.chunk(2), strict=True))


class ToyNet(nn.Module):
    """Embedding to `dim`, `depth` residual linear layers with an activation, a linear classifier.

    Rates of DropPath rise linearly from 0 to `drop_path`, as in timm.
    """

    def __init__(self, depth: int, dim: int, drop_path: float = 0.0, activation: str = "gelu"):
        super().__init__()
        self.embed = nn.Linear(2, dim)
        self.layers = nn.ModuleList()
        rates: Any = calculate_drop_path_rates(drop_path, depth)
        for rate in rates:
            path = {"linear": nn.Linear(dim, dim), "act": ACTIVATIONS[activation]()}
            path["drop_path"] = DropPath(rate) if rate > 0 else nn.Identity()
            self.layers.append(nn.Sequential(OrderedDict(path)))
        self.head = nn.Linear(dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)["blocks"][-1])

    def features(self, x: Tensor) -> dict[str, list[Tensor]]:
        """Features of every layer, each (samples, dim): of "paths" and of "blocks".

        The former are what each layer's path adds, the latter the embedding, and then the sum after
        each residual connection.
        """
        paths, blocks = [], [self.embed(x)]
        for layer in self.layers:
            paths.append(layer(blocks[-1]))
            blocks.append(blocks[-1] + paths[-1])
        return {"paths": paths, "blocks": blocks}


def accuracy(model: ToyNet, data: tuple[Tensor, Tensor]) -> float:
    """Share of the points, (coordinates, classes), that the network tells right."""
    return (model(data[0]).argmax(1) == data[1]).float().mean().item()


def train(
    variant: str,
    data: tuple[Tensor, Tensor],
    *,
    steps: int,
    lr: float,
    drop_path: float,
    seed: int,
    watch: Callable[[int, ToyNet], None] = lambda step, model: None,
    **network: Any,
) -> ToyNet:
    """Train one toy network on all points at once, with AdamW and a cosine schedule.

    Args:
        variant: "droppath" (timm's), "rdp" (one full cycle a step), or any other (no DropPath).
        steps: batches. Under RDP each is a droppath and a complement iteration, `same` batches.
        seed: of the weights, of timm's DropPath and of RDP's masks.
        watch: called as watch(step, model) before every step and after the last.
        network: depth, dim and activation of the `ToyNet`.
    """
    x, y = data
    torch.manual_seed(seed)
    model = ToyNet(drop_path=drop_path if variant in VARIANTS[1:] else 0.0, **network).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    rdp = None
    if variant == "rdp":
        rdp = timm_rdp.ResidualDropPath(model, seed=seed, example_input=x[:2])
    for step in range(steps):
        watch(step, model)
        for iteration in rdp.cycle() if rdp else [nullcontext()]:
            with iteration:
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        schedule.step()
    watch(steps, model)
    if rdp:
        rdp.detach()
    return model.eval()
