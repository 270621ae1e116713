"""Every kernel with every shipped configuration, compiled for GPUs that need not be there.

What is compiled for a card must fit it and not spill: registers that go to memory would cost more
than any other choice of a configuration. For sm_100 every fourth is compiled here;
`python tests/kernels/compiling.py` compiles all (7 minutes on two cores) and prints the table.
"""

from __future__ import annotations

import importlib.util
import pkgutil
import sys
from pathlib import Path

import pytest

import dynabert_fast.kernels

_PATH = Path(__file__).with_name("compiling.py")
_SPEC = importlib.util.spec_from_file_location("compiling", _PATH)
compiling = importlib.util.module_from_spec(_SPEC)
sys.modules["compiling"] = compiling
_SPEC.loader.exec_module(compiling)

# Bytes of shared memory that a block may have: A100, H100 and H200, B200.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
#: Registers of a thread.
REGISTERS = 255
ALL = compiling.specimens()


def test_every_file_has_specimens():
    files = {m.name for m in pkgutil.iter_modules(dynabert_fast.kernels.__path__)}
    shown = {s.kernel.fn.__module__.rpartition(".")[2] for s in ALL}
    assert files - {"common", "tuning"} <= shown


def test_labels_are_told_apart():
    labels = [compiling.label(s) for s in ALL]
    assert len(set(labels)) == len(labels)


@pytest.fixture(scope="session")
def compiled():
    return compiling.compile_all(whole=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the first of these tests compiles for all
@pytest.mark.parametrize("specimen", ALL, ids=compiling.label)
def test_fits_and_does_not_spill(compiled, specimen):
    for capability, most in SHARED.items():
        found = compiled.get((compiling.label(specimen), capability))
        if found is None and capability == 100:
            continue
        assert found is not None, "the compiler died"
        assert not isinstance(found, str), found
        assert found.registers <= REGISTERS
        assert found.shared <= most
        if capability != 100:
            # Attention over rows that are not whole vectors apart is for odd models only.
            most_spilt = 256 if "any stride" in specimen.name else 0
            assert found.stack <= most_spilt, f"spills {found.stack} bytes on sm_{capability}"
