"""The native module, or why there is none, and the names that need nothing else."""

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
