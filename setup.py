"""Compiles csrc/ into nas._native where torch and a compiler are; the rest is in pyproject.toml.

Without them the package installs all the same: it then compiles at first use, or runs eagerly.
"""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).parent))
from nas.errors import NativeError
from nas.ops import recipe
from nas.ops.toolchain import switched_on

FORCED = switched_on("NAS_TRANSFER_FORCE_EXTENSION")


class BuildNative(build_ext):
    """Leaves the compiling to nas.ops.recipe, and puts a stamp beside the result."""

    def run(self) -> None:
        self.built: recipe.Plan | None = None
        super().run()
        if self.built:
            file = self.get_ext_fullpath(self.extensions[0].name)  # in place where that was asked
            recipe.write_stamp(Path(file).parent, self.built)
            print(f"built nas._native: {self.built.summary}")

    def build_extension(self, ext: Extension) -> None:
        file, work = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp) / "native"
        try:
            plan = recipe.plan_build()
            recipe.compile_extension(plan, work)
        except NativeError as error:
            raise CompileError(f"{error}; without it nas runs eagerly, which is slower") from error
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(work / recipe.FILE, file)
        self.built = plan


class BuildPython(build_py):
    """Packs the C++ sources too, so that an installed package can compile them at first use."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        sources, packed = Path("csrc"), Path(self.build_lib) / "nas" / "_csrc"
        shutil.rmtree(packed, ignore_errors=True)
        for file in recipe.source_files(sources):
            copy = packed / file.relative_to(sources)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def extensions() -> list[Extension]:
    """The extension, or none and a line that says why."""
    if switched_on("NAS_TRANSFER_NO_EXTENSION"):
        reason = "NAS_TRANSFER_NO_EXTENSION is set"
    elif find_spec("torch") is None:
        reason = "there is no torch here; --no-build-isolation uses the environment's"
        if FORCED:
            raise SystemExit(f"NAS_TRANSFER_FORCE_EXTENSION is set, but {reason}")
    else:
        return [Extension(f"nas.{recipe.MODULE}", sources=[], optional=not FORCED)]
    print(f"nas._native is not built: {reason}", file=sys.stderr)
    return []


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
