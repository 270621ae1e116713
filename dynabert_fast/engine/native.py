"""The native module, or why there is none."""

from __future__ import annotations

import importlib
from typing import Any

from dynabert_fast.errors import InputError


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
