"""The --rdp options for any timm-style script."""

import argparse
import logging

import pytest
import torch
from core_helpers import batch, loss_of, small_model
from timm.layers import DropPath

from timm_rdp import ResidualDropPath, add_rdp_args, from_args


def parsed(*argv, **defaults):
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=42)
    group = add_rdp_args(parser)
    assert group.title == "ResidualDroppath"
    parser.set_defaults(**defaults)
    return parser.parse_args(argv)


def first_dropped(rdp, cycles=4):
    seen = []
    for _ in range(cycles):
        seen.append(rdp.iteration().dropped)
        for it in rdp.cycle():
            with it:
                pass
    return seen


def test_the_options_have_their_documented_defaults():
    args = parsed()
    assert (args.rdp, args.rdp_batch, args.rdp_every, args.rdp_start_epoch) == (False, "same", 1, 0)
    assert args.rdp_seed is None


def test_without_rdp_the_model_stays_timms():
    model = small_model("test_vit")
    assert from_args(model, parsed("--rdp-every", "3")) is None
    assert {type(m) for m in model.modules() if isinstance(m, DropPath)} == {DropPath}


@pytest.mark.parametrize(
    "argv, seed", [((), 42), (("--seed", "5"), 5), (("--seed", "5", "--rdp-seed", "9"), 9)]
)
def test_the_masks_are_from_rdp_seed_or_else_from_the_scripts_seed(argv, seed):
    rdp = from_args(small_model("test_vit"), parsed("--rdp", *argv))
    assert rdp.seed == seed
    assert first_dropped(rdp) == first_dropped(ResidualDropPath(small_model("test_vit"), seed))


def test_a_script_without_a_seed_gets_seed_zero():
    parser = argparse.ArgumentParser()
    add_rdp_args(parser)
    assert from_args(small_model("test_vit"), parser.parse_args(["--rdp"])).seed == 0


def test_a_script_whose_seed_is_unset_gets_seed_zero():
    assert from_args(small_model("test_vit"), parsed("--rdp", seed=None)).seed == 0


def test_every_and_the_example_input_are_handed_on():
    model = small_model("test_resnet")
    args = parsed("--rdp", "--rdp-every", "2")
    rdp = from_args(model, args, example_input=torch.ones(2, 3, 64, 64))
    assert rdp.every == 2
    for it in rdp.cycle():
        with it:
            loss_of(model, *batch("test_resnet")).backward()


def test_drop_paths_that_are_left_to_timm_are_named_once(caplog):
    with caplog.at_level(logging.INFO):
        from_args(small_model("mobilevit_xxs"), parsed("--rdp"))
    messages = [r.getMessage() for r in caplog.records if "leaves" in r.getMessage()]
    assert len(messages) == 1
    assert "leaves 4 of the model's 24 DropPath calls to timm" in messages[0]
    assert "stages.1.0.drop_path" in messages[0]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        from_args(small_model("test_vit"), parsed("--rdp"))
    assert not [r for r in caplog.records if "leaves" in r.getMessage()]


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--rdp", "--skip-dropped"), "--skip-dropped cannot be combined with --rdp"),
    ],
)
def test_options_out_of_place_are_one_line(argv, message):
    with pytest.raises(ValueError, match=message) as error:
        from_args(small_model("test_vit"), parsed(*argv))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "argv",
    [
        ("--rdp-batch", "both"),
        ("--rdp-every", "often"),
        ("--rdp-every", "0"),
        ("--rdp-start-epoch", "-1"),
        ("--rdp-seed", "1.5"),
    ],
)
def test_values_that_do_not_parse_end_with_status_2(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        parsed("--rdp", *argv)
    assert exit_.value.code == 2
    assert argv[0] in capsys.readouterr().err
