"""gpu-check where there is no GPU: it says so in one sentence and fails."""

from __future__ import annotations

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
    assert f"{gpu_check.NONE}\ngpu-check: 1\nsearched: 1 epoch\n" in done.stdout
    assert "skipped" in done.stdout.splitlines()[-1]
    assert "passed" not in done.stdout
