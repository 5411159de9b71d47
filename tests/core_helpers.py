"""What the tests of the core share: small real models and comparisons by bits."""

import copy

import timm
import torch
from digits import digit_images
from torch import Tensor, nn

# Image size and options with which a model of timm becomes small enough for a test.
SMALL = {
    "test_vit": (32, {"img_size": 32}),
    "test_resnet": (64, {}),
    "test_byobnet": (64, {}),
    "cait_xxs24_224": (32, {"img_size": 32, "depth": 3, "depth_token_only": 1}),
    "swin_tiny_patch4_window7_224": (
        32,
        {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4},
    ),
    "convnext_atto": (64, {"depths": (1, 2, 2, 1), "dims": (8, 16, 24, 32)}),
    "mobilevit_xxs": (64, {}),
    "mobilenetv3_small_050": (64, {}),
}


def small_model(name: str, drop_path_rate: float = 0.5, **options: object) -> nn.Module:
    """The same model with the same random weights at every call, in train mode."""
    torch.manual_seed(0)
    options = {**SMALL[name][1], **options}
    model = timm.create_model(name, num_classes=10, drop_path_rate=drop_path_rate, **options)
    for parameter in model.parameters():  # some layers start at zero, which hides what they do
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    return model.train()


def batch(name: str, count: int = 4, start: int = 0) -> tuple[Tensor, Tensor]:
    """Digits (count, 3, S, S) and labels (count,) of the size that small_model(name) takes."""
    return digit_images(count, SMALL[name][0], start)


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy loss of the model on a batch."""
    return nn.functional.cross_entropy(model(images), labels)


def same_bits(a: object, b: object) -> bool:
    """Whether two tensors, or nested dicts and lists of them, are equal to the last bit."""
    if isinstance(a, Tensor):
        return (
            isinstance(b, Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and bool((_bytes(a) == _bytes(b)).all())
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's buffers by name."""
    return {name: b.clone() for name, b in model.named_buffers()}


def optimizer_state_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict]:
    """A copy of the optimizer's state by parameter name; {} where it has none yet."""
    # timm's Lookahead keeps what it knows in the optimizer inside it.
    state = getattr(optimizer, "_base_optimizer", optimizer).state
    return {name: copy.deepcopy(state.get(p, {})) for name, p in model.named_parameters()}


def changed(before: dict[str, object], after: dict[str, object]) -> set[str]:
    """The names under which something is no longer the same to the last bit."""
    assert before.keys() == after.keys()
    return {name for name in before if not same_bits(before[name], after[name])}
