"""gpu-check where there is no GPU: it says so in one sentence and fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 1
    assert capsys.readouterr().out == gpu_check.NONE + "\n"


def test_its_results_are_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    case = vars(gpu_check.Case("darts", 64, "tf32", "native"))
    search = {"method": "pcdarts", "batch": 256, "numbers": "tf32"}
    gpu_check.write(
        tmp_path / "results" / "gpu.json",
        {"copy_gb_s": 1.0},
        [case | {"median_ms": 1.25, "min_ms": 1.0, "peak_mb": 7.4}, case | {"left_out": "why"}],
        [search | {"epoch_seconds": 2.0, "search_seconds": 100.0}, search | {"left_out": "why"}],
    )
    results = json.loads((tmp_path / "results" / "gpu.json").read_text())
    assert results["device"] == "some-gpu"
    assert results["steps"][0]["median_ms"] == 1.25
    assert results["searches"][0]["search_seconds"] == 100.0
    table = (tmp_path / "results" / "gpu.md").read_text().splitlines()
    assert "| darts | 64 | tf32 | native | 1.25 | 7 |" in table
    assert "| pcdarts | 256 | tf32 | 100 |" in table
    assert sum("why" in line for line in table) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would do all that make gpu-check does")
def test_it_needs_no_other_packages_than_it_says() -> None:
    """torch, numpy, pytest and hypothesis: the tests are collected and skipped, a search runs."""
    script = Path(__file__).parent / "bare_machine.py"
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, **alone},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{gpu_check.NONE}\ngpu-check: 1\nsearched: True\n" in done.stdout
    assert "skipped" in done.stdout.splitlines()[-1]
    assert "passed" not in done.stdout
