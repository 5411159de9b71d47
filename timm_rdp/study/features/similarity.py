"""How alike two layers are, and how often a network comes back to features that it had left."""

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_SAMPLES_UNBIASED = 4


def linear_cka(x: Tensor, y: Tensor, unbiased: bool = False) -> float:
    """Linear centred kernel alignment of two layers' features on the same samples.

    Args:
        x: features of one layer, (samples, width).
        y: features of the other, (samples, any width).
        unbiased: estimate HSIC without the bias that few samples and wide layers cause (Song et
            al. 2012); it needs 4 samples and may come out slightly below 0. The plain estimate
            lies in [0, 1].

    Raises:
        ValueError: shapes do not fit, or too few samples.

    Source: Kornblith et al. 2019, arXiv 1905.00414. A layer that does not vary over the samples has
    no direction to compare: its CKA with any layer is 0.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(
            f"CKA compares two (samples, width) tensors of the same samples, "
            f"not {tuple(x.shape)} and {tuple(y.shape)}"
        )
    return cka_matrix([x, y], unbiased)[0, 1].item()


def cka_matrix(layers: list[Tensor], unbiased: bool = False) -> Tensor:
    """Linear CKA between all pairs of layers: (layers, layers), float64.

    Args:
        layers: one (samples, width) tensor a layer, the same samples in the same order.
        unbiased: see `linear_cka`.

    Memory beyond the features themselves is one float64 copy of them.
    """
    samples = len(layers[0])
    needed = MIN_SAMPLES_UNBIASED if unbiased else 2
    if samples < needed:
        raise ValueError(f"CKA needs at least {needed} samples, not {samples}")
    rows = [_prepare(layer) for layer in layers]
    hsic = torch.empty(len(rows), len(rows), dtype=torch.float64)
    for i, x in enumerate(rows):
        for j in range(i, len(rows)):
            hsic[i, j] = hsic[j, i] = _hsic(x, rows[j], unbiased)
    own = hsic.diagonal().clamp(min=0)
    norm = (own[:, None] * own[None, :]).sqrt()
    cka = torch.where(norm > 0, hsic / norm.where(norm > 0, torch.ones_like(norm)), 0.0)
    return cka.clamp(max=1.0)


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
    if x.shape[1] > x.shape[0]:
        x = torch.linalg.qr(x.T, mode="r").R.T
    return x


def _hsic(x: Tensor, y: Tensor, unbiased: bool) -> float:
    """HSIC of two centred layers, up to a factor that depends on the number of samples only."""
    cross = (x.T @ y).square().sum()
    if not unbiased:
        return cross.item()
    # Song et al. 2012, eq. 5, for Gram matrices without their diagonals, never formed.
    n = len(x)
    kx, ky = x.square().sum(1), y.square().sum(1)
    trace = cross - kx @ ky
    # Row sums: centred rows sum to zero, so only the removed diagonal is left.
    return (trace + kx.sum() * ky.sum() / ((n - 1) * (n - 2)) - 2 * (kx @ ky) / (n - 2)).item()


def cosine_matrix(layers: list[Tensor]) -> Tensor:
    """Cosine similarity between all pairs of layers, mean over samples: (layers, layers), float64.

    Args:
        layers: one (samples, width) tensor a layer. A pair of different widths has no cosine: NaN.

    Features are taken as they are, not centred. torch's cosine_similarity does the arithmetic.
    """
    out = torch.full((len(layers), len(layers)), float("nan"), dtype=torch.float64)
    for i, x in enumerate(layers):
        for j in range(i, len(layers)):
            if layers[j].shape == x.shape:
                value = F.cosine_similarity(x.double(), layers[j].double(), dim=1).mean()
                out[i, j] = out[j, i] = value
    return out


def rebounds(similarity: Tensor) -> Tensor:
    """How far similarity to each layer rises again after having fallen, over the layers after it.

    For layer i with the sequence s = similarity[i, i:], the rebound is the largest s[k] - s[j] with
    j < k: 0 where similarity only falls or stays, the height of the climb out of the deepest valley
    where it does not.

    Args:
        similarity: (layers, layers), row i holding the similarity of layer i to every layer, in
            forward order. NaN (not comparable) is passed over.

    Returns:
        (layers - 2,): the last two layers have no layer to fall and rise over.

    Raises:
        ValueError: not a square matrix of at least 3 layers.
    """
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1] or len(similarity) < 3:
        raise ValueError(
            f"a revisit needs the similarities of at least 3 layers as a square matrix, "
            f"not {tuple(similarity.shape)}"
        )
    out = torch.zeros(len(similarity) - 2, dtype=torch.float64)
    for i in range(len(out)):
        s = similarity[i, i:].double()
        s = s[~s.isnan()]
        if len(s):
            out[i] = (s - s.cummin(0).values).max()
    return out


def revisit_score(similarity: Tensor) -> float:
    """The revisit score: how much similarity rises again after having fallen, mean over layers.

    The mean of `rebounds` over all layers but the last two. For similarities in [0, 1] it lies in
    [0, 1] (in [0, 2] for cosines): 0 exactly where features stay, or only drift away from every
    layer; 1 where every layer's features are lost completely and then come back completely.

    Args:
        similarity: (layers, layers) in forward order, see `rebounds`.

    Raises:
        ValueError: not a square matrix of at least 3 layers.
    """
    return rebounds(similarity).mean().item()


def effective_rank(layer: Tensor) -> float:
    """Effective rank of a layer's centred features: in [1, min(samples - 1, width)], 0 if constant.

    Args:
        layer: features, (samples, width).

    Source: Roy and Vetterli 2007: the exponential of the entropy of the singular values divided by
    their sum.
    """
    values = torch.linalg.svdvals(_prepare(layer))
    if values.sum() == 0:
        return 0.0
    p = values / values.sum()
    return torch.special.entr(p).sum().exp().item()
