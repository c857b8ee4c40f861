"""A Python that has nothing but torch, numpy, pytest and hypothesis, and what they need themselves.

``python tests/bare_machine.py`` does there what make gpu-check does on a machine with a GPU, as far
as that goes without one; tests/test_gpu_check.py runs it.
"""

from __future__ import annotations

import importlib.abc
import importlib.metadata
import os
import re
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
ALLOWED = ("torch", "numpy", "pytest", "hypothesis")


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needed_by(names: Iterable[str]) -> set[str]:
    """``names`` and every distribution that they need."""
    needed: set[str] = set()
    waiting = list(names)
    while waiting:
        name = _normalised(waiting.pop())
        if name in needed:
            continue
        needed.add(name)
        try:
            wishes = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of another platform or Python
            continue
        waiting += [re.split(r"[^\w.-]", wish)[0] for wish in wishes if "extra ==" not in wish]
    return needed


class Missing(importlib.abc.MetaPathFinder):
    """Finds what ``finders`` find, but no installed package beside ``ALLOWED`` and ours."""

    def __init__(self, finders: Sequence[Any]) -> None:
        self.finders = tuple(finders)
        allowed = needed_by(ALLOWED)
        packages = importlib.metadata.packages_distributions()
        self.refused = {
            package
            for package, distributions in packages.items()
            if not allowed & {_normalised(name) for name in distributions}
        } - {"nas", "pipeline"}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None where it is not to be had, as on a machine that never had it."""
        if name.partition(".")[0] in self.refused:
            return None
        found = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in found if spec is not None), None)


def main() -> int:
    """The script; returns its exit status."""
    sys.path.insert(0, str(ROOT))
    missing = Missing(sys.meta_path)
    sys.meta_path[:] = [missing]
    for name in ("mlflow", "optuna", "PIL", "safetensors"):
        assert name in missing.refused, f"{name} is not installed: nothing is shown here"
    import pytest
    import torch

    from benchmarks import gpu_check, gpu_steps
    from nas.search import METHODS, SearchConfig
    from nas.spaces.darts.supernet import SupernetConfig

    print(f"gpu-check: {gpu_check.main([])}")
    os.environ["NAS_TRANSFER_NO_EXTENSION"] = "1"  # or it would be compiled
    small = SearchConfig(SupernetConfig(2, 3), batch_size=8)
    task, cpu = gpu_steps.noise(48, 8, 1), torch.device("cpu")
    seconds = gpu_steps.epoch_seconds(task, METHODS["darts"], small, cpu)
    print(f"searched: {seconds > 0}")
    return int(pytest.main(["-p", "no:cacheprovider", *(str(ROOT / t) for t in gpu_check.TESTS)]))


if __name__ == "__main__":
    sys.exit(main())
