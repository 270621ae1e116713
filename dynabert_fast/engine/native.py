"""The native modules, or why there are none, and the names that need nothing else."""

from __future__ import annotations

import importlib
from typing import Any

from dynabert_fast.errors import InputError

#: Types of the packed weights.
DTYPES = ("fp32", "bf16", "int8")

#: Environment variable that forces an instruction set, one of `isas()`.
ISA_VARIABLE = "DYNABERT_FAST_ISA"


def native_module() -> Any:
    """The module `dynabert_fast._cpu`, which `setup.py` builds from csrc/.

    Raises:
        InputError: This installation has none, or it does not load here.
    """
    try:
        return importlib.import_module("dynabert_fast._cpu")
    except ImportError as error:
        raise InputError(
            f"the CPU engine is not available ({error}): install dynabert-fast again, with a C++ "
            "compiler and without DYNABERT_FAST_NATIVE=0"
        ) from error


def cuda_module() -> Any:
    """The module `dynabert_fast._cuda`, which `setup.py` builds from csrc/cuda where there is nvcc.

    Raises:
        InputError: This installation has none, or it does not load here.
    """
    try:
        return importlib.import_module("dynabert_fast._cuda")
    except ImportError as error:
        raise InputError(
            f"the CUDA module is not available ({error}): install dynabert-fast again, with nvcc "
            "on PATH and without DYNABERT_FAST_CUDA=0"
        ) from error
