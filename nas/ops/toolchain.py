"""What this machine has to compile ``csrc/`` with: a compiler, ninja, Python's headers, CUDA."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from nas.errors import NativeError


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that was asked what it is."""

    command: tuple[str, ...]
    name: str  # e.g. "g++ 12.2.0"
    clang: bool
    x86: bool  # it compiles for x86-64


@dataclass(frozen=True)
class Cuda:
    """Whether the CUDA sources are compiled: ``home`` is the toolkit, or None; and why."""

    home: Path | None
    why: str


# The oldest GPUs that the kernels compile for: tensor cores for TF32 and conversions to bfloat16
# begin there.
OLDEST = (8, 0)


def switched_on(name: str) -> bool:
    """Whether the environment has ``name`` set to anything but nothing or 0."""
    return os.environ.get(name, "0") not in ("", "0")


def find_compiler() -> Compiler:
    """The compiler that CXX names, else the system's.

    Raises:
        NativeError: there is none, or it is too old.
    """
    wish = os.environ.get("CXX", "")
    found = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if not wish and found is None:
        raise NativeError(
            "there is no C++ compiler: install one (Debian, Ubuntu: apt install g++; macOS: "
            "xcode-select --install) or name it in CXX"
        )
    try:
        command = tuple(shlex.split(wish or str(found)))
        ask = [*command, "-dM", "-E", "-x", "c++", os.devnull]
        answer = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise NativeError(
            f"the C++ compiler '{wish or found}' does not run ({_last_line(error)}): "
            "set CXX to one that does"
        ) from error
    macros = dict(line.split(" ", 2)[1:] for line in answer.splitlines() if line.count(" ") > 1)
    clang = "__clang__" in macros
    parts = ("clang_major", "clang_minor", "clang_patchlevel")
    if not clang:
        parts = ("GNUC", "GNUC_MINOR", "GNUC_PATCHLEVEL")
    version = [macros.get(f"__{part}__", "0") for part in parts]
    name = f"{'clang' if clang else 'g++'} {'.'.join(version)}"
    if int(version[0]) < 10:
        raise NativeError(f"{name} is too old for C++20: name g++ or clang 10 or newer in CXX")
    return Compiler(command, name, clang, "__x86_64__" in macros)


def find_ninja() -> str | None:
    """The ninja of this Python environment, else the system's, else None."""
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)))
    return shutil.which("ninja", path=path)


def python_headers() -> Path:
    """The folder of Python.h.

    Raises:
        NativeError: this Python came without its headers.
    """
    folder = Path(sysconfig.get_path("include"))
    if not (folder / "Python.h").is_file():
        raise NativeError(
            f"Python's headers are missing ({folder / 'Python.h'}): install them (Debian, Ubuntu: "
            "apt install python3-dev; Fedora: dnf install python3-devel)"
        )
    return folder


def find_cuda(sources: Path) -> Cuda:
    """Whether CUDA sources are compiled: FORCE_CUDA decides, else whether nvcc and a GPU are here.

    Raises:
        NativeError: FORCE_CUDA=1 without a fitting CUDA toolkit.
    """
    import torch

    wish = os.environ.get("FORCE_CUDA", "")
    if not any((sources / "cuda").glob("*.cu")):
        return Cuda(None, "no CUDA sources")
    if wish == "0":
        return Cuda(None, "FORCE_CUDA=0")
    home = find_cuda_home()
    if torch.version.cuda is None:
        lack = "this torch was built without CUDA"
    elif home is None:
        lack = "no CUDA toolkit in CUDA_HOME, beside nvcc or in /usr/local"
    elif (release := _nvcc_release(home)).split(".")[0] != torch.version.cuda.split(".")[0]:
        lack = f"nvcc is {release}, torch's CUDA {torch.version.cuda}"
    elif wish == "1":
        return Cuda(home, "FORCE_CUDA=1")
    elif not torch.cuda.is_available():
        lack = "no GPU; FORCE_CUDA=1 compiles for one elsewhere"
    elif not _capabilities():
        lack = f"no GPU of compute capability {_dotted(OLDEST)} or newer"
    else:
        return Cuda(home, "a GPU is here")
    if wish == "1":
        raise NativeError(f"FORCE_CUDA=1 cannot be met: {lack}")
    return Cuda(None, lack)


def find_cuda_home() -> Path | None:
    """The toolkit's folder, known by a header: nvcc in PATH may be a wrapper far from it."""
    nvcc = shutil.which("nvcc")
    candidates = [
        *(Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)),
        *([Path(nvcc).resolve().parents[1]] if nvcc else []),
        Path("/usr/local/cuda"),
        *sorted(Path("/usr/local").glob("cuda-*"), reverse=True),
    ]
    needed = ("bin/nvcc", "include/cuda_runtime.h")
    return next((home for home in candidates if all((home / n).exists() for n in needed)), None)


def _nvcc_release(home: Path) -> str:
    ask = [str(home / "bin" / "nvcc"), "--version"]
    answer = subprocess.run(ask, capture_output=True, text=True, check=False).stdout
    return answer.partition("release ")[2].partition(",")[0]


def cuda_architectures() -> tuple[str, ...]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST, else for the GPUs here, else for sm_80, sm_90 and,
    through PTX, newer ones.

    Of a list, which is often that of a whole machine, capabilities below ``OLDEST`` are left out.

    Raises:
        NativeError: the list has something else than compute capabilities, or only older ones.
    """
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    wanted = wish or ";".join(map(_dotted, _capabilities())) or "8.0;9.0+PTX"
    flags = []
    for item in wanted.replace(" ", ";").split(";"):
        number, _, ptx = item.partition("+")
        digits = number.replace(".", "")
        if number.count(".") != 1 or not digits.rstrip("af").isdigit() or ptx not in ("", "PTX"):
            raise NativeError(
                f"TORCH_CUDA_ARCH_LIST has '{item}': it takes capabilities, e.g. 8.0;9.0+PTX"
            )
        if int(number.partition(".")[0]) < OLDEST[0]:
            continue
        flags.append(f"-gencode=arch=compute_{digits},code=sm_{digits}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{digits},code=compute_{digits}")
    if not flags:
        raise NativeError(
            f"TORCH_CUDA_ARCH_LIST is '{wish}', and the kernels need {_dotted(OLDEST)} or newer"
        )
    return tuple(flags)


def _capabilities() -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs here that kernels can be compiled for, each once."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = {torch.cuda.get_device_capability(number) for number in range(count)}
    return sorted(capability for capability in found if capability >= OLDEST)


def _dotted(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)


def _last_line(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or "").strip().splitlines()
        return (lines or [f"exit status {error.returncode}"])[-1]
    return getattr(error, "strerror", None) or str(error)
