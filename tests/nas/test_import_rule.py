"""Imports point one way: pipeline -> nas -> csrc, and inside nas from spaces to operations."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FORBIDDEN = {"mlflow", "optuna", "ray", "pipeline"}
NEVER = {"pickle", "dill", "cloudpickle", "joblib", "marshal"}


def imports(file: Path) -> Iterator[str]:
    """Full names of everything that ``file`` imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules() -> dict[str, Path]:
    found = {}
    for file in sorted((ROOT / "nas").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = file
    return found


def test_the_scan_sees_the_library() -> None:
    assert {"nas", "nas.ops.mixed", "nas.search.bilevel", "nas.data.task"} <= set(modules())


def test_nas_imports_no_tracking_and_no_pipeline() -> None:
    for name, file in modules().items():
        roots = {target.split(".")[0] for target in imports(file)}
        assert not roots & FORBIDDEN, name


def test_operations_know_no_space() -> None:
    for name, file in modules().items():
        if name.startswith("nas.ops"):
            assert not [target for target in imports(file) if target.startswith("nas.spaces")], name


def test_a_fresh_process_loads_none_of_them() -> None:
    """Also what the libraries that nas uses bring along."""
    code = (
        "import importlib, sys\n"
        f"for name in {sorted(modules())!r}: importlib.import_module(name)\n"
        f"print(sorted({FORBIDDEN!r} & {{name.split('.')[0] for name in sys.modules}}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_nothing_that_is_loaded_can_run() -> None:
    """No eval, exec or torch.load anywhere; a pickle only behind a restricted unpickler."""
    for name, file in modules().items():
        tree = ast.parse(file.read_text())
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {"eval", "exec", "torch.load", "pickle.load", "pickle.loads"}, name
        unsafe = {target.split(".")[0] for target in imports(file)} & NEVER
        if unsafe:
            assert unsafe == {"pickle"}, name
            bases = {
                ast.unparse(base)
                for node in ast.walk(tree)
                if isinstance(node, ast.ClassDef)
                for base in node.bases
            }
            assert bases & {"pickle.Unpickler", "Unpickler"}, name
