from __future__ import annotations

import re

import pytest
import torch

from dynabert_fast.cli.bench import distil_once
from dynabert_fast.models import DynaBertForSequenceClassification
from dynabert_fast.subnet import grid

SHORT = "--length 8 --rounds 2 --threads 1".split()


@pytest.fixture
def packed(checkpoints, tmp_path):
    model = DynaBertForSequenceClassification.from_pretrained(checkpoints["classifier"])
    path = tmp_path / "model.dynabert"
    model.pack("bf16", threads=1).save(path)
    return path


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_times_the_whole_grid_of_a_checkpoint(cli, checkpoints, dtype):
    result = cli("bench", checkpoints["classifier"], "--dtype", dtype, *SHORT)
    assert result.code == 0, result.err
    head, *lines = result.out.splitlines()
    assert f"CpuEngine({dtype}," in head
    assert "batch 1, length 8, median of 2 calls" in head
    assert len(lines) == 12
    assert all(re.fullmatch(r"  w\d\.\d\d-d\d\.\d\d +\d+\.\d\d ms  x\d+\.\d\d", x) for x in lines)


def test_times_what_fits_of_the_grid_of_a_tiny_checkpoint(cli, make_checkpoint, tmp_path):
    sizes = {"num_attention_heads": 2, "num_hidden_layers": 1}
    result = cli("bench", make_checkpoint(tmp_path / "tiny", ("good", "bad"), **sizes), *SHORT)
    assert result.code == 0, result.err
    subnets = [line.split()[0] for line in result.out.splitlines()[1:]]
    assert subnets == [f"w{w:.2f}-d{d:.2f}" for d in (1, 0.75) for w in (1, 0.75, 0.5)]


def test_profiles_one_subnet_of_a_file(cli, packed):
    result = cli("bench", packed, "--profile", "--subnet", "w0.50-d0.50", *SHORT)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[1].startswith("w0.50-d0.50: ")
    stages = [line.split()[0] for line in lines[3:-1]]
    assert stages == "embed qkv attention quantise out norm up down pool linear".split()
    assert lines[-1].startswith("  peak: ")
    shares = [float(line.split()[2].rstrip("%")) for line in lines[3:-2]]
    assert sum(shares) == pytest.approx(100, abs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "a packed file has its type already; leave --dtype out"),
        (["--length", "600"], "a sequence may have 1 to 24 tokens, got 600; truncate it"),
        (["--subnet", "w0.01-d1.00"], "width must keep 1 to"),
    ],
    ids=["dtype of a file", "length", "subnet"],
)
def test_refuses(cli, packed, options, message):
    result = cli("bench", packed, *options)
    assert result.code == 2
    assert message in result.err
    assert len(result.err.splitlines()) == 1


def test_tune_takes_the_calls_of_a_training_step(checkpoints):
    """Weights in float32, a tree of sub-networks, autocast: other keys than a plain call's."""
    model = DynaBertForSequenceClassification.from_pretrained(checkpoints["classifier"])
    seen = []
    model.dynabert.encoder.layer[0].ffn.up.register_forward_pre_hook(
        lambda module, arguments: seen.append((model.training, len(arguments[1])))
    )
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.dtype))
    distil_once(model, torch.randint(1, 20, (2, 8)), grid(model.config), torch.bfloat16)
    assert seen[:2] == [(False, 4), (True, 4)]
    assert seen[2:] == [torch.float32] * len(list(model.parameters()))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tune_needs_a_gpu(cli, checkpoints, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = cli("tune", checkpoints["classifier"])
    assert result.code == 2
    assert "tune needs a CUDA device, and torch sees none here" in result.err
