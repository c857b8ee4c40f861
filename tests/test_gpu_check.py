"""gpu-check where there is no GPU: what it says, and how it keeps what its parts find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_steps


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 1
    assert capsys.readouterr().out == gpu_check.NONE + "\n"


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")


@pytest.mark.usefixtures("pretended")
def test_its_results_are_written(tmp_path: Path) -> None:
    step = {"kind": "step", **vars(gpu_steps.Case("darts", 64, "tf32", "native"))}
    speed = {"median_ms": 2.0, "min_ms": 1.0, "peak_mb": 7.4, "tflop_s": 20.0, "gb_s": 500.0}
    search = {"kind": "search", "method": "pcdarts", "batch": 256, "numbers": "tf32"}
    gpu_check.write(
        tmp_path / "results" / "gpu.json",
        [{"part": "tests", "outcome": "done", "seconds": 12.0}],
        [
            {"kind": "rates", "copy_gb_s": 1000.0, "tf32_tflop_s": 200.0},
            step | speed | {"gflop": 40.0, "gigabytes": 1.0},  # at best 0.2 and 1 ms
            step | {"left_out": "why"},
            search | {"epoch_seconds": 2.0, "search_seconds": 100.0},
            search | {"left_out": "why"},
        ],
    )
    results = json.loads((tmp_path / "results" / "gpu.json").read_text())
    assert results["device"] == "Some GPU"
    assert results["rows"][1]["median_ms"] == 2.0
    table = (tmp_path / "results" / "gpu.md").read_text().splitlines()
    assert "| tests | done | 12.0 |" in table
    assert "| darts | 64 | tf32 | native | 2.00 | 7 | 20.0 | 500 | 2.00 |" in table
    assert "| pcdarts | 256 | tf32 | 100 |" in table
    assert sum("why" in line for line in table) == 2


def test_what_a_step_does_is_counted() -> None:
    """docs/kernels.md has 24.0 and 4.5 GFLOP for batches of 8."""
    for method, gflop in (("darts", 24.0), ("pcdarts", 4.5)):
        case = gpu_steps.Case(method, 64, "float32", "native")
        wide, narrow = (
            gpu_steps.speed(replace(case, numbers=numbers), 4.0)
            for numbers in ("float32", "bfloat16")
        )
        assert wide["gflop"] == pytest.approx(8 * gflop, rel=0.02)
        assert wide["tflop_s"] == wide["gflop"] / 4
        assert narrow["gigabytes"] < 0.6 * wide["gigabytes"]


@pytest.mark.parametrize("method", ["darts", "pcdarts"])
@pytest.mark.parametrize("numbers", gpu_steps.NUMBERS)
def test_a_step_gives_every_gradient(method: str, numbers: str) -> None:
    """Here on the CPU; PyTorch's switches are as before then."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        case = gpu_steps.Case(method, 4, numbers, "channels-last")
        gradients = gpu_steps.make_step(case, 4, 3, 8, device=torch.device("cpu"))()
        assert torch.backends.cuda.matmul.allow_tf32 == (numbers == "tf32")
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    assert len(gradients) == (3 if method == "pcdarts" else 2)
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert gradient.any()


def test_all_steps_of_a_part_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_steps, "measure", lambda case, peers: {"left_out": str(peers)})
    rows = tmp_path / "rows"
    assert gpu_steps.main(["authors", "--rows", str(rows), "--peers", "there"]) == 0
    found = [json.loads(line) for line in rows.read_text().split("\n") if line]
    assert len(found) == 2 * 2 * 3
    assert {row["implementation"] for row in found} == {"authors"}
    assert {row["left_out"] for row in found} == {"there"}


def test_most_telling_parts_come_first_and_all_fit_into_nine_minutes(tmp_path: Path) -> None:
    parts = gpu_check.parts(tmp_path / "rows", tmp_path)
    names = [part.name for part in parts]
    assert names[:4] == ["build", "tests", "rates", "native"]
    assert set(gpu_steps.IMPLEMENTATIONS) < set(names)
    assert [part.name for part in parts if part.needed] == ["build"]
    assert gpu_check.SECONDS + gpu_check.LEAST < 9 * 60
    assert "authors" not in [part.name for part in gpu_check.parts(tmp_path / "rows", None)]


def part(name: str, script: str, seconds: float = 60, needed: bool = False) -> gpu_check.Part:
    return gpu_check.Part(name, (sys.executable, "-c", script), seconds, needed)


@pytest.mark.usefixtures("pretended")
def test_what_was_found_is_kept_however_a_part_ends(
    tmp_path: Path,
) -> None:
    rows, path = tmp_path / "rows", tmp_path / "gpu.json"
    note = f"open({str(rows)!r}, 'a').write"
    row = '{"kind": "search", "method": "darts", "batch": 1, "numbers": "tf32", "left_out": "%s"}'
    hangs = f"import os, time; {note}('\\n{row % 1}\\n{{half a r'); os.fork(); time.sleep(600)"
    outcomes = gpu_check.run_parts(
        [
            part("hangs", hangs, seconds=3),
            part("fails", f"{note}('\\n{row % 2}'); raise SystemExit(3)"),
            part("ends", "pass"),
        ],
        rows,
        path,
        time.monotonic(),
    )
    assert [outcome["outcome"] for outcome in outcomes] == [
        "ended after 3 s",
        "failed with status 3",
        "done",
    ]
    assert [found["left_out"] for found in json.loads(path.read_text())["rows"]] == ["1", "2"]
    late = gpu_check.run_parts([part("ends", "pass")], rows, path, time.monotonic() - 519)
    assert late[0]["outcome"] == "no time left"


@pytest.mark.usefixtures("pretended")
def test_without_a_build_nothing_else_is_tried(tmp_path: Path) -> None:
    both = [part("build", "raise SystemExit(1)", needed=True), part("tests", "pass")]
    outcomes = gpu_check.run_parts(both, tmp_path / "rows", tmp_path / "a.json", time.monotonic())
    assert [outcome["part"] for outcome in outcomes] == ["build"]


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
