"""The compiled extension ``nas._native``: found, or built on the spot, or a reason why not.

``python -m nas.ops.build`` says which, and what it was built with.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from nas.errors import NativeError
from nas.ops import recipe
from nas.ops.toolchain import find_cuda, switched_on

# Everything in the environment that changes what a compiler is asked to do.
SHAPING = ("CXX", "DEBUG", "FORCE_CUDA", "NAS_TRANSFER_SANITIZE", "TORCH_CUDA_ARCH_LIST")

_loading = threading.Lock()
_loaded: list[Extension] = []


@dataclass(frozen=True)
class Extension:
    """``module`` is nas._native, or None; ``reason`` says how it was built, or why it is not."""

    module: ModuleType | None
    reason: str


def load(say: Callable[[str], None] = print) -> Extension:
    """The compiled extension, once per process; from any thread.

    It is taken from the package where it was installed or built in place. Where it is missing or
    does not fit, it is compiled into the folder of torch's extensions (TORCH_EXTENSIONS_DIR), once
    for all processes and runs. NAS_TRANSFER_NO_EXTENSION=1 forbids both.

    Args:
        say: is told, in one line, that a compilation starts.
    """
    with _loading:
        if not _loaded:
            _loaded.append(_load(say))
        return _loaded[0]


def _load(say: Callable[[str], None]) -> Extension:
    if switched_on("NAS_TRANSFER_NO_EXTENSION"):
        return Extension(None, "NAS_TRANSFER_NO_EXTENSION is set")
    reasons = []
    for find in (installed, lambda: compiled(say)):
        try:
            folder = find()
            return Extension(_import(folder), _read_stamp(folder)["summary"])
        except NativeError as error:
            reasons.append(str(error))
    return Extension(None, "; ".join(reasons))


def installed() -> Path:
    """The folder of the extension that came with the package or was built in place.

    Raises:
        NativeError: it is not there, was built for something else, or lacks a CUDA that is forced.
    """
    folder = Path(__file__).parents[1]
    if switched_on("NAS_TRANSFER_SANITIZE"):
        raise NativeError("NAS_TRANSFER_SANITIZE asks for an extension of its own")
    check(folder)
    if os.environ.get("FORCE_CUDA") == "1" and "no CUDA" in _read_stamp(folder)["summary"]:
        raise NativeError("FORCE_CUDA=1 asks for CUDA, which the package's extension is without")
    return folder


def compiled(say: Callable[[str], None] = print) -> Path:
    """The folder of the extension in torch's cache of extensions, compiled now if need be.

    Safe while other processes do the same, and after one was killed at it.

    Raises:
        NativeError: it cannot be compiled, or the folder cannot be written.
    """
    folder = _cache_folder()
    if _fits(folder):
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock", say) as lock:
            if not _fits(folder):
                plan = recipe.plan_build()
                say(
                    f"compiling the native kernels for torch {torch.__version__}, which takes a "
                    f"few minutes once; see {folder / 'build.log'}"
                )
                recipe.compile_extension(plan, folder, keep_open=[lock])
                recipe.write_stamp(folder, plan)
    except OSError as error:
        raise NativeError(
            f"cannot compile into {folder} ({error.strerror}): set TORCH_EXTENSIONS_DIR to a "
            "folder that can be written"
        ) from error
    return folder


def check(folder: Path) -> None:
    """See that ``folder`` has an extension for this Python, this torch and these sources.

    It is not loaded for that: code for another torch can crash before it can be asked.

    Raises:
        NativeError: it has not; the message says what to do.
    """
    stamp = _read_stamp(folder)
    rebuild = f"rebuild it with `{_rebuild_command()}`"
    if not stamp or not (folder / recipe.FILE).is_file():
        raise NativeError(f"the package has no compiled {recipe.FILE}")
    if stamp.get("torch") != torch.__version__:
        raise NativeError(
            f"nas._native was built for torch {stamp.get('torch')} and this is "
            f"{torch.__version__}; {rebuild}"
        )
    if stamp.get("sources") != recipe.source_digest(recipe.source_folder()):
        raise NativeError(f"the C++ sources have changed since nas._native was built; {rebuild}")


def _cache_folder() -> Path:
    sources = recipe.source_folder()
    shaping = [os.environ.get(name, "") for name in SHAPING]
    cuda = find_cuda(sources).home is not None
    content = json.dumps([recipe.source_digest(sources), shaping, cuda])
    digest = hashlib.sha256(content.encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache)
    tag = sysconfig.get_config_var("SOABI") or platform.machine()
    return root.absolute() / "nas_transfer" / f"torch-{torch.__version__}-{tag}-{digest[:16]}"


@contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[int]:
    """Hold ``path``; gives the descriptor, which compilers inherit.

    A process that dies lets go of it, but not before the compilers that it started have ended,
    so no two ever write the same folder.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process, which compiles the native kernels")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _read_stamp(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / recipe.STAMP).read_text()))
    except (OSError, ValueError):
        return {}


def _fits(folder: Path) -> bool:
    try:
        check(folder)
    except NativeError:
        return False
    return True


def _rebuild_command() -> str:
    checkout = Path(__file__).parents[2]
    if (checkout / "setup.py").is_file() and (checkout / "csrc").is_dir():
        return "python setup.py build_ext --inplace"
    return "pip install --no-build-isolation --force-reinstall --no-deps nas-transfer"


def _import(folder: Path) -> ModuleType:
    name = f"nas.{recipe.MODULE}"
    spec = importlib.util.spec_from_file_location(name, folder / recipe.FILE)
    if spec is None or spec.loader is None:
        raise NativeError(f"{folder / recipe.FILE} is no Python extension")
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise NativeError(f"{folder / recipe.FILE} does not load: {error}") from error
    sys.modules[name] = module
    return module


def main() -> None:
    """Print how the extension was built, or why it is not used."""
    extension = load()
    if extension.module is None:
        print(f"eager: {extension.reason}")
        return
    print(f"native: {extension.reason}")
    for name, value in extension.module.build_info().items():
        print(f"  {name:18}{value}")


if __name__ == "__main__":
    main()
