"""Builds the native modules `dynabert_fast._cpu` and `._cuda`; metadata: pyproject.toml.

`DYNABERT_FAST_NATIVE=0` leaves both out: then there is no CPU engine, and plain torch computes.
`DYNABERT_FAST_CUDA` says whether `_cuda` is built: `0` no, `1` yes, `auto` (default) where there is
an nvcc; without it a GPU has the Triton kernels. `TORCH_CUDA_ARCH_LIST` says for which GPUs, by
default for those of `ARCHITECTURES`.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
WITHOUT = "or set DYNABERT_FAST_NATIVE=0 to go without the CPU engine"
#: A100 (and the cards of its generation), H100 and H200.
ARCHITECTURES = "8.0;9.0a"


def compiler() -> str:
    """The C++ compiler that CMake is told to use: `CXX`, or the first that is installed."""
    given = os.environ.get("CXX")
    if given and not shutil.which(given):
        raise SystemExit(f"error: CXX must be the name of a C++17 compiler, got {given!r}")
    for name in [given] if given else ["c++", "g++", "clang++"]:
        if path := shutil.which(name):
            return path
    raise SystemExit(
        "error: dynabert-fast is built with a C++17 compiler, and there is no c++, g++ or clang++: "
        f"install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++), {WITHOUT}"
    )


def tool(name: str) -> str:
    """The path of a program that a build requirement of the same name brings."""
    # First the running Python's own: without build isolation it need not be on PATH.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    if found := shutil.which(name, path=path):
        return found
    raise SystemExit(f"error: dynabert-fast is built with {name}: pip install {name}, {WITHOUT}")


def nvcc() -> str | None:
    """The CUDA compiler: `CUDACXX`, of `CUDA_HOME`, on PATH, or of the wheel nvidia-cuda-nvcc."""
    given = os.environ.get("CUDACXX")
    if given:
        if path := shutil.which(given):
            return path
        raise SystemExit(f"error: CUDACXX must be the name of an nvcc, got {given!r}")
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [*(Path(home, "bin") for home in homes if home), *os.get_exec_path()]
    places.append("/usr/local/cuda/bin")
    wheels = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin"), reverse=True)
    return shutil.which("nvcc", path=os.pathsep.join(map(str, [*places, *wheels])))


def wants_cuda() -> bool:
    """Whether `_cuda` is built."""
    given = os.environ.get("DYNABERT_FAST_CUDA") or "auto"
    if given not in ("0", "1", "auto"):
        raise SystemExit(f"error: DYNABERT_FAST_CUDA must be 0, 1 or auto, got {given!r}")
    if given == "1" and nvcc() is None:
        raise SystemExit(
            "error: DYNABERT_FAST_CUDA=1 needs nvcc, which is not on PATH: install the CUDA "
            "toolkit, or dynabert-fast[cuda-build], or set CUDACXX; 0 goes without"
        )
    return given != "0" and nvcc() is not None


def architectures() -> str:
    """`TORCH_CUDA_ARCH_LIST` ("8.0;9.0a+PTX") as CMake names them ("80-real;90a")."""
    found = []
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or ARCHITECTURES
    for name in re.split(r"[;,\s]+", asked):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name)
        if not match or int(match[1]) < 8:
            raise SystemExit(
                "error: TORCH_CUDA_ARCH_LIST must list compute capabilities from 8.0 on, like "
                f"8.0;9.0a+PTX (or set DYNABERT_FAST_CUDA=0), got {name!r}"
            )
        found.append(f"{match[1]}{match[2]}" + ("" if match[3] else "-real"))
    return ";".join(found)


def cuda_settings() -> dict[str, str]:
    """What CMake needs to know for `_cuda`."""
    found = nvcc()
    assert found is not None
    settings = {
        "DYNABERT_CUDA": "ON",
        "CMAKE_CUDA_COMPILER": found,
        "CMAKE_CUDA_ARCHITECTURES": architectures(),
    }
    # The wheel's libraries lie in lib/, where its nvcc does not look.
    libraries = Path(found).resolve().parents[1] / "lib"
    if (libraries / "libcudart_static.a").is_file():
        settings["CMAKE_CUDA_FLAGS"] = f"-L{libraries}"
    return settings


class CMakeBuild(build_ext):
    """CMake builds a module in `build/`, which is kept: a second build compiles what changed."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except SystemExit as error:
            if not ext.optional:
                raise
            raise CompileError(f"going without {ext.name} ({error})") from None  # a warning

    def _build(self, ext: Extension) -> None:
        chosen, cmake, ninja = compiler(), tool("cmake"), tool("ninja")
        module = ext.name.rpartition(".")[2]
        special = cuda_settings() if module == "_cuda" else {"DYNABERT_PYTHON": "ON"}
        header = Path(sysconfig.get_path("include"), "Python.h")
        if not header.is_file():
            raise SystemExit(
                f"error: dynabert-fast is built with Python's headers, and there is no {header}: "
                f"install them (Debian, Ubuntu: apt install python3-dev), {WITHOUT}"
            )
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name))
        folder = ROOT / "build" / f"{module[1:]}-{sysconfig.get_config_var('SOABI')}"
        # CMake cannot change the compiler of a folder and keep the other settings.
        marker = folder / "compiler"
        compilers = f"{chosen} {special.get('CMAKE_CUDA_COMPILER', '')}"
        if not marker.is_file() or marker.read_text() != compilers:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            marker.write_text(compilers)
        # Each by its path: those of build isolation lie elsewhere every time.
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CXX_COMPILER": chosen,
            "CMAKE_MAKE_PROGRAM": ninja,
            "PYBIND11_FINDPYTHON": "ON",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            **special,
        }
        options = [f"-D{name}={value}" for name, value in settings.items()]
        for command in (
            [cmake, "-S", ROOT / "csrc", "-B", folder, "-G", "Ninja", *options],
            [ninja, "-C", folder, module],
        ):
            if code := subprocess.run(command, check=False).returncode:
                program = Path(command[0]).name
                raise SystemExit(f"error: {program} failed with code {code}, see above")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / target.name, target)


def extension(module: str, optional: bool = False) -> Extension:
    """One of the two; every native source is part of the source distribution."""
    kinds = (".cpp", ".h", ".inl", ".cu", ".cuh", ".txt", ".cmake")
    sources = [p for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in kinds]
    depends = [path.relative_to(ROOT).as_posix() for path in sources]
    return Extension(f"dynabert_fast.{module}", sources=[], depends=depends, optional=optional)


def extensions() -> list[Extension]:
    """Those to be built."""
    if os.environ.get("DYNABERT_FAST_NATIVE") == "0":
        return []
    found = [extension("_cpu")]
    if wants_cuda():
        # An nvcc that nobody asked for must not stand in the way of an installation.
        found.append(extension("_cuda", optional=os.environ.get("DYNABERT_FAST_CUDA") != "1"))
    return found


setup(
    # The kernels lie beside the package, which a search would not find.
    packages=[
        *find_packages(include=["dynabert_fast", "dynabert_fast.*"]),
        "dynabert_fast.kernels",
    ],
    package_dir={"dynabert_fast.kernels": "kernels/triton"},
    ext_modules=extensions(),
    cmdclass={"build_ext": CMakeBuild},
)
