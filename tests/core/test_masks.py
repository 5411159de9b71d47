"""Masks are a pure function of (seed, cycle)."""

import itertools
import random

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from timm_rdp import ResidualDropPath
from timm_rdp.core.masks import sample_masks

# Written down once. They must never change: a run that is resumed, or repeated with a later
# version, would drop other paths. "1" = kept; the rates are those of RATES, then 24 times 0.5.
RATES = (0.0, 0.1, 0.3, 0.5, 0.9)
GOLDEN = {
    (0, 0): ("11110", "011100011101010100001111"),
    (0, 1): ("11110", "101110111000011011011110"),
    (0, 2): ("11000", "010010111111010001110001"),
    (1, 0): ("11110", "111100000000001011011111"),
    (1, 1): ("11100", "010001100000011100110011"),
    (42, 0): ("11110", "001101100110001011001100"),
    (42, 999): ("11100", "001000100000100010100001"),
    (-1, 7): ("10110", "100110110111111110110011"),
    (2**40, 10**9): ("11000", "000000010000011111011010"),
}


def written(masks):
    return "".join("01"[kept] for kept in masks)


@pytest.mark.parametrize("seed, cycle", GOLDEN)
def test_masks_have_their_golden_values(seed, cycle):
    masks = sample_masks(seed, cycle, RATES), sample_masks(seed, cycle, [0.5] * 24)
    assert tuple(map(written, masks)) == GOLDEN[seed, cycle]


def test_a_models_masks_have_their_golden_values():
    model = timm.create_model("test_vit", drop_path_rate=0.5, num_classes=10)
    rdp = ResidualDropPath(model, seed=3)
    dropped = []
    for _ in range(3):
        for it in rdp.cycle():
            with it:
                pass
        dropped.append(" ".join(name for name, kept in rdp.masks.items() if not kept))
    assert dropped == [
        "blocks.1.drop_path2 blocks.3.drop_path1 blocks.5.drop_path1 blocks.5.drop_path2",
        "blocks.4.drop_path1 blocks.4.drop_path2",
        "blocks.3.drop_path1 blocks.4.drop_path1 blocks.5.drop_path1",
    ]


@given(st.integers(), st.integers(0), st.lists(st.floats(0, 1, exclude_max=True), max_size=50))
@settings(max_examples=50, deadline=None)
def test_masks_depend_on_nothing_but_seed_and_cycle(seed, cycle, rates):
    first = sample_masks(seed, cycle, rates)
    random.seed(cycle)
    torch.manual_seed(seed % 2**32)
    sample_masks(seed, cycle + 1, rates)
    assert sample_masks(seed, cycle, rates) == first
    assert len(first) == len(rates)
    assert all(isinstance(kept, bool) for kept in first)
    assert all(kept for kept, rate in zip(first, rates, strict=True) if rate == 0)


def test_no_global_random_state_moves_when_masks_are_drawn():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    for cycle in range(100):
        sample_masks(0, cycle, RATES)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


# A right sampler fails a test below with this probability, over the choice of the seed. The seeds
# are fixed, so what passed once passes always.
ERROR_RATE = 1e-4
CYCLES = 20_000


def sampled(seed, rates, cycles=CYCLES):
    """Array (cycles, paths), True = dropped."""
    return ~np.array([sample_masks(seed, cycle, rates) for cycle in range(cycles)])


@pytest.mark.parametrize("seed", [0, 7])
def test_each_path_is_dropped_as_often_as_its_drop_prob_says(seed):
    rates = [0.01, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 0.99]
    counts = sampled(seed, rates).sum(axis=0)
    for count, rate in zip(counts, rates, strict=True):
        p_value = stats.binomtest(int(count), CYCLES, rate).pvalue
        assert p_value > ERROR_RATE / len(rates), (rate, count / CYCLES)


def test_the_controller_drops_each_path_as_often_as_its_drop_prob_says():
    model = timm.create_model("test_vit", drop_path_rate=0.5, num_classes=10)
    rdp = ResidualDropPath(model)
    cycles, counts = 2000, dict.fromkeys((path.name for path in rdp.paths), 0)
    for _ in range(cycles):
        for it in rdp.cycle():
            with it:
                for name in it.dropped if it.phase == "droppath" else ():
                    counts[name] += 1
    for path in rdp.paths:
        p_value = stats.binomtest(counts[path.name], cycles, path.drop_prob).pvalue
        assert p_value > ERROR_RATE / len(rdp.paths), (path, counts[path.name] / cycles)


def test_paths_are_dropped_independently_of_each_other():
    drops = sampled(0, [0.3] * 6)
    pairs = list(itertools.combinations(range(6), 2))
    for a, b in pairs:
        assert independent(drops[:, a], drops[:, b], ERROR_RATE / len(pairs)), (a, b)


def test_cycles_and_seeds_are_independent_of_each_other():
    drops = sampled(0, [0.3] * 4)
    pairs = [(drops[:-lag], drops[lag:]) for lag in (1, 2)]
    pairs += [(drops, sampled(1, [0.3] * 4))]
    pairs += [
        (drops[1:], sampled(1, [0.3] * 4)[:-1])
    ]  # (seed, cycle + 1) against (seed + 1, cycle)
    for first, second in pairs:
        for path in range(4):
            assert independent(first[:, path], second[:, path], ERROR_RATE / 16)


def independent(first, second, error_rate):
    table = [[np.sum((first == a) & (second == b)) for b in (False, True)] for a in (False, True)]
    return stats.chi2_contingency(table).pvalue > error_rate
