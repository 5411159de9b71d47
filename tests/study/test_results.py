"""The results that the repository publishes: documents say what the committed tables say."""

import csv
import importlib.util
import re
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables():
    return script("results_table")


@pytest.fixture(scope="module")
def registered():
    return script("registered")


def test_the_tables_of_the_document_are_those_of_the_runs(tables):
    document = (ROOT / "docs" / "results_digits.md").read_text()
    for folder, title in tables.GRIDS.items():
        assert tables.table_of_grid(folder, title) in document
    assert tables.table_of_search() in document


def test_every_grid_of_the_commands_is_published(tables):
    commands = (ROOT / "benchmarks" / "compare_digits.sh").read_text()
    assert set(re.findall(r"--output output/compare/(\w+)", commands)) == set(tables.GRIDS)
    settings = re.findall(
        r"^explore (\w+)", (ROOT / "benchmarks/explore_digits.sh").read_text(), re.M
    )
    assert {p.name for p in (tables.RESULTS / "explore").iterdir()} == set(settings)


@pytest.mark.parametrize("table", sorted((ROOT / "benchmarks/results/compare").rglob("table.csv")))
def test_published_means_are_those_of_the_published_runs(tables, table):
    with open(table.parent / "runs.csv", newline="") as file:
        runs = list(csv.DictReader(file))
    for row in tables.read(table.parent):
        scores = [
            float(r["top1"])
            for r in runs
            if r["variant"] == row["variant"] and r["drop_path"] in (row["drop_path"], "0.0")
        ]
        assert len(scores) == int(row["seeds"])
        assert float(row["mean"]) == pytest.approx(statistics.mean(scores))
        assert float(row["sd"]) == pytest.approx(statistics.stdev(scores))


def test_what_the_page_says_of_the_registered_runs_is_what_their_tables_give(registered):
    folder = ROOT / "benchmarks" / "results" / "registered"
    text = registered.write(folder)
    assert text == (folder / "registered.md").read_text()
    table = text.split("\n\n")[1]
    assert table in (ROOT / "docs" / "results.md").read_text()


def test_what_is_said_of_removal_with_batch_norm_is_what_its_tables_give(registered):
    folder = ROOT / "benchmarks" / "results" / "removed_statistics"
    page = (ROOT / "docs" / "results.md").read_text()
    said, page = (" ".join(t.split()) for t in ((folder / "README.md").read_text(), page))
    before, anew = {}, {}  # areas by variant and seed
    for table in (folder.parent / "registered/e5/runs.csv", folder / "droppath_batch.csv"):
        with open(table, newline="") as file:
            for row in csv.DictReader(file):
                before[row["variant"], int(row["seed"])] = float(row["area_drawn"])
    with open(folder / "statistics.csv", newline="") as file:
        for row in csv.DictReader(file):
            variant, seed = row["run"].split("-0.3-seed")
            anew[variant, int(seed)] = float(row["area_drawn_anew"])
            assert float(row["area_drawn"]) == pytest.approx(before[variant, int(seed)])
    for variant in ("rdp", "droppath-matched", "droppath-batch"):
        own = [key for key in anew if key[0] == variant]
        kept, new = (statistics.mean(areas[key] for key in own) for areas in (before, anew))
        assert f"| {variant} | {len(own)} | {kept:.3f} | {new:.3f} |" in said
        assert variant != "rdp" or f"area goes from {kept:.3f} to {new:.3f} with RDP" in page

    def difference(one, variant, other, against, seeds):
        pairs = np.array([one[variant, seed] - other[against, seed] for seed in seeds])
        low, high = registered.Pairs("", pairs, None).interval
        return f"{pairs.mean():+.3f}", f"{low:+.3f} to {high:+.3f}"

    batch, left = range(300, 306), range(303, 308)
    assert "({}, {})".format(*difference(before, "droppath-batch", before, "rdp", batch)) in said
    against = "({}, {})".format(*difference(before, "droppath-batch", before, "droppath", batch))
    assert against in said
    now = "{} ({})".format(*difference(anew, "rdp", anew, "droppath-matched", left))
    assert f"RDP is then {now} from DropPath" in said
    kept = difference(anew, "rdp", before, "droppath-matched", left)
    assert "{} ({})".format(*kept) in said and "({}, {}, five seeds".format(*kept) in page


def test_statistics_are_estimated_anew_without_training_the_rest():
    torch.manual_seed(0)
    norm, drop = nn.BatchNorm1d(3), nn.Dropout(0.5)
    model = nn.Sequential(nn.Linear(3, 3), norm, drop).eval()
    weights = {n: p.clone() for n, p in model.named_parameters()}
    norm.running_mean.fill_(7.0)
    batches = [torch.randn(8, 3) for _ in range(3)]
    drop.register_forward_hook(lambda module, *_: pytest.fail("drops") if module.training else None)
    with torch.no_grad():
        script("removed_statistics").estimate(model, batches)
        outputs = [model[0](x) for x in batches]
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(0) for x in outputs]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var(0) for x in outputs]).mean(0))
    assert not norm.training and all(p.equal(weights[n]) for n, p in model.named_parameters())
