from __future__ import annotations

import platform
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers

from dynabert_fast import __version__
from dynabert_fast.engine import ISA_VARIABLE, isas
from dynabert_fast.evaluation import count_flops, count_parameters
from dynabert_fast.models import DynaBertConfig, DynaBertForSequenceClassification
from dynabert_fast.ops import use_backend
from dynabert_fast.ops.reference import KERNELS
from dynabert_fast.ops.registry import PRIORITY
from dynabert_fast.rewiring import measure_importance, rewire
from dynabert_fast.subnet import grid


def test_versions_devices_and_backends(cli):
    result = cli("info")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == f"dynabert-fast {__version__}, Python {platform.python_version()}"
    assert lines[1] == f"torch {torch.__version__}, transformers {transformers.__version__}"
    assert lines[2].startswith("devices: cpu")
    assert "(forced: none)" in lines[3]
    end = next(i for i, line in enumerate(lines) if line.startswith("CPU engine: "))
    named = [line.split()[0] for line in lines[4:end] if line.startswith("  ") and line[2] != " "]
    assert named == list(PRIORITY)
    assert f"  reference  serves {len(KERNELS)} of {len(KERNELS)} kernels" in lines


@pytest.mark.parametrize("forced", ["", "best", "last", "of another machine"])
def test_cpu_engine(cli, monkeypatch, forced):
    found = isas()
    forced = {"best": found[0], "last": found[-1]}.get(forced, forced)
    monkeypatch.setenv(ISA_VARIABLE, forced)
    use = {
        "": f"uses {found[0]} (DYNABERT_FAST_ISA: not set)",
        "of another machine": "refuses to run: of another machine is not one of these "
        "(DYNABERT_FAST_ISA: of another machine)",
    }.get(forced, f"uses {forced} (DYNABERT_FAST_ISA: {forced})")
    result = cli("info")
    assert result.code == 0
    assert result.out.endswith(
        f"\nCPU engine: {use}\n  instruction sets here, fastest first: {', '.join(found)}\n"
    )


def test_an_installation_without_the_cpu_engine(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "dynabert_fast._cpu", None)
    result = cli("info")
    assert result.code == 0
    last = result.out.splitlines()[-1]
    assert last.startswith("the CPU engine is not available (")
    assert "DYNABERT_FAST_NATIVE=0" in last


@pytest.mark.parametrize("built", [True, False])
def test_the_cuda_module(cli, monkeypatch, built):
    module = SimpleNamespace(architectures="80-real,90a-real") if built else None
    monkeypatch.setitem(sys.modules, "dynabert_fast._cuda", module)
    line = next(line for line in cli("info").out.splitlines() if "CUDA module" in line)
    if built:
        assert line == "CUDA module: built for 80-real,90a-real"
    else:
        assert line.startswith("the CUDA module is not available (")
        assert "nvcc" in line


def test_forced_backend(cli):
    with use_backend("reference"):
        assert "(forced: reference)" in cli("info").out


def test_checkpoint(cli, checkpoints):
    folder = checkpoints["classifier"]
    result = cli("info", folder, "--length", "24", "--widths", "1,0.5")
    assert result.code == 0
    start = result.out.index(f"{folder}: ")
    about, rewired, head, *rows = result.out[start:].splitlines()
    assert about.endswith("bert, 4 layers, hidden size 24, heads of 6; labels: good, bad")
    assert rewired == "rewired: no"
    assert head.split() == ["sub-network", "parameters", "GFLOPs", "at", "24"]
    config = DynaBertConfig.from_pretrained(folder)
    subnets = grid(config, (1.0, 0.5))
    assert [row.split()[0] for row in rows] == [str(subnet) for subnet in subnets]
    for row, subnet in zip(rows, subnets, strict=True):
        _, millions, unit, gigaflops = row.split()
        assert unit == "M"
        assert float(millions) == pytest.approx(count_parameters(config, subnet) / 1e6, rel=1e-2)
        assert float(gigaflops) == pytest.approx(count_flops(config, subnet, 24) / 1e9, rel=1e-2)


@pytest.fixture
def tiny(make_checkpoint, tmp_path):
    """Two heads and one layer: 0.25 and 0.5 of the paper's multipliers keep nothing of them."""
    sizes = {"num_attention_heads": 2, "num_hidden_layers": 1}
    return make_checkpoint(tmp_path / "tiny", ("good", "bad"), **sizes)


def test_the_grid_of_a_tiny_checkpoint_is_what_fits(cli, tiny):
    result = cli("info", tiny)
    assert (result.code, result.err) == (0, "")
    subnets = [line.split()[0] for line in result.out.splitlines() if line.startswith("w")]
    assert subnets == [f"w{w:.2f}-d{d:.2f}" for d in (1, 0.75) for w in (1, 0.75, 0.5)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--widths", "1,0.25"), "width must keep 1 to 2 heads, got 0.25 (0 heads)"),
        (("--depths", "1,0.5"), "depth must keep 1 to 1 layers, got 0.5 (0 layers)"),
    ],
)
def test_what_was_chosen_for_a_tiny_checkpoint_must_fit(refused, tiny, options, message):
    assert message in refused("info", tiny, *options)


def test_a_pretrained_encoder_needs_no_head(cli, checkpoints):
    result = cli("info", checkpoints["pretrained"])
    assert result.code == 0
    assert "rewired: no" in result.out


def test_a_rewired_checkpoint(cli, checkpoints, make_batch, tmp_path):
    model = DynaBertForSequenceClassification.from_pretrained(checkpoints["classifier"])
    batch = make_batch() | {"labels": torch.tensor([1, 0, 1, 0])}
    rewire(model, measure_importance(model, [batch], progress=False))
    model.save_pretrained(tmp_path)
    assert "rewired: yes" in cli("info", tmp_path).out


def test_an_error_comes_without_the_rest(cli, tmp_path):
    result = cli("info", tmp_path)
    assert (result.code, result.out) == (2, "")
