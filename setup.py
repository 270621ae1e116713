"""Builds the native module `dynabert_fast._cpu` by CMake and Ninja; metadata: pyproject.toml.

`DYNABERT_FAST_NATIVE=0` leaves it out: then everything but the CPU engine works.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
WITHOUT = "or set DYNABERT_FAST_NATIVE=0 to go without the CPU engine"


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


class CMakeBuild(build_ext):
    """CMake builds the module in `build/`, which is kept: a second build compiles what changed."""

    def build_extension(self, ext: Extension) -> None:
        chosen, cmake, ninja = compiler(), tool("cmake"), tool("ninja")
        header = Path(sysconfig.get_path("include"), "Python.h")
        if not header.is_file():
            raise SystemExit(
                f"error: dynabert-fast is built with Python's headers, and there is no {header}: "
                f"install them (Debian, Ubuntu: apt install python3-dev), {WITHOUT}"
            )
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name))
        folder = ROOT / "build" / f"cpu-{sysconfig.get_config_var('SOABI')}"
        # CMake cannot change the compiler of a folder and keep the other settings.
        marker = folder / "compiler"
        if not marker.is_file() or marker.read_text() != chosen:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            marker.write_text(chosen)
        # Each by its path: those of build isolation lie elsewhere every time.
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CXX_COMPILER": chosen,
            "CMAKE_MAKE_PROGRAM": ninja,
            "DYNABERT_PYTHON": "ON",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        options = [f"-D{name}={value}" for name, value in settings.items()]
        for command in (
            [cmake, "-S", ROOT / "csrc", "-B", folder, "-G", "Ninja", *options],
            [ninja, "-C", folder, "_cpu"],
        ):
            if code := subprocess.run(command, check=False).returncode:
                program = Path(command[0]).name
                raise SystemExit(f"error: {program} failed with code {code}, see above")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / target.name, target)


native = Extension(
    "dynabert_fast._cpu",
    sources=[],
    depends=[
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "csrc").rglob("*"))
        if path.suffix in (".cpp", ".h", ".inl", ".txt", ".cmake")
    ],
)
setup(
    # The kernels lie beside the package, which a search would not find.
    packages=[
        *find_packages(include=["dynabert_fast", "dynabert_fast.*"]),
        "dynabert_fast.kernels",
    ],
    package_dir={"dynabert_fast.kernels": "kernels/triton"},
    ext_modules=[] if os.environ.get("DYNABERT_FAST_NATIVE") == "0" else [native],
    cmdclass={"build_ext": CMakeBuild},
)
