"""Two networks in one: every second block is trained by complement iterations alone (E3).

    python benchmarks/nested_depth.py --data-dir output/fashion_mnist/few/final --output output/e3

The paths of every second block of a ViT have rate 1, those of the others rate 0. A droppath
iteration then trains the network without these blocks, and a complement iteration trains them on
what the rest computes: nobody but they learns from it. Four variants, for every seed:

nested        the two networks in one; scored with the blocks ("whole") and without ("inner")
alone         the network without the blocks, of the same first weights and batches
full          the whole network, trained the plain way
full-matched  the same, for as many FLOPs as nested

Writes runs.csv, a row a run, as each ends; what is there is not run again. `inner_equals_alone`
says whether every parameter of the inner network has the bits of the one trained alone.
"""

import argparse
import csv
import math
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.datasets import FashionMNIST

from timm_rdp import ResidualDropPath

NETWORK = dict(
    **dict(num_classes=10, in_chans=1, img_size=28, patch_size=7),
    **dict(embed_dim=48, depth=12, num_heads=3, drop_path_rate=0.5),
)
BATCH, LEARNING_RATE, WEIGHT_DECAY = 128, 1e-3, 0.05
# A backward pass costs two forwards: one for the gradients of what comes in, one for those of the
# weights. nested: both passes of half the network; then all of it, weights of half in the backward.
FLOPS_OF_NESTED = (0.5 * 3 + 1 + 1.5) / 3
COLUMNS = ("seed", "variant", "network", "epochs", "top1", "nll", "inner_equals_alone")


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_vit", **NETWORK)


def added(model: nn.Module) -> list[nn.Module]:
    """The blocks that the inner network is without."""
    return list(model.blocks)[1::2]


def nest(model: nn.Module) -> None:
    """Always drop the paths of the added blocks, and never another."""
    for block in model.blocks:
        for path in (block.drop_path1, block.drop_path2):
            if hasattr(path, "drop_prob"):  # the first block has rate 0, and nothing to drop
                path.drop_prob = float(block in added(model))


def without_added(model: nn.Module) -> nn.Module:
    model.blocks = nn.Sequential(*list(model.blocks)[::2])
    return model


def load(data_dir: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28), standardized, and labels (N,)."""
    split = FashionMNIST(str(data_dir), train=train)
    return (split.data[:, None] / 255 - 0.286) / 0.353, split.targets


def batches(images: Tensor, labels: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    for chosen in order.split(BATCH):
        if len(chosen) == BATCH:
            yield images[chosen], labels[chosen]


def train(model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, seed: int) -> None:
    """AdamW, cosine by epoch; a model with rates above 0 is trained as two networks in one."""
    nested = any(getattr(m, "drop_prob", 0) for m in model.modules())
    rdp = ResidualDropPath(model, seed, example_input=data[0][:1]) if nested else None
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    model.train()
    for epoch in range(epochs):
        rate = LEARNING_RATE * (1 + math.cos(math.pi * epoch / epochs)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        for images, labels in batches(*data, seed=seed * 1000 + epoch):
            if rdp is None:
                step(model, images, labels, optimizer)
                continue
            for it in rdp.cycle():
                with it:
                    step(model, images, labels, optimizer)
    if rdp is not None:
        rdp.detach()


def step(
    model: nn.Module, images: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer
) -> None:
    loss = cross_entropy(model(images), labels)
    if not loss.isfinite():
        raise FloatingPointError("the loss is not finite")
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def score(model: nn.Module, data: tuple[Tensor, Tensor]) -> dict[str, float]:
    model.eval()
    logits = torch.cat([model(images) for images in data[0].split(1000)])
    top1 = (logits.argmax(1) == data[1]).double().mean().item()
    return {"top1": round(100 * top1, 2), "nll": round(cross_entropy(logits, data[1]).item(), 5)}


def run(seed: int, epochs: int, data_dir: Path) -> Iterator[dict]:
    """The rows of one seed."""
    training, test = load(data_dir, train=True), load(data_dir, train=False)
    matched = round(epochs * FLOPS_OF_NESTED)

    alone = without_added(network(seed))
    for path in alone.modules():
        if hasattr(path, "drop_prob"):
            path.drop_prob = 0.0
    train(alone, training, epochs, seed)
    yield dict(variant="alone", network="inner", epochs=epochs, **score(alone, test))

    model = network(seed)
    nest(model)
    train(model, training, epochs, seed)
    yield dict(variant="nested", network="whole", epochs=epochs, **score(model, test))
    inner = without_added(model).state_dict()
    same = all(torch.equal(value, inner[name]) for name, value in alone.state_dict().items())
    same = same and inner.keys() == alone.state_dict().keys()
    scores = dict(**score(model, test), inner_equals_alone=same)
    yield dict(variant="nested", network="inner", epochs=epochs, **scores)

    for variant, count in (("full", epochs), ("full-matched", matched)):
        model = network(seed)
        for path in model.modules():
            if hasattr(path, "drop_prob"):
                path.drop_prob = 0.0
        train(model, training, count, seed)
        yield dict(variant=variant, network="whole", epochs=count, **score(model, test))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder for runs.csv")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=0)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    table = args.output / "runs.csv"
    done = set()
    if table.exists():
        with table.open(newline="") as file:
            done = {int(row["seed"]) for row in csv.DictReader(file)}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        if seed in done:
            continue
        rows = list(run(seed, args.epochs, args.data_dir))
        new = not table.exists()
        with table.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerows({"seed": seed, **row} for row in rows)
        for row in rows:
            print(seed, *row.values(), flush=True)


if __name__ == "__main__":
    main()
