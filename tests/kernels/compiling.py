"""Compile a kernel for a GPU that is not there, and read what it needs from the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dynabert_fast.kernels.common import Specimen

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Resources:
    """Of one thread, but for `shared`, which is a block's; bytes but for `registers`."""

    registers: int
    stack: int  # what is spilt lies here
    shared: int


def compile_for(specimen: Specimen, capability: int) -> Resources:
    """`capability` is 80, 90 or 100."""
    names = list(specimen.signature)
    constants = {(names.index(n),): v for n, v in specimen.constants.items()}
    # Pointers are aligned to 16 bytes, as torch's are; sizes and strides are not known to be round.
    hints = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if specimen.signature[n].startswith("*")
    }
    source = ASTSource(
        fn=specimen.kernel, signature=dict(specimen.signature), constexprs=constants, attrs=hints
    )
    options = {"num_warps": specimen.config.warps, "num_stages": specimen.config.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [str(_CUOBJDUMP), "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", text)}
    return Resources(found["REG"], found["STACK"], compiled.metadata.shared)
