"""One cycle equals, bit for bit, the same cycle written out in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from core_helpers import batch, same_bits, small_model

from timm_rdp import ResidualDropPath

RATE = 0.5  # drop_path_rate of the models


def layer_norm(p, name, x):
    return F.layer_norm(x, (x.shape[-1],), p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)


def linear(p, name, x):
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def attention(p, name, x, heads=2):
    b, n, c = x.shape
    qkv = linear(p, f"{name}.qkv", x).reshape(b, n, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
    x = F.scaled_dot_product_attention(*qkv.unbind(0))
    return linear(p, f"{name}.proj", x.transpose(1, 2).reshape(b, n, c))


def vit(p, buffers, images, factor):
    """timm's test_vit: a pre-norm ViT of 6 blocks; factor(path, branch) is what a path adds."""
    x = F.conv2d(images, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=16)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([p["cls_token"].expand(len(x), -1, -1), x], dim=1) + p["pos_embed"]
    for i in range(6):
        block = f"blocks.{i}"
        x = x + factor(
            f"{block}.drop_path1",
            lambda x=x, block=block: attention(
                p, f"{block}.attn", layer_norm(p, f"{block}.norm1", x)
            ),
        )
        x = x + factor(
            f"{block}.drop_path2",
            lambda x=x, block=block: linear(
                p,
                f"{block}.mlp.fc2",
                F.gelu(linear(p, f"{block}.mlp.fc1", layer_norm(p, f"{block}.norm2", x))),
            ),
        )
    return linear(p, "head", layer_norm(p, "norm", x)[:, 0])


def vit_carried(path):
    """Beginnings of the names of the parameters that a path of the ViT carries."""
    block, _, which = path.rpartition(".drop_path")
    return tuple(
        f"{block}.{part}." for part in {"1": ("norm1", "attn"), "2": ("norm2", "mlp")}[which]
    )


def conv(p, name, x, **options):
    return F.conv2d(x, p[f"{name}.weight"], **options)


def batch_norm(p, buffers, name, x):
    buffers[f"{name}.num_batches_tracked"].add_(1)
    return F.batch_norm(
        x,
        buffers[f"{name}.running_mean"],
        buffers[f"{name}.running_var"],
        p[f"{name}.weight"],
        p[f"{name}.bias"],
        training=True,
    )


def resnet(p, buffers, images, factor):
    """timm's test_resnet: three basic blocks and a bottleneck with average-pooled shortcuts."""
    bn = lambda name, x: batch_norm(p, buffers, name, x)
    x = conv(p, "conv1.0", images, stride=2, padding=1)
    x = conv(p, "conv1.3", F.relu(bn("conv1.1", x)), padding=1)
    x = conv(p, "conv1.6", F.relu(bn("conv1.4", x)), padding=1)
    x = F.max_pool2d(F.relu(bn("bn1", x)), 3, stride=2, padding=1)

    def basic(block, x, stride):
        y = F.relu(bn(f"{block}.bn1", conv(p, f"{block}.conv1", x, stride=stride, padding=1)))
        return bn(f"{block}.bn2", conv(p, f"{block}.conv2", y, padding=1))

    def bottleneck(block, x, stride):
        y = F.relu(bn(f"{block}.bn1", conv(p, f"{block}.conv1", x)))
        y = F.relu(bn(f"{block}.bn2", conv(p, f"{block}.conv2", y, stride=stride, padding=1)))
        return bn(f"{block}.bn3", conv(p, f"{block}.conv3", y))

    for layer, branch, stride in (
        ("layer1", basic, 1),
        ("layer2", basic, 2),
        ("layer3", bottleneck, 2),
        ("layer4", basic, 2),
    ):
        block = f"{layer}.0"
        y = factor(
            f"{block}.drop_path",
            lambda x=x, block=block, branch=branch, stride=stride: branch(block, x, stride),
        )
        if stride == 2:
            x = conv(p, f"{block}.downsample.1", F.avg_pool2d(x, 2, 2))
            x = bn(f"{block}.downsample.2", x)
        x = F.relu(y + x)
    return linear(p, "fc", x.mean((2, 3)))


def resnet_carried(path):
    block = path.removesuffix("drop_path")
    return tuple(f"{block}{part}." for part in ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"))


NETWORKS = {
    # forward, names carried, rates per path, and what cycles 0 to 3 drop with seed 4
    "test_vit": (
        vit,
        vit_carried,
        {f"blocks.{i}.drop_path{k}": RATE * i / 5 for i in range(1, 6) for k in (1, 2)},
        [
            "blocks.3.drop_path1 blocks.4.drop_path2",
            "blocks.4.drop_path1 blocks.4.drop_path2 blocks.5.drop_path1",
            "blocks.1.drop_path2 blocks.5.drop_path1 blocks.5.drop_path2",
            "blocks.3.drop_path1 blocks.5.drop_path1 blocks.5.drop_path2",
        ],
    ),
    "test_resnet": (
        resnet,
        resnet_carried,
        {f"layer{i}.0.drop_path": RATE * (i - 1) / 3 for i in (2, 3, 4)},
        [
            "",
            "layer3.0.drop_path layer4.0.drop_path",
            "layer3.0.drop_path",
            "layer3.0.drop_path layer4.0.drop_path",
        ],
    ),
}


def cycles_by_hand(name, batches):
    """Parameters, buffers and losses after these cycles, without the package."""
    forward, carried, rates, drops = NETWORKS[name]
    drops = [line.split() for line in drops]
    model = small_model(name, RATE)  # for its initial weights, no more
    p = {n: v.detach().clone().requires_grad_() for n, v in model.named_parameters()}
    buffers = {n: v.clone() for n, v in model.named_buffers()}
    optimizer = torch.optim.AdamW(p.values(), lr=0.01, weight_decay=0.05)
    losses = []

    def update(images, labels, factor, trained):
        for n, v in p.items():
            v.requires_grad_(n in trained)
        loss = F.cross_entropy(forward(p, buffers, images, factor), labels)
        loss.backward()
        optimizer.step()
        for v in p.values():
            v.grad = None
        losses.append(loss.detach())

    for (images, labels), dropped in zip(batches, drops, strict=True):
        droppath = lambda path, branch, dropped=dropped: (
            torch.zeros(()) if path in dropped else branch() / (1 - rates.get(path, 0.0))
        )
        beginnings = tuple(b for path in dropped for b in carried(path))
        dropped_part = {n for n in p if n.startswith(beginnings)}
        update(images, labels, droppath, p.keys() - dropped_part)
        if dropped:
            update(images, labels, lambda path, branch: branch(), dropped_part)
    return {n: v.detach() for n, v in p.items()}, buffers, losses


def cycles_with_the_package(name, batches):
    model = small_model(name, RATE)
    rdp = ResidualDropPath(model, seed=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05)
    losses, dropped = [], []
    for images, labels in batches:
        for it in rdp.cycle():
            with it:
                loss = F.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        dropped.append(" ".join(path for path, kept in rdp.masks.items() if not kept))
    assert dropped == NETWORKS[name][3]
    return {n: v.detach() for n, v in model.named_parameters()}, dict(model.named_buffers()), losses


@pytest.mark.parametrize("name", NETWORKS)
def test_cycles_equal_the_same_cycles_written_out_by_hand(name):
    batches = [batch(name, start=4 * i) for i in range(4)]
    ours = cycles_with_the_package(name, batches)
    by_hand = cycles_by_hand(name, batches)
    assert same_bits(ours[2], by_hand[2])  # losses
    for mine, theirs in zip(ours[:2], by_hand[:2], strict=True):
        assert mine.keys() == theirs.keys()
        assert [n for n in mine if not same_bits(mine[n], theirs[n])] == []
