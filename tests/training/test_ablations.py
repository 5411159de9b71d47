"""What the method is compared with: other second iterations, and stochastic depth for a while."""

import itertools
import math
from collections import Counter

import pytest
import timm
import torch
from core_helpers import same_bits, small_model
from runs import VIT, checkpoint, run, watch_iterations

from timm_rdp.args import AllSecond, RandomSecond
from timm_rdp.training import train


def model(rate=0.5, depth=3):
    return timm.create_model("test_vit", img_size=32, depth=depth, drop_path_rate=rate)


def test_a_random_part_is_of_as_many_paths_drawn_from_the_same_rates_but_independently():
    rdp = RandomSecond(model())
    names = [p.name for p in rdp.paths]
    rates = [p.drop_prob for p in rdp.paths]
    parts = {}  # which sets of paths carry what
    for k in range(len(names) + 1):
        for chosen in itertools.combinations(range(len(names)), k):
            parts[rdp.dropped_part(names[i] for i in chosen), k] = frozenset(chosen)
    drawn, together, cycles = Counter(), Counter(), 4000
    for cycle in range(cycles):
        rdp.current_cycle = cycle
        dropped = rdp.iteration().dropped
        chosen = parts[rdp._second_part(dropped), len(dropped)]
        assert len(chosen) == len(dropped)
        assert rdp._second_part(dropped) == rdp._second_part(dropped)
        drawn[chosen] += 1
        together[chosen, frozenset(names.index(n) for n in dropped)] += 1
    # Given their number, both sets have the probabilities of independent draws.
    chance = lambda s: math.prod(p if i in s else 1 - p for i, p in enumerate(rates))
    for chosen in parts.values():
        assert drawn[chosen] / cycles == pytest.approx(chance(chosen), abs=0.03)
    for one, other in itertools.product(parts.values(), repeat=2):
        if len(one) == len(other):
            total = sum(chance(s) for s in parts.values() if len(s) == len(one))
            expected = chance(one) * chance(other) / total
            assert together[one, other] / cycles == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("second", ["random", "all"])
def test_the_second_iteration_trains_what_was_asked_for_and_nothing_else(
    second, digits_folder, tmp_path, monkeypatch
):
    changed = []

    def before(run):
        run.bits = {n: p.detach().clone() for n, p in run.rdp.model.named_parameters()}

    def after(run):
        it, rdp = run.rdp._active, run.rdp
        now = dict(rdp.model.named_parameters())
        moved = {n for n, p in now.items() if not torch.equal(p, run.bits[n])}
        assert moved <= it.trainable
        if it.phase == "complement":
            changed.append(it.trainable == rdp.dropped_part(it.dropped))
            assert second != "all" or it.trainable == set(now)

    watch_iterations(monkeypatch, before, after)
    argv = (*VIT, "--rdp", "--drop-path", 0.5, "--rdp-second", second)
    run(digits_folder, tmp_path, *argv)
    assert changed and not all(changed)


def test_where_nothing_was_dropped_there_is_no_second_iteration():
    for kind in (RandomSecond, AllSecond):
        assert kind(model())._second_part(frozenset()) == frozenset()


@pytest.mark.parametrize("more", [(), ("--rdp",), ("--skip-dropped",)], ids=" ".join)
@pytest.mark.parametrize(("half", "expected"), [("early", [1, 1, 0]), ("late", [0, 0, 1])])
def test_half_of_the_epochs_have_stochastic_depth(
    half, expected, more, digits_folder, tmp_path, monkeypatch
):
    seen = []
    epoch = train.train_one_epoch

    def train_one_epoch(*args, task, **kwargs):
        blocks = task.get_trainable_module().blocks
        before = [m.drop_path1.drop_prob for m in blocks[1:]]
        epoch(*args, task=task, **kwargs)
        seen.append(before)

    monkeypatch.setattr(train, "train_one_epoch", train_one_epoch)
    argv = (*VIT, "--drop-path", 0.4, "--drop-path-schedule", half, "--epochs", 3, *more)
    run(digits_folder, tmp_path, *argv)
    assert seen == [pytest.approx([0.2 * on, 0.4 * on]) for on in expected]


@pytest.mark.parametrize("more", [(), ("--rdp",)], ids=" ".join)
def test_a_resumed_run_has_the_same_halves(more, digits_folder, tmp_path):
    argv = (*VIT, "--drop-path", 0.5, "--drop-path-schedule", "early", "--epochs", 3, *more)
    whole = run(digits_folder, tmp_path / "whole", *argv)
    cut = run(digits_folder, tmp_path / "cut", *argv, "--stop-epoch", 1)
    cut = run(digits_folder, tmp_path / "cut", *argv, "--resume", "auto")
    assert same_bits(checkpoint(cut)["state_dict"], checkpoint(whole)["state_dict"])


def test_a_schedule_of_nothing_and_a_second_iteration_without_rdp_are_refused(
    digits_folder, refused
):
    common = (*VIT, "--data-dir", digits_folder, "--num-classes", 10, "-b", 16, "-j", 0)
    line = refused(*common, "--drop-path-schedule", "late")
    assert "--drop-path-schedule late" in line and "--drop-path 0.1" in line
    assert "--rdp-second all has no effect without --rdp" in refused(*common, "--rdp-second", "all")


def test_a_number_of_paths_that_the_rates_never_give_is_drawn_all_the_same():
    rdp = RandomSecond(small_model("test_vit"))
    names = [path.name for path in rdp.paths]
    part = rdp._second_part(frozenset(names[:4]))
    for path in rdp.paths:
        path.module.drop_prob = 0.0  # so that nothing is ever dropped
    drawn = {rdp.current_cycle: rdp._second_part(frozenset(names[:4]))}
    for rdp.current_cycle in range(1, 4):
        drawn[rdp.current_cycle] = rdp._second_part(frozenset(names[:4]))
    assert part and all(drawn.values())
    assert len(set(drawn.values())) > 1  # not the part that was dropped, cycle after cycle
