"""Triton's kernels without a GPU: computed by its interpreter, or compiled and looked at.

The interpreter is chosen before triton is imported, for a whole process: the tests of what kernels
compute run with `TRITON_INTERPRET=1` (`make test` does), those of what is compiled without it.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session", autouse=True)
def bfloat16_is_rounded():
    """Float32 becomes bfloat16 as on a GPU, the nearest or even; the interpreter cuts bits off."""
    if not INTERPRETED:
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(values, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        bits = np.frombuffer(values.tobytes(), np.uint32).reshape(values.shape)
        nearest = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        nan = bits >> 16 | 0x40  # adding would carry some into another number
        return np.where(np.isnan(bits.view(np.float32)), nan, nearest).astype(np.uint16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounding)
        yield


def pytest_collection_modifyitems(items):
    here = os.path.dirname(__file__)
    for item in items:
        if not str(item.path).startswith(here):
            continue
        compiled = item.path.name == "test_compiled.py"
        if compiled == INTERPRETED:
            reason = "with TRITON_INTERPRET=1" if INTERPRETED else "needs TRITON_INTERPRET=1"
            item.add_marker(pytest.mark.skip(reason=reason))
