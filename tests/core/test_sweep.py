"""Every model of timm either yields its paths or gives the documented error."""

import collections
import json
import re
import sys
import time
import warnings

import pytest
import timm
import torch
from timm.layers import DropPath

from timm_rdp import ResidualDropPath
from timm_rdp.core.regions import find_regions

pytestmark = pytest.mark.sweep

# These make tensors with values when they are created or run, which meta has not.
NEEDS_VALUES = ("csatv2", "tresnet")
# Some paths carry nothing by themselves: the branches of coat share their parameters, and the mixer
# of efficientvim hands its state on beside the path.
CARRIES_NOTHING = ("coat_mini", "coat_small", "coat_tiny", "efficientvim")
# timm's resnest passes only the input of its shortcuts through them (see test_families.py).
NONE_CARRIES_A_PARAMETER = ("resnest",)
# Models that take a rate, and yet have no path that could be dropped for a whole batch.
NEVER_CALLS_A_DROP_PATH = ("lcnet_", "mobilenetv1_", "test_efficientnet")
NONE_AROUND_A_RESIDUAL = ("ese_vovnet19b_", "vovnet39a", "vovnet57a")

# What becomes of the models of timm 1.0.31.
ERRORS = {
    "never call a DropPath": 12,
    "have no DropPath around a residual": 5,
    "have no path that carries a parameter": 8,
}
COUNTS = {
    "accept a rate": 1258,
    "take no drop_path_rate": 113,
    **ERRORS,
    "yield paths": 1233,
    "need not run any dropped path": 1029,
    "need not run some dropped paths": 162,
    "run every dropped path": 42,
    "call a DropPath more than once": 62,
    "have paths that carry nothing by themselves": 11,
    "have some DropPaths not around a residual": 24,
}
PARTS = 4  # so that several processes share the work


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
    inside = sum(map(len, find_regions(model, rdp._graph).values()))
    check_paths(name, model, rdp)
    found = ["accept a rate", "yield paths"]
    found += ["paths"] * len(rdp.paths) + ["paths in regions of torch.compile"] * inside
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


@pytest.fixture
def counted(tmp_path_factory, worker_id):
    """A folder that all parts of the sweep share, in whichever process they run."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "sweep"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize("part", range(PARTS))
def test_every_model_yields_its_paths_or_the_documented_error(part, counted, capsys):
    counts, seconds, failures = collections.Counter(), {}, []
    for name in timm.list_models()[part::PARTS]:
        start = time.process_time()
        try:
            counts.update(sweep(name))
        except Exception as e:
            failures.append(f"{name}: {type(e).__name__}: {e}")
        seconds[name] = time.process_time() - start
    (counted / f"{part}.new").write_text(json.dumps([counts, seconds]))
    (counted / f"{part}.new").rename(counted / f"{part}.json")
    assert failures == []
    parts = [json.loads(file.read_text()) for file in counted.glob("*.json")]
    if len(parts) == PARTS:  # this is the last one
        with capsys.disabled():  # on stderr, which a worker process shares with the terminal
            check_together(parts)


def check_together(parts):
    counts = sum((collections.Counter(counts) for counts, _ in parts), collections.Counter())
    seconds = dict(item for _, seconds in parts for item in seconds.items())
    print(f"\n{len(seconds)} models in timm {timm.__version__}, of which", file=sys.stderr)
    for what, count in counts.most_common():
        print(f"{count:5d} {what}", file=sys.stderr)
    print(f"They took {sum(seconds.values()):.0f} s, the longest of them", file=sys.stderr)
    for name in sorted(seconds, key=seconds.get)[:-6:-1]:
        print(f"{seconds[name]:5.1f} s {name}", file=sys.stderr)
    assert counts["accept a rate"] + counts["take no drop_path_rate"] == len(seconds)
    errors = sum(counts[what] for what in ERRORS)
    assert counts["yield paths"] + errors == counts["accept a rate"]
    assert counts["yield paths"] > 0.97 * counts["accept a rate"]
    assert counts["paths in regions of torch.compile"] > 0.9 * counts["paths"]
    if timm.__version__ == "1.0.31":
        assert {what: counts[what] for what in COUNTS} == COUNTS
