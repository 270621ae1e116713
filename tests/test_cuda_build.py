"""The CUDA kernels compiled for the GPUs they are for, without one: no warning, no spill, and the
instructions that their design rests on (docs/gpu.md)."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = "encoder", "pointwise"
ARCHITECTURES = "80", "90a"
#: Of the encoder: three heights of a tile, two types of weights.
KERNELS = 6
#: Of a thread: a block of 256 has all of a multiprocessor's 65536 registers.
REGISTERS = 255


@functools.cache
def tool(name: str) -> str | None:
    """A program of the CUDA toolkit; cuobjdump comes with triton too."""
    source = (ROOT / "setup.py").read_text().partition("\nsetup(")[0]
    names: dict = {"__file__": str(ROOT / "setup.py")}
    exec(compile(source, "setup.py", "exec"), names)
    nvcc = names["nvcc"]()
    if name == "nvcc" or nvcc is None:
        return nvcc
    triton = importlib.util.find_spec("triton")
    places = [str(Path(nvcc).resolve().parent)]
    if triton is not None and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which(name) or shutil.which(name, path=":".join(places))


def needs(name: str) -> str:
    found = tool(name)
    if found is None:
        pytest.skip(f"needs {name}: install the CUDA toolkit, or dynabert-fast[cuda-build]")
    return found


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """`compiled(source, architecture)`: a file of machine code, and what ptxas said."""
    folder = tmp_path_factory.mktemp("cuda")

    @functools.cache
    def compile_one(source: str, architecture: str) -> tuple[Path, str]:
        target = folder / f"{source}_{architecture}.cubin"
        command = [
            *(needs("nvcc"), "-std=c++17", "-O3", "-cubin", "-Werror", "all-warnings"),
            f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
            *("-Xptxas", "-v,--warn-on-spills,--warn-on-local-memory-usage"),
            *("-Xcompiler", "-Wall,-Wextra", "-o", str(target)),
            str(ROOT / "csrc" / "cuda" / f"{source}.cu"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return target, done.stderr

    return compile_one


@functools.cache
def listing(file: Path) -> list[str]:
    """The machine code, an instruction each."""
    text = subprocess.run(
        [needs("cuobjdump"), "-sass", file], capture_output=True, text=True, check=True
    ).stdout
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][^;]*)", text)


def instructions(file: Path) -> Counter[str]:
    """How often each instruction is in the machine code, with its modifiers."""
    return Counter(re.findall(r"^\S+", line)[0] for line in listing(file))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_fits_and_does_not_spill(compiled, source, architecture):
    _, report = compiled(source, architecture)
    kernels = report.count("Compiling entry function")
    assert kernels == {"encoder": KERNELS, "pointwise": 4}[source]
    clean = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    assert report.count(clean) == kernels, report
    used = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    assert len(used) == kernels
    assert max(used) <= REGISTERS


@pytest.mark.slow
def test_the_program_for_a_gpu_compiles(tmp_path):
    """What tests/engine/test_persistent.py runs where there is a GPU."""
    flags = ("-std=c++17", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-arch=sm_80")
    source = ROOT / "csrc" / "tests" / "device_encoder.cu"
    command = [needs("nvcc"), *flags, "-c", source, "-o", tmp_path / "device_encoder.o"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_encoder_has_the_instructions_of_its_design(compiled, architecture):
    file, _ = compiled("encoder", architecture)
    found = instructions(file)

    def count(start: str) -> int:
        return sum(n for full, n in found.items() if full.startswith(start))

    # Products on tensor cores, bfloat16 with sums in float32; on an H100 those of bfloat16 weights
    # and tiles of 64 rows by wgmma, of each width: four chunks of two steps, and four more at last.
    assert found["HMMA.16816.F32.BF16"] >= 500
    assert count("HMMA") == found["HMMA.16816.F32.BF16"]
    widths = range(8, 65, 8) if architecture == "90a" else ()
    assert {k: n for k, n in found.items() if k.startswith("HGMMA")} == {
        f"HGMMA.64x{width}x16.F32.BF16": 16 for width in widths
    }
    # Weights come in the background: by bulk copies that an mbarrier counts, or 16 bytes a lane,
    # past the first-level cache. bfloat16 is read as matrices.
    bulk = architecture == "90a"
    assert (count("UBLKCP") >= KERNELS) == (count("SYNCS.PHASECHK") >= KERNELS) == bulk
    assert (count("SYNCS.ARRIVE") >= KERNELS) == (count("FENCE.VIEW.ASYNC") >= KERNELS) == bulk
    assert (count("LDGSTS.E.BYPASS.128") >= KERNELS) == (not bulk)
    assert count("LDGSTS") == count("LDGSTS.E.BYPASS.128")
    assert count("LDSM.16.M88.4") >= 2 * 8
    # Activations: 16 bytes, from the cache that all multiprocessors share.
    wide = [n for full, n in found.items() if full.startswith("LDG.E.128") and "STRONG.GPU" in full]
    assert sum(wide) >= KERNELS * 10
    # Nothing lies in local memory.
    assert count("LDL") == count("STL") == 0
    # The grid's barrier, and its last arrival: an addition without an answer, behind one fence.
    assert count("ATOM") == 0
    assert count("RED") == sum(n for k, n in found.items() if re.match(r"MEMBAR.*\.GPU", k))
    assert count("RED") == KERNELS * 2


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_activations_come_in_the_background(compiled, architecture):
    """A copy of a register that is being loaded would wait for the load where it was begun."""
    lines = listing(compiled("encoder", architecture)[0])
    loads = 0
    for i, line in enumerate(lines):
        load = re.match(r"LDG\.E\.128\.STRONG\.GPU R(\d+)", line)
        if not load:
            continue
        loads += 1
        registers = {f"R{int(load[1]) + k}" for k in range(4)}
        for later in lines[i + 1 : i + 24]:
            copied = re.match(r"(?:MOV|IMAD\.MOV\.U32) .*\b(R\d+)\s*$", later)
            assert not copied or copied[1] not in registers, (line, later)
            if re.match(r"\S+ " + load[0].split()[1] + r"\b", later):
                break  # a register of another value
    assert loads >= KERNELS * 10


@pytest.mark.slow
def test_no_product_waits_for_the_one_before(compiled):
    """ptxas says where it had to put wgmma one after the other."""
    _, report = compiled("encoder", "90a")
    assert "wgmma" not in report
    assert "C75" not in report


@pytest.mark.slow
def test_bulk_copies_without_wgmma(compiled):
    """Compiled for sm_90 without its own features, or for a later card."""
    file, _ = compiled("encoder", "90")
    found = instructions(file)
    assert any(name.startswith("UBLKCP") for name in found)
    assert not any(name.startswith("HGMMA") for name in found)
