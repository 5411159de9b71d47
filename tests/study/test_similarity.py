"""Layer similarity, the revisit score and effective rank against values worked out by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from timm_rdp.study.features.similarity import (
    cka_matrix,
    cosine_matrix,
    effective_rank,
    rebounds,
    revisit_score,
)


def linear_cka(x: torch.Tensor, y: torch.Tensor, unbiased: bool = False) -> float:
    return cka_matrix([x, y], unbiased)[0, 1].item()


def digits(samples: int) -> torch.Tensor:
    return torch.from_numpy(load_digits().data[:samples])


def gram_cka(x: np.ndarray, y: np.ndarray, unbiased: bool) -> float:
    """CKA by the textbook: through the Gram matrices and, unbiased, HSIC's U-statistic in full."""

    def hsic(k, m):
        n = len(k)
        if not unbiased:
            centre = np.eye(n) - 1 / n
            return np.trace(k @ centre @ m @ centre)
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        one = np.ones(n)
        return (
            np.trace(k @ m)
            + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
            - 2 / (n - 2) * (one @ k @ m @ one)
        )

    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))


def test_cka_of_three_points_worked_out_by_hand():
    # Centred, x = (-1, 0, 1) and y = (-1, 2, -1)/3 * ... : x is a line, y a peak: x'y = 0.
    x = torch.tensor([[0.0], [1.0], [2.0]])
    peak = torch.tensor([[0.0], [1.0], [0.0]])
    assert linear_cka(x, peak) == pytest.approx(0.0, abs=1e-12)
    # Centred z = (-4, -1, 5)/3, x'z = 3, |x|^2 = 2, |z|^2 = 14/3: CKA = 9 / (2 * 14/3) = 27/28.
    z = torch.tensor([[0.0], [1.0], [3.0]])
    assert linear_cka(x, z) == pytest.approx(27 / 28)
    # Two columns: |x'[x, peak]|_F^2 = 4 and |[x, peak]'[x, peak]|_F = sqrt(4 + 4/9).
    both = torch.cat([x, peak], dim=1)
    assert linear_cka(x, both) == pytest.approx(4 / (2 * math.sqrt(4 + 4 / 9)))


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("samples", [20, 200])
def test_cka_equals_the_gram_matrix_formula(samples, unbiased):
    # 20 samples of 64 pixels are fewer than channels, 200 are more.
    x = digits(samples)
    y = torch.tanh(x @ torch.randn(64, 7, dtype=torch.float64, generator=generator()) / 20)
    matrix = cka_matrix([x, y, x[:, :5]], unbiased)
    for i, a in enumerate([x, y, x[:, :5]]):
        for j, b in enumerate([x, y, x[:, :5]]):
            expected = gram_cka(a.numpy(), b.numpy(), unbiased)
            assert matrix[i, j].item() == pytest.approx(expected, abs=1e-9)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_cka_ignores_rotation_scale_and_shift():
    x = digits(100)
    turn = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64, generator=generator())).Q
    for unbiased in (False, True):
        assert linear_cka(x, 3 * x @ turn + 5, unbiased) == pytest.approx(1.0)


def test_unbiased_cka_of_unrelated_wide_layers_is_about_zero():
    draw = generator()
    x, y = torch.randn(64, 500, generator=draw), torch.randn(64, 500, generator=draw)
    assert linear_cka(x, y) > 0.8  # the bias that few samples and wide layers cause
    assert abs(linear_cka(x, y, unbiased=True)) < 0.05


def test_cka_of_a_constant_layer_is_zero():
    x = digits(30)
    matrix = cka_matrix([x, torch.full((30, 9), 0.1)])
    assert matrix.tolist() == [[pytest.approx(1.0), 0.0], [0.0, 0.0]]


def test_cka_refuses_other_samples_and_too_few():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear_cka(digits(5), digits(6))
    with pytest.raises(ValueError, match="at least 4 samples, not 3"):
        linear_cka(digits(3), digits(3), unbiased=True)


def test_cosine_worked_out_by_hand_and_nan_where_widths_differ():
    x = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    y = torch.tensor([[1.0, 1.0], [4.0, -3.0]])  # cosines 1/sqrt(2) and 0
    matrix = cosine_matrix([x, y, torch.ones(2, 5)])
    assert matrix[0, 1].item() == pytest.approx(math.sqrt(0.5) / 2)
    assert matrix.diagonal().tolist() == pytest.approx([1, 1, 1])
    assert matrix[0, 2].isnan() and matrix[2, 1].isnan()


def test_identity_network_revisits_nothing():
    x = digits(100)
    assert revisit_score(cka_matrix([x] * 8)) == pytest.approx(0, abs=1e-12)
    assert revisit_score(cosine_matrix([x] * 8)) == pytest.approx(0, abs=1e-12)


def test_features_that_only_drift_away_revisit_nothing():
    angles = torch.linspace(0, math.pi / 2, 9, dtype=torch.float64)
    start, end = orthogonal_pair()
    layers = [a.cos() * start + a.sin() * end for a in angles]
    assert revisit_score(cosine_matrix(layers)) == pytest.approx(0, abs=1e-9)
    assert revisit_score(cka_matrix(layers)) == pytest.approx(0, abs=1e-9)


def orthogonal_pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Two centred features of 4 samples without any relation: CKA and cosines 0."""
    start = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]).double()
    end = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, -1.0], [0.0, -1.0]]).double()
    return start, end


def test_features_that_go_away_and_back_score_one():
    here, away = orthogonal_pair()
    for layers in ([here, away, here], [here, away] * 5):
        assert revisit_score(cka_matrix(layers)) == pytest.approx(1)
        assert revisit_score(cosine_matrix(layers)) == pytest.approx(1)


def test_going_away_slowly_and_back_scores_high_and_the_way_out_alone_nothing():
    angles = torch.linspace(0, math.pi, 13, dtype=torch.float64)
    here, away = orthogonal_pair()
    layers = [a.cos().abs() * here + a.sin() * away for a in angles]
    # Layer i is met again at 12 - i; the valley between lies at right angles to the first layer.
    score = revisit_score(cosine_matrix(layers))
    by_hand = [1 - math.cos(math.pi / 2 - i * math.pi / 12) for i in range(6)]
    assert score == pytest.approx(sum(by_hand) / 11)
    assert score > 0.2
    assert revisit_score(cosine_matrix(layers[:7])) == pytest.approx(0, abs=1e-9)


def test_rebound_is_the_highest_climb_after_the_deepest_valley():
    row = [1.0, 0.6, 0.7, 0.2, 0.9, 0.1, 0.5]
    similarity = torch.eye(7).double()
    similarity[0] = torch.tensor(row)
    assert rebounds(similarity)[0].item() == pytest.approx(0.7)  # from 0.2 up to 0.9
    similarity[0, 4] = float("nan")
    assert rebounds(similarity)[0].item() == pytest.approx(0.4)  # from 0.1 up to 0.5


@given(st.lists(st.floats(0, 1), min_size=3, max_size=12))
def test_revisit_score_of_similarities_stays_in_its_range(values):
    matrix = torch.tensor(values).double().outer(torch.tensor(values).double())
    matrix.fill_diagonal_(1)
    assert 0 <= revisit_score(matrix) <= 1


def test_revisit_score_refuses_two_layers():
    with pytest.raises(ValueError, match="at least 3 layers"):
        revisit_score(torch.eye(2))


def test_effective_rank_worked_out_by_hand():
    # Singular values 3 and 1 once centred: entropy of (3/4, 1/4).
    x = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    by_hand = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert effective_rank(x) == pytest.approx(by_hand)
    assert effective_rank(x + 100) == pytest.approx(by_hand)
    equal = torch.cat([torch.eye(5), -torch.eye(5)])
    assert effective_rank(equal) == pytest.approx(5)
    assert effective_rank(torch.ones(10, 3)) == 0
