"""How alike two layers are, and how often a network comes back to features that it had left."""

from itertools import combinations_with_replacement

import torch
import torch.nn.functional as F
from torch import Tensor


def cka_matrix(layers: list[Tensor], unbiased: bool = False) -> Tensor:
    """Linear centred kernel alignment between all pairs of layers: (layers, layers), float64.

    Args:
        layers: one (samples, width) tensor a layer, the same samples in the same order.
        unbiased: estimate HSIC without the bias that few samples and wide layers cause (Song et
            al. 2012): needs 4 samples, may come out slightly below 0. Else it lies in [0, 1].

    Source: Kornblith et al. 2019, arXiv 1905.00414. A layer that does not vary over the samples has
    no direction to compare: its CKA with any layer is 0. Too few samples are a ValueError.
    """
    n, needed = len(layers[0]), 4 if unbiased else 2
    if n < needed:
        raise ValueError(f"CKA needs at least {needed} samples, not {n}")
    rows = [_prepare(layer) for layer in layers]
    hsic = torch.empty(len(rows), len(rows), dtype=torch.float64)
    for (i, x), (j, y) in combinations_with_replacement(enumerate(rows), 2):
        value = (x.T @ y).square().sum()
        if unbiased:
            # Song et al. 2012, eq. 5, for Gram matrices without their diagonals, never formed: of
            # their row sums only the removed diagonal is left, since centred rows sum to zero.
            kx, ky = x.square().sum(1), y.square().sum(1)
            value += kx.sum() * ky.sum() / ((n - 1) * (n - 2)) - kx @ ky * (1 + 2 / (n - 2))
        hsic[i, j] = hsic[j, i] = value  # up to a factor that depends on n only
    own = hsic.diagonal().clamp(min=0)
    norm = own.outer(own).sqrt()
    return torch.where(norm > 0, hsic / norm, 0.0).clamp(max=1.0)


def _prepare(layer: Tensor) -> Tensor:
    """Centre, bring to unit scale, and shrink a layer that is wider than it has samples."""
    x = layer.to(torch.float64)
    mean = x.mean(0)
    x = x - mean
    scale = x.norm()
    # What is left of a constant layer after centring is rounding.
    if scale <= 1e-6 * mean.norm() * len(x) ** 0.5:
        return torch.zeros(len(x), 1, dtype=torch.float64)
    x = x / scale
    return torch.linalg.qr(x.T, mode="r").R.T if x.shape[1] > x.shape[0] else x


def cosine_matrix(layers: list[Tensor]) -> Tensor:
    """Cosine similarity between all pairs of layers, mean over samples: (layers, layers), float64.

    Layers are (samples, width) each, not centred. A pair of different widths has no cosine: NaN.
    """
    out = torch.full((len(layers), len(layers)), float("nan"), dtype=torch.float64)
    for (i, x), (j, y) in combinations_with_replacement(enumerate(layers), 2):
        if y.shape == x.shape:
            out[i, j] = out[j, i] = F.cosine_similarity(x.double(), y.double(), dim=1).mean()
    return out


def rebounds(similarity: Tensor) -> Tensor:
    """How far similarity to each layer rises again after having fallen, over the layers after it.

    For layer i with the sequence s = similarity[i, i:], the rebound is the largest s[k] - s[j] with
    j < k: 0 where similarity only falls or stays, the height of the climb out of the deepest valley
    where it does not. `similarity` is (layers, layers), in forward order; NaN (not comparable) is
    passed over. The result is (layers - 2,): the last two layers have no layer to fall and rise
    over. Fewer than 3 layers are a ValueError.
    """
    if len(similarity) < 3:
        raise ValueError(f"a revisit needs at least 3 layers, not {len(similarity)}")
    out = torch.zeros(len(similarity) - 2, dtype=torch.float64)
    for i in range(len(out)):
        s = similarity[i, i:].double()
        s = s[~s.isnan()]
        if len(s):
            out[i] = (s - s.cummin(0).values).max()
    return out


def revisit_score(similarity: Tensor) -> float:
    """The revisit score: how much similarity rises again after having fallen, mean of `rebounds`.

    For similarities in [0, 1] it lies in [0, 1] (in [0, 2] for cosines): 0 exactly where features
    stay, or only drift away from every layer; 1 where all are lost and come back completely.
    """
    return rebounds(similarity).mean().item()


def effective_rank(layer: Tensor) -> float:
    """Effective rank of a layer's centred features: in [1, min(samples - 1, width)], 0 if constant.

    The layer is (samples, width). Source: Roy and Vetterli 2007: the exponential of the entropy of
    the singular values divided by their sum.
    """
    values = torch.linalg.svdvals(_prepare(layer))
    return torch.special.entr(values / values.sum()).sum().exp().item() if values.sum() else 0.0
