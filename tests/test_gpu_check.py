"""gpu-check where there is no GPU: it says so in one sentence and fails."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu_check


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 1
    assert capsys.readouterr().out == gpu_check.NONE + "\n"
