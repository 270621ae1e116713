"""Triton's kernels without a GPU: computed by its interpreter, or compiled and looked at.

The interpreter is chosen before triton is imported, for a whole process: the tests of what kernels
compute run with `TRITON_INTERPRET=1` (`make test` does), those of what is compiled without it.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items):
    here = os.path.dirname(__file__)
    for item in items:
        if not str(item.path).startswith(here):
            continue
        compiled = item.path.name == "test_compiled.py"
        if compiled == INTERPRETED:
            reason = "with TRITON_INTERPRET=1" if INTERPRETED else "needs TRITON_INTERPRET=1"
            item.add_marker(pytest.mark.skip(reason=reason))
