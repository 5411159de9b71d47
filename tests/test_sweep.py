"""Every model of timm either yields its paths or gives the documented error."""

import collections
import re
import sys
import warnings

import pytest
import timm
import torch
from timm.layers import DropPath

from timm_rdp import ResidualDropPath

pytestmark = pytest.mark.sweep

# These make tensors with values when they are created or run, which meta has not.
NEEDS_VALUES = ("csatv2", "tresnet")
# Some paths carry nothing by themselves: the branches of coat share their parameters, and the mixer
# of efficientvim hands its state on beside the path.
CARRIES_NOTHING = ("coat_mini", "coat_small", "coat_tiny", "efficientvim")
# timm's resnest passes only the input of its shortcuts through the DropPaths (see test_families.py).
NONE_CARRIES_A_PARAMETER = ("resnest",)
# Models that take a rate, and yet have no path that could be dropped for a whole batch.
NEVER_CALLS_A_DROP_PATH = ("lcnet_", "mobilenetv1_", "test_efficientnet")
NONE_AROUND_A_RESIDUAL = ("ese_vovnet19b_", "vovnet39a", "vovnet57a")


def create(name):
    device = "cpu" if name.startswith(NEEDS_VALUES) else "meta"
    with torch.device(device), warnings.catch_warnings():
        # timm warns of what the model's name or its creation on meta is about.
        warnings.simplefilter("ignore")
        return timm.create_model(name, drop_path_rate=0.1)


def check_paths(name, model, rdp):
    """The paths are whole and plausible, and the model gets its classes back."""
    parameters = [n for n, _ in model.named_parameters()]
    everything = rdp.dropped_part(p.name for p in rdp.paths)
    assert everything < set(parameters)  # the head, at the least, is on no path
    names = [p.name for p in (*rdp.paths, *rdp.non_residual)]
    assert len(names) == len(set(names))
    for path in rdp.paths:
        assert path.residual
        assert 0 <= path.drop_prob <= 0.1 + 1e-6
        assert set(path.parameters) <= everything
        assert list(path.parameters) == [n for n in parameters if n in set(path.parameters)]
    assert any(not p.parameters for p in rdp.paths) is name.startswith(CARRIES_NOTHING)
    assert any(p.drop_prob > 0 for p in rdp.paths)
    assert all(not p.residual for p in rdp.non_residual)
    rdp.detach()
    assert all(type(m) is DropPath for m in model.modules() if isinstance(m, DropPath))


def sweep(name):
    """What became of this model, as it is counted."""
    try:
        model = create(name)
    except TypeError as e:
        assert "drop_path_rate" in str(e)
        return ["take no drop_path_rate"]
    try:
        rdp = ResidualDropPath(model)
    except ValueError as e:
        assert re.fullmatch(r"\w+ has no residual path that can be dropped: [^\n]+", str(e))
        if "no DropPath is called in its forward" in str(e):
            assert name.startswith(NEVER_CALLS_A_DROP_PATH)
            return ["accept a rate", "never call a DropPath"]
        if re.search(r"none of its \d+ paths carries a parameter", str(e)):
            assert name.startswith(NONE_CARRIES_A_PARAMETER)
            return ["accept a rate", "have no path that carries a parameter"]
        assert re.search(r"none of its \d+ DropPaths is around a residual", str(e))
        assert name.startswith(NONE_AROUND_A_RESIDUAL)
        return ["accept a rate", "have no DropPath around a residual"]
    check_paths(name, model, rdp)
    found = ["accept a rate", "yield paths"]
    if any("#" in p.name for p in rdp.paths):
        found.append("call a DropPath more than once")
    if any(not p.parameters for p in rdp.paths):
        found.append("have paths that carry nothing by themselves")
    if rdp.non_residual:
        found.append("have some DropPaths not around a residual")
    skippable = sum(bool(p.entrances) for p in rdp.paths)
    if skippable == len(rdp.paths):
        found.append("need not run any dropped path")
    elif skippable:
        found.append("need not run some dropped paths")
    else:
        found.append("run every dropped path")
    return found


def test_every_model_yields_its_paths_or_the_documented_error(capsys):
    models = timm.list_models()
    counts, failures = collections.Counter(), []
    for name in models:
        try:
            counts.update(sweep(name))
        except Exception as e:
            failures.append(f"{name}: {type(e).__name__}: {e}")
    with capsys.disabled():  # on stderr, which a worker process shares with the terminal
        print(f"\n{len(models)} models in timm {timm.__version__}, of which", file=sys.stderr)
        for what, count in counts.most_common():
            print(f"{count:5d} {what}", file=sys.stderr)
    assert failures == []
    assert counts["accept a rate"] + counts["take no drop_path_rate"] == len(models)
    errors = (
        counts["never call a DropPath"]
        + counts["have no DropPath around a residual"]
        + counts["have no path that carries a parameter"]
    )
    assert counts["yield paths"] + errors == counts["accept a rate"]
    assert counts["yield paths"] > 0.97 * counts["accept a rate"]
    if timm.__version__ == "1.0.31":
        assert len(models) == 1371
        assert counts["accept a rate"] == 1258
        assert counts["never call a DropPath"] == 12
        assert counts["have no DropPath around a residual"] == 5
        assert counts["have no path that carries a parameter"] == 8
