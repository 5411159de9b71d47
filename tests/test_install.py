"""What installing the plugin does to an environment that has torch and timm."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_installing_it_changes_nothing_that_is_there(tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", report]
    subprocess.run([*command, Path(__file__).parents[1]], check=True)
    installed = json.loads(report.read_text())["install"]
    assert [entry["metadata"]["name"] for entry in installed] == ["timm-rdp"]
