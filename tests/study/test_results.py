"""The results that the repository publishes: documents say what the committed tables say."""

import csv
import importlib.util
import re
import statistics
import sys
from pathlib import Path

import pytest

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


def test_what_is_said_of_statistics_estimated_anew_is_what_their_table_gives():
    folder = ROOT / "benchmarks" / "results" / "removed_statistics"
    page = (ROOT / "docs" / "results.md").read_text()
    said, page = (" ".join(t.split()) for t in ((folder / "README.md").read_text(), page))
    with open(folder / "statistics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for variant in ("rdp", "droppath-matched", "droppath-batch"):
        own = [row for row in rows if row["run"].startswith(f"{variant}-0.3-seed")]
        names = ("area_drawn", "area_drawn_anew")
        kept, anew = (statistics.mean(float(row[name]) for row in own) for name in names)
        assert f"| {variant} | {len(own)} | {kept:.3f} | {anew:.3f} |" in said
        assert variant != "rdp" or f"area goes from {kept:.3f} to {anew:.3f} with RDP" in page
