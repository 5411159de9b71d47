"""Whatever stands on the command line or in a config: options, or one line of complaint."""

import argparse

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from timm_rdp.errors import UsageError
from timm_rdp.training.flags import build_parser
from timm_rdp.training.options import args_text, parse_args, read_config

PARSER = build_parser()
NAMES = [
    name
    for action in PARSER._actions
    for name in action.option_strings
    if name not in ("-h", "--help", "--device-modules")  # imports what it is given
]
ODD = ["", " ", "0", "1", "2", "-1", "0.5", "nan", "inf", "1e400", "9" * 5000]
ODD += ["a=b", "a={[]: 1}", "=", ":", ".", "/", "\0", "é\n"]
ODD += ["a" * 300, "absent/" + "a" * 300, "/dev/null", "/dev/null/below"]
ODD += ["cpu", "cuda:99", "train", "rand-m9", "local-dir:", "hf-hub:"]
WORDS = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from(ODD),
    st.builds("{}={}".format, st.sampled_from(NAMES), st.sampled_from(ODD)),
    st.text(max_size=8).filter(lambda text: not text.startswith(("-h", "--h", "--device-m"))),
)
PAIRS = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(ODD)), max_size=3)
ARGUMENTS = st.one_of(
    st.lists(WORDS, max_size=6), PAIRS.map(lambda pairs: [word for pair in pairs for word in pair])
)
QUICK = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def assert_one_line(error: UsageError) -> None:
    assert str(error) and len(str(error).splitlines()) == 1, repr(str(error))


@QUICK
@given(ARGUMENTS)
@example(["--output", "a\nb", "--epochs", "-1"])
def test_any_command_line_gives_options_or_one_line(argv):
    try:
        args = parse_args(argv)
    except UsageError as error:
        assert_one_line(error)
    else:
        assert isinstance(args, argparse.Namespace)
        assert args_text(args)


@pytest.mark.parametrize(
    "value", [*ODD[::2], *(pytest.param(value, marks=pytest.mark.slow) for value in ODD[1::2])]
)
def test_any_odd_value_of_any_flag_gives_options_or_one_line(value):
    for name in NAMES:
        try:
            assert args_text(parse_args([name, value]))
        except UsageError as error:
            assert_one_line(error)


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.dates()
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
DESTS = sorted(vars(PARSER.parse_args([])))
MAPPINGS = st.dictionaries(
    st.one_of(st.sampled_from(DESTS), st.text(max_size=6), st.integers(), st.none()), VALUES
)


@QUICK
@given(MAPPINGS)
def test_any_mapping_in_a_config_gives_flags_or_one_line(tmp_path, mapping):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(mapping))
    try:
        config = read_config(path, PARSER)
    except UsageError as error:
        assert_one_line(error)
        assert str(path) in str(error)
    else:
        assert set(config) <= set(DESTS)


@QUICK
@given(st.one_of(st.binary(max_size=40), st.text(max_size=40).map(str.encode)))
@example(b"? [a, b]\n: c")
@example(b"&a [*a]")
@example(b"? &a [*a]\n: 1")
@example(b"[" * 3000)
def test_any_bytes_in_a_config_give_flags_or_one_line(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_config(path, PARSER)
    assert_one_line(error.value)
