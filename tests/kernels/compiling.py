"""Compile kernels for GPUs that are not there, and read what they need from the machine code.

python tests/kernels/compiling.py             a table of all, in Markdown
python tests/kernels/compiling.py whole 0 2   the first of two halves, a line of JSON each
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import dynabert_fast.kernels
from dynabert_fast.kernels.common import Specimen

CAPABILITIES = 80, 90, 100
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Resources:
    """Of one thread, but for `shared`, which is a block's; bytes but for `registers`."""

    registers: int
    stack: int  # what is spilt lies here
    shared: int


def specimens() -> list[Specimen]:
    """Of all files."""
    files = [m.name for m in pkgutil.iter_modules(dynabert_fast.kernels.__path__)]
    modules = [importlib.import_module(f"dynabert_fast.kernels.{name}") for name in files]
    return [s for m in modules if hasattr(m, "specimens") for s in m.specimens()]


def label(specimen: Specimen) -> str:
    """Names one among all."""
    return f"{specimen.name}, {specimen.config}"


def compile_for(specimen: Specimen, capability: int) -> Resources:
    """`capability` is one of `CAPABILITIES`."""
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


def jobs(whole: bool) -> list[tuple[Specimen, int]]:
    """Every specimen for every capability; or for the last one every fourth only."""
    return [
        (specimen, capability)
        for i, specimen in enumerate(specimens())
        for capability in CAPABILITIES
        if whole or capability != CAPABILITIES[-1] or i % 4 == 0
    ]


def compile_all(whole: bool) -> dict[tuple[str, int], Resources | str]:
    """By label and capability; what failed as its message. One process for each processor."""
    count = len(os.sched_getaffinity(0))
    command = [sys.executable, "-W", "ignore", __file__, "whole" if whole else "most"]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    parts = [
        subprocess.Popen([*command, str(i), str(count)], stdout=subprocess.PIPE, env=env)
        for i in range(count)
    ]
    found: dict[tuple[str, int], Resources | str] = {}
    for part in parts:
        output, _ = part.communicate()
        for line in output.splitlines():
            name, capability, result = json.loads(line)
            good = isinstance(result, dict)
            found[name, capability] = Resources(**result) if good else result
    return found


def _print_part(whole: bool, part: int, parts: int) -> None:
    for specimen, capability in jobs(whole)[part::parts]:
        try:
            result = asdict(compile_for(specimen, capability))
        except Exception as error:  # noqa: BLE001 (a compiler may raise anything; it is reported)
            result = f"{type(error).__name__}: {error}"
        print(json.dumps([label(specimen), capability, result]), flush=True)


def _print_table() -> None:
    found = compile_all(whole=True)
    print("| kernel, configuration |" + "".join(f" sm_{c} |" for c in CAPABILITIES))
    print("|---|" + "---|" * len(CAPABILITIES))
    for name in dict.fromkeys(name for name, _ in sorted(found)):
        cells = []
        for capability in CAPABILITIES:
            got = found[name, capability]
            cells.append(
                got
                if isinstance(got, str)
                else f"{got.registers} registers, {got.shared} B shared"
                + f", {got.stack} B spilt" * bool(got.stack)
            )
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        _print_part(sys.argv[1] == "whole", int(sys.argv[2]), int(sys.argv[3]))
    else:
        _print_table()
