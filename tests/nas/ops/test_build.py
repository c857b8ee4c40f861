"""The build of csrc/: flags, packages, the build at first use, and every way it can be missing.

Whole builds are tried on a copy of the project with a small csrc/ of the same layout, which a
compiler does in a second, and in processes of their own: an extension can be loaded only once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch

from nas.errors import NativeError
from nas.ops import build, recipe, toolchain
from nas.ops.toolchain import Compiler, Cuda

ROOT = Path(__file__).parents[3]
TARGETS = ["portable", "avx2", "avx512"]
GCC = Compiler(("g++",), "g++ 12.2.0", clang=False, x86=True)
SWITCHES = (
    *build.SHAPING,
    "MAX_JOBS",
    "NAS_TRANSFER_NO_EXTENSION",
    "NAS_TRANSFER_FORCE_EXTENSION",
)
BINDINGS = """
#include <Python.h>
int instruction_set();
static PyObject* build_info(PyObject*, PyObject*) { return PyLong_FromLong(instruction_set()); }
static PyMethodDef methods[] = {{"build_info", build_info, METH_NOARGS, ""}, {}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", "", -1, methods};
PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&module); }
"""
SHOW = (
    "from nas.ops.build import load; import json; found = load(); "
    "print(json.dumps([getattr(found.module, '__file__', None), found.reason]))"
)


@pytest.fixture(autouse=True)
def _no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def compiler() -> Compiler:
    try:
        toolchain.python_headers()
        return toolchain.find_compiler()
    except NativeError as error:
        pytest.skip(str(error))


def copy_project(to: Path) -> Path:
    """The files that packaging needs, without what was compiled."""
    for name in ("nas", "csrc"):
        shutil.copytree(
            ROOT / name, to / name, ignore=shutil.ignore_patterns("_native*", "__pycache__")
        )
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    for name in ("requirements.txt", "constraints.txt"):
        shutil.copy(ROOT / name, to)
    return to


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project with a small csrc/; its path has a space, as a user's may."""
    folder = copy_project(tmp_path / "a project")
    shutil.rmtree(folder / "csrc")
    (folder / "csrc" / "cpu").mkdir(parents=True)
    (folder / "csrc" / "bindings.cpp").write_text(BINDINGS)
    (folder / "csrc" / "cpu" / "probe.h").write_text("int instruction_set();\n")
    for target in TARGETS:
        body = "int instruction_set() { return 7; }" if target == "portable" else ""
        source = f'#include "cpu/probe.h"\n{body}\n'
        (folder / "csrc" / "cpu" / f"probe_{target}.cpp").write_text(source)
    return folder


def environment(project: Path, **extra: str) -> dict[str, str]:
    cache = str(project.parent / "extensions")
    return {**os.environ, "PYTHONPATH": str(project), "TORCH_EXTENSIONS_DIR": cache, **extra}


def python(project: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=project.parent if arguments[0] == "-c" else project,
        env=environment(project, **extra),
        capture_output=True,
        text=True,
        check=False,
    )


def loaded(project: Path, **extra: str) -> tuple[str | None, str, str]:
    """File and reason of ``load()`` in a new process, and what it printed before."""
    done = python(project, "-c", SHOW, **extra)
    assert done.returncode == 0, done.stderr
    *said, answer = done.stdout.splitlines()
    file, reason = json.loads(answer)
    return file, reason, "\n".join(said)


def held_compiler(folder: Path, compiler: Compiler) -> Path:
    """A compiler that waits for the file ``go`` and notes the files that it begins and ends."""
    script = folder / "held-c++"
    script.write_text(
        "#!/bin/sh\n"
        f"log={folder / 'compiled.log'}\n"
        'note() { case "$*" in *" -c "*) echo $word >> $log;; esac; }\n'
        'word=begin; note "$@"\n'
        f'case "$*" in *" -c "*) while [ ! -e {folder / "go"} ]; do sleep 0.05; done;; esac\n'
        f'{" ".join(compiler.command)} "$@" || exit\n'
        'word=end; note "$@"\n'
    )
    script.chmod(0o755)
    return script


def begin(project: Path, out: Path, **extra: str) -> subprocess.Popen[bytes]:
    """Start a process, and a group of processes, that loads; ``out`` gets what it says."""
    with out.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-u", "-c", SHOW],
            env=environment(project, **extra),
            cwd=project.parent,
            stdout=file,
            start_new_session=True,
        )


def wait_for(text: str, *files: Path) -> None:
    deadline = time.monotonic() + 120
    while not any(file.exists() and text in file.read_text() for file in files):
        assert time.monotonic() < deadline, f"no '{text}' in {files}"
        time.sleep(0.05)


# Flags


def unit_flags(compiler: Compiler = GCC) -> dict[str, tuple[str, ...]]:
    units = recipe.units(ROOT / "csrc", compiler, Cuda(None, "not asked"))
    return {unit.source.name: unit.flags for unit in units}


@pytest.mark.parametrize("switch", ["", "DEBUG", "NAS_TRANSFER_SANITIZE"])
def test_flags_bind_to_no_machine_and_bend_no_number(
    switch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if switch:
        monkeypatch.setenv(switch, "1")
    for name, flags in unit_flags().items():
        text = " ".join(flags)
        for forbidden in ("march", "mtune", "fast-math", "Ofast", "unsafe", "finite", "use_fast"):
            assert forbidden not in text, name


def test_only_the_kernels_files_have_vector_flags() -> None:
    seen = set()
    for name, flags in unit_flags().items():
        target = name.removesuffix(".cpp").rpartition("_")[2]
        vector = {flag for flag in flags if flag.startswith("-m")}
        if target in ("avx2", "avx512"):
            seen.add(target)
            assert {"-mavx2", "-mfma"} <= vector
            assert ("-mavx512f" in vector) == (target == "avx512")
        else:
            assert not vector, name
    assert seen == {"avx2", "avx512"}


def test_kernels_see_no_torch_header() -> None:
    for name, flags in unit_flags().items():
        kernel = name.removesuffix(".cpp").rpartition("_")[2] in TARGETS
        assert any("torch/include" in flag for flag in flags) != kernel, name


def test_plainest_objects_are_linked_first() -> None:
    """The linker keeps the first copy of an inline function, which must run everywhere."""
    targets = [name.removesuffix(".cpp").rpartition("_")[2] for name in unit_flags()]
    ranks = [TARGETS.index(target) if target in TARGETS else -1 for target in targets]
    assert ranks == sorted(ranks)
    assert ranks[0] == -1


def test_other_processors_compile_the_portable_kernels_only() -> None:
    arm = Compiler(("g++",), "g++ 12.2.0", clang=False, x86=False)
    names = unit_flags(arm)
    assert any("portable" in name for name in names)
    assert not any("avx" in name for name in names)


def test_sanitizers_replace_optimisation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAS_TRANSFER_SANITIZE", "1")
    for flags in unit_flags().values():
        assert {"-O1", "-fsanitize=address,undefined"} <= set(flags)
        assert "-O3" not in flags


def objects() -> list[Path]:
    """What ``make`` compiled for the extension in place."""
    try:
        build.installed()
    except NativeError as error:
        pytest.skip(f"{error}; make builds it")
    tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    folder = ROOT / "build" / f"temp.{tag}" / "native"
    names = [path.relative_to(ROOT / "csrc") for path in (ROOT / "csrc").rglob("*.cpp")]
    found = [folder / f"{name}.o" for name in names if (folder / f"{name}.o").exists()]
    if not found or shutil.which("objdump") is None or "x86" not in tag:
        pytest.skip("needs the objects of an x86-64 build in place, and objdump")
    return found


def test_only_the_kernels_objects_have_wide_vectors() -> None:
    """Read from the machine code: the rest must run on a processor without AVX."""
    for path in objects():
        target = path.name.removesuffix(".cpp.o").rpartition("_")[2]
        listing = subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", str(path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        if target not in ("avx2", "avx512"):
            assert "%ymm" not in listing, path.name
        if target != "avx512":
            assert "%zmm" not in listing, path.name


def test_builds_of_the_kernels_share_no_function() -> None:
    """A shared inline function of ours would be linked once, in its plainest form."""
    defined: dict[str, set[str]] = {}
    for path in objects():
        target = path.name.removesuffix(".cpp.o").rpartition("_")[2]
        if target in TARGETS:
            listing = subprocess.run(
                ["nm", "-C", "--defined-only", "--extern-only", str(path)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            names = {line.split(" ", 2)[2] for line in listing.splitlines()}
            defined[target] = {name for name in names if "nas" in name}
    assert len(defined) == len(TARGETS)
    assert not set.intersection(*defined.values())
    assert not defined["avx2"] & defined["avx512"]


# What is missing


@pytest.mark.parametrize("value", ["/nonexistent/c++ -m64", "false", "an 'open quote", " "])
def test_unusable_compiler_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", value)
    with pytest.raises(NativeError, match=f"'{re.escape(value)}' does not run .*: set CXX"):
        toolchain.find_compiler()


def test_no_compiler_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeError, match="no C\\+\\+ compiler: install one"):
        toolchain.find_compiler()


def test_old_compiler_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\necho '#define __GNUC__ 9'\necho '#define __GNUC_MINOR__ 4'\n")
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    with pytest.raises(NativeError, match=r"g\+\+ 9\.4\.0 is too old for C\+\+20"):
        toolchain.find_compiler()


def test_compiler_says_what_it_is(compiler: Compiler) -> None:
    asked = subprocess.run(
        [*compiler.command, "--version"], capture_output=True, text=True, check=True
    ).stdout
    assert compiler.name.split()[1] in asked
    assert compiler.clang == ("clang" in asked)


@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "no-ninja"])
def test_edges_are_made_with_ninja_and_without(
    ninja: bool, compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if ninja and toolchain.find_ninja() is None:
        pytest.skip("there is no ninja here")
    if not ninja:
        monkeypatch.setattr(recipe, "find_ninja", lambda: None)
    sources = {"a b/one$.cpp": "int two();\nint main() { return two(); }", "two.cpp": "int two() {"}
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    edges = [
        recipe.compile_edge(f"objects/{number}.o", tmp_path / name, compiler.command)
        for number, name in enumerate(sources)
    ]
    edges.append(recipe.link_edge("program", edges, compiler, (), ()))

    def make() -> tuple[int, str]:
        with (tmp_path / "log").open("w") as log:
            status = recipe.make(edges, tmp_path / "made", log)
        return status, (tmp_path / "log").read_text()

    status, said = make()
    assert status != 0
    assert "error:" in said
    assert not (tmp_path / "made" / "program").exists()
    (tmp_path / "two.cpp").write_text("int two() { return 7; }")
    assert make()[0] == 0
    assert subprocess.run([str(tmp_path / "made" / "program")], check=False).returncode == 7


def test_a_missing_ninja_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert toolchain.find_ninja() is None


def test_missing_python_headers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(NativeError, match=r"Python\.h\).*python3-dev"):
        toolchain.python_headers()


def test_cuda_is_decided_aloud(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert toolchain.find_cuda(tmp_path) == Cuda(None, "no CUDA sources")
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "cell.cu").touch()
    monkeypatch.setenv("FORCE_CUDA", "0")
    assert toolchain.find_cuda(tmp_path) == Cuda(None, "FORCE_CUDA=0")
    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.setattr(toolchain, "find_cuda_home", lambda: None)
    with pytest.raises(NativeError, match="FORCE_CUDA=1 cannot be met: no CUDA toolkit"):
        toolchain.find_cuda(tmp_path)


@pytest.fixture
def toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A CUDA toolkit that fits torch."""
    monkeypatch.setattr(toolchain, "find_cuda_home", lambda: tmp_path)
    monkeypatch.setattr(toolchain, "_nvcc_release", lambda home: "13.0")
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    return tmp_path


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda n: capabilities[n])


@pytest.mark.parametrize(
    ("wish", "gpus", "builds", "why"),
    [
        ("", [(9, 0)], True, "a GPU is here"),
        ("", [(7, 5), (8, 6)], True, "a GPU is here"),
        ("", [(7, 5)], False, "no GPU of compute capability 8.0 or newer"),
        ("", [], False, "no GPU; FORCE_CUDA=1 compiles for one elsewhere"),
        ("0", [(9, 0)], False, "FORCE_CUDA=0"),
        ("1", [], True, "FORCE_CUDA=1"),
    ],
)
def test_cuda_is_compiled_where_it_can_run_or_is_asked_for(
    wish: str,
    gpus: list[tuple[int, int]],
    builds: bool,
    why: str,
    toolkit: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_CUDA", wish)
    pretend_gpus(monkeypatch, *gpus)
    cuda = toolchain.find_cuda(ROOT / "csrc")
    assert cuda == Cuda(toolkit if builds else None, why)
    rules = {unit.rule for unit in recipe.units(ROOT / "csrc", GCC, cuda)}
    assert rules == ({"cxx", "nvcc"} if builds else {"cxx"})


def test_a_build_says_what_it_is_for_and_why(
    toolkit: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    for wish, said in (
        ("0", "no CUDA (FORCE_CUDA=0)"),
        ("1", "CUDA for sm_80 sm_90 compute_90 (FORCE_CUDA=1)"),
    ):
        monkeypatch.setenv("FORCE_CUDA", wish)
        plan = recipe.plan_build()
        assert plan.summary.endswith(f", {said}")
        nvcc = [edge for edge in plan.edges if str(toolkit / "bin" / "nvcc") in edge.command]
        assert len(nvcc) == (wish == "1") * len([*(ROOT / "csrc" / "cuda").glob("*.cu")])
        for edge in nvcc:
            assert "-gencode=arch=compute_80,code=sm_80" in edge.command


def test_cuda_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, (9, 0))
    codes = {
        "80": "-gencode=arch=compute_80,code=sm_80",
        "90": "-gencode=arch=compute_90,code=sm_90",
        "90 PTX": "-gencode=arch=compute_90,code=compute_90",
    }
    for wish, names in (
        ("8.0;9.0+PTX", ["80", "90", "90 PTX"]),
        ("7.0 7.5 8.0", ["80"]),  # as of a whole machine
        ("", ["90"]),
    ):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
        assert toolchain.cuda_architectures() == tuple(codes[name] for name in names)
    for wish, message in (("Hopper", "has 'Hopper'"), ("7.5", "'7.5', and the kernels need 8.0")):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
        with pytest.raises(NativeError, match=message):
            toolchain.cuda_architectures()


def test_without_a_gpu_cuda_is_compiled_for_all_that_may_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_gpus(monkeypatch)
    flags = toolchain.cuda_architectures()
    assert [flag.rpartition("=")[2] for flag in flags] == ["sm_80", "sm_90", "compute_90"]


# The build at first use


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder of extensions, in a process that has loaded none."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(build, "_loaded", [])
    return tmp_path / "extensions"


def test_without_a_compiler_there_is_a_reason(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> Path:
        raise NativeError("it was not built")

    monkeypatch.setattr(build, "installed", missing)
    monkeypatch.setenv("CXX", "/nonexistent")
    found = build.load()
    assert found.module is None
    assert found.reason.startswith("it was not built; the C++ compiler '/nonexistent' does not run")
    build.main()
    assert capsys.readouterr().out == f"eager: {found.reason}\n"


def test_switched_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAS_TRANSFER_NO_EXTENSION", "1")
    assert build.load() == build.Extension(None, "NAS_TRANSFER_NO_EXTENSION is set")
    assert not cache.exists()


def test_unwritable_cache_is_a_reason(cache: Path) -> None:
    cache.write_text("a file, where a folder should be")
    with pytest.raises(NativeError, match="set TORCH_EXTENSIONS_DIR to a folder"):
        build.compiled()


def test_broken_code_is_a_reason_too(
    project: Path, compiler: Compiler, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "csrc" / "cpu" / "probe.h").write_text("int instruction_set();\n#error no luck\n")
    monkeypatch.setattr(recipe, "source_folder", lambda: project / "csrc")
    said: list[str] = []
    with pytest.raises(NativeError, match=r"the compiler stopped: .*no luck.*build\.log"):
        build.compiled(said.append)
    assert len(said) == 1


def test_processes_at_once_compile_once(project: Path, compiler: Compiler) -> None:
    """And from an installed wheel that brings no extension, but its sources."""
    wanted = sources_of(project / "csrc")
    units = unit_names(project)
    site, name = unpacked_wheel(project, NAS_TRANSFER_NO_EXTENSION="1")
    assert name.endswith("-none-any.whl")
    assert sources_of(site / "nas" / "_csrc") == wanted

    here = site.parent
    extra = {"CXX": str(held_compiler(here, compiler))}
    outs = [here / "first.txt", here / "second.txt"]
    both = [begin(site, out, **extra) for out in outs]
    wait_for("waiting for another process", *outs)
    (here / "go").touch()
    assert [process.wait() for process in both] == [0, 0]
    said = [line for out in outs for line in out.read_text().splitlines()]
    files = {json.loads(line)[0] for line in said if line.startswith("[")}
    assert len(files) == 1
    assert None not in files
    assert sum("compiling the native kernels" in line for line in said) == 1
    log = (here / "compiled.log").read_text().split()
    assert log.count("begin") == log.count("end") == len(units)


def unit_names(project: Path) -> list[str]:
    tool = toolchain.find_compiler()
    return [unit.source.name for unit in recipe.units(project / "csrc", tool, Cuda(None, ""))]


def test_killed_alone_its_compilers_keep_the_lock(project: Path, compiler: Compiler) -> None:
    here, units = project.parent, unit_names(project)
    extra = {"CXX": str(held_compiler(here, compiler)), "MAX_JOBS": "1"}
    first = begin(project, here / "first.txt", **extra)
    wait_for("begin", here / "compiled.log")
    first.kill()
    first.wait()
    second = begin(project, here / "second.txt", **extra)
    wait_for("waiting for another process", here / "second.txt")
    (here / "go").touch()
    assert second.wait() == 0
    assert json.loads((here / "second.txt").read_text().splitlines()[-1])[0] is not None
    # Nothing was compiled twice, nor at the same time.
    assert (here / "compiled.log").read_text().split() == ["begin", "end"] * len(units)


def test_killed_with_its_compilers_it_is_done_again(project: Path, compiler: Compiler) -> None:
    here = project.parent
    extra = {"CXX": str(held_compiler(here, compiler))}
    first = begin(project, here / "first.txt", **extra)
    wait_for("begin", here / "compiled.log")
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    (here / "go").touch()
    file, reason, said = loaded(project, **extra)
    assert file is not None, reason
    assert "compiling the native kernels" in said


# In place


def test_built_in_place_it_is_loaded_from_there(project: Path, compiler: Compiler) -> None:
    done = python(project, "setup.py", "-q", "build_ext", "--inplace")
    assert done.returncode == 0, done.stderr
    assert f"built nas._native: {compiler.name}, torch {torch.__version__}" in done.stdout
    file, reason, said = loaded(project)
    assert (file, said) == (str(project / "nas" / recipe.FILE), "")
    assert compiler.name in reason


def test_what_was_built_for_something_else_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is never loaded: here it is an empty file."""
    monkeypatch.setattr(recipe, "source_folder", lambda: project / "csrc")
    folder = project / "nas"
    (folder / recipe.FILE).touch()
    with pytest.raises(NativeError, match="the package has no compiled _native"):
        build.check(folder)
    recipe.write_stamp(folder, recipe.Plan((), recipe.source_digest(project / "csrc"), ""))
    build.check(folder)

    (project / "csrc" / "cpu" / "probe.h").write_text("int instruction_set();  // changed\n")
    with pytest.raises(NativeError, match=r"sources have changed .* build_ext --inplace"):
        build.check(folder)
    monkeypatch.setattr(torch, "__version__", "1.0.0")
    with pytest.raises(NativeError, match=r"for torch 2\..* and this is 1\.0\.0; rebuild it with"):
        build.check(folder)


def test_where_cuda_is_forced_an_extension_without_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "check", lambda folder: None)
    for said in ("no CUDA (no GPU)", "CUDA for sm_90 (a GPU is here)"):
        monkeypatch.setattr(build, "_read_stamp", lambda folder, said=said: {"summary": said})
        monkeypatch.delenv("FORCE_CUDA", raising=False)
        build.installed()
        monkeypatch.setenv("FORCE_CUDA", "1")
        if said.startswith("no"):
            with pytest.raises(NativeError, match="FORCE_CUDA=1 asks for CUDA"):
                build.installed()
        else:
            build.installed()


def test_installation_goes_on_without_a_compiler(project: Path) -> None:
    arguments = ("setup.py", "-q", "build_ext", "--inplace")
    done = python(project, *arguments, CXX="/nonexistent")
    assert done.returncode == 0
    assert "'/nonexistent' does not run" in done.stdout + done.stderr
    assert "runs eagerly" in done.stdout + done.stderr
    done = python(project, *arguments, CXX="/nonexistent", NAS_TRANSFER_FORCE_EXTENSION="1")
    assert done.returncode != 0


def test_setup_reads_without_torch(project: Path) -> None:
    """Metadata are read in an environment that has only setuptools."""
    script = project / "without_torch.py"
    script.write_text(
        "import runpy, sys\nsys.modules['torch'] = None\n"
        "sys.argv = ['setup.py', '--name']\nrunpy.run_path('setup.py')\n"
    )
    done = python(project, str(script))
    assert done.stdout.strip() == "nas-transfer", done.stderr
    assert "not built: there is no torch here" in done.stderr


# Packages


def sources_of(folder: Path) -> set[str]:
    """Files of csrc/ by name, counted independently of the code under test."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name.rpartition(".")[2] in ("cpp", "h", "cu", "cuh")
    }


def test_source_distribution_holds_every_source(tmp_path: Path) -> None:
    project = copy_project(tmp_path / "copy")
    done = python(project, "setup.py", "-q", "sdist", NAS_TRANSFER_NO_EXTENSION="1")
    assert done.returncode == 0, done.stderr
    (archive,) = (project / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {f"csrc/{name}" for name in sources_of(ROOT / "csrc")} <= names
    assert {"setup.py", "requirements.txt", "nas/ops/recipe.py"} <= names


def unpacked_wheel(project: Path, **extra: str) -> tuple[Path, str]:
    """Where the project's wheel was unpacked, and its name; the checkout is gone by then."""
    done = python(project, "setup.py", "-q", "bdist_wheel", **extra)
    assert done.returncode == 0, done.stderr
    (wheel,) = (project / "dist").glob("*.whl")
    site = project.parent / "site packages"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    shutil.move(project, project.with_name("moved away"))
    return site, wheel.name


def test_wheel_loads_what_it_brings(project: Path, compiler: Compiler) -> None:
    site, name = unpacked_wheel(project)
    assert name.endswith(f"{sysconfig.get_platform().replace('-', '_').replace('.', '_')}.whl")
    file, _, said = loaded(site)
    assert (file, said) == (str(site / "nas" / recipe.FILE), "")


# The real one


def processor_flags() -> set[str]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def test_build_info() -> None:
    try:
        build.installed()
    except NativeError as error:
        pytest.skip(f"{error}; make builds it")
    found = build.load()
    assert found.module is not None, found.reason
    assert build.load() is found
    info = found.module.build_info()
    assert info["torch"] == torch.__version__
    assert info["compiler"] in found.reason
    assert info["openmp"] == ("OpenMP" in found.reason)
    assert not info["cuda"] or "no CUDA" not in found.reason
    flags = processor_flags()
    wanted = ["portable"]
    if {"avx2", "fma"} <= flags:
        wanted.insert(0, "avx2")
        if {f"avx512{part}" for part in ("f", "vl", "dq", "bw")} <= flags:
            wanted.insert(0, "avx512")
    assert info["instruction_set"] == wanted[0]
    if flags:
        assert info["instruction_sets"] == wanted
