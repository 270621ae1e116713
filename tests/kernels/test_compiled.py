"""Every kernel with every shipped configuration, compiled for GPUs that need not be there.

What is compiled for a card must fit it and not spill: registers that go to memory would cost more
than any other choice of a configuration. `pytest -s` prints the table.
"""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import dynabert_fast.kernels
from dynabert_fast.kernels.common import Specimen

from .compiling import compile_for

# Bytes of shared memory that a block may have: A100, H100 and H200, B200.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
#: Registers of a thread.
REGISTERS = 255
# A first configuration is taken on cards that nobody has measured: this is what the smallest has.
SAFE_SHARED = 99 * 1024


def specimens() -> list[Specimen]:
    files = [m.name for m in pkgutil.iter_modules(dynabert_fast.kernels.__path__)]
    modules = [importlib.import_module(f"dynabert_fast.kernels.{name}") for name in files]
    return [s for m in modules if hasattr(m, "specimens") for s in m.specimens()]


ALL = specimens()


def test_every_file_has_specimens():
    files = {m.name for m in pkgutil.iter_modules(dynabert_fast.kernels.__path__)}
    files -= {"common", "tuning"}
    shown = {s.kernel.fn.__module__.rpartition(".")[2] for s in ALL}
    assert files == shown & files


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("specimen", ALL, ids=lambda s: f"{s.name}, {s.config}")
def test_fits_and_does_not_spill(specimen, capability):
    found = compile_for(specimen, capability)
    print(f"\nsm_{capability} {specimen.name} {specimen.config}: {found}")
    assert found.registers <= REGISTERS
    assert found.shared <= SHARED[capability]
    if capability != 100:
        assert found.stack == 0, "spills"
