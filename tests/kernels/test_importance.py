"""Importance in Triton's interpreter: against its definition, and against what rewiring adds."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dynabert_fast import ops
from dynabert_fast.kernels import importance
from dynabert_fast.kernels.common import Config
from dynabert_fast.kernels.importance import add_importance
from dynabert_fast.ops import registry
from dynabert_fast.rewiring import _add_importance, _watched

SHIPPED = importance.CONFIGS, importance._COLUMNS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Rows of 8 columns, 4 of a head's at a time."""
    monkeypatch.setattr(importance, "CONFIGS", (Config.of(TILE=8), Config.of(TILE=32)))
    monkeypatch.setattr(importance, "_COLUMNS", 8)


def noise(seed, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def close(got, want):
    """Sums of a few hundred float32 products: products of 16-bit values are exact."""
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("total", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [13, 8, 1])
@pytest.mark.parametrize(("entries", "group"), [(5, 1), (3, 7), (1, 4), (7, 2)])
def test_is_the_definition(dtype, total, columns, entries, group):
    w, g = (noise(i, entries * group, columns, dtype=dtype) for i in range(2))
    into = noise(2, entries, dtype=total)
    want = into.double() + (w.double() * g.double()).view(entries, -1).sum(1).abs()
    add_importance(into, w, g)
    assert into.dtype == total
    close(into, want)


def test_with_a_bias(dtype):
    (w, g), (b, gb) = (
        [noise(2 * len(shape) + i, *shape, dtype=dtype) for i in range(2)]
        for shape in [(11, 13), (11,)]
    )
    into = torch.zeros(11)
    add_importance(into, w, g, b, gb)
    rows = (w.double() * g.double()).sum(1)
    close(into, (rows + b.double() * gb.double()).abs())
    without = torch.zeros(11)
    add_importance(without, w, g)
    close(without, rows.abs())


def test_shipped_configurations(monkeypatch):
    monkeypatch.setattr(importance, "CONFIGS", SHIPPED[0])
    monkeypatch.setattr(importance, "_COLUMNS", SHIPPED[1])
    w, g = noise(0, 6, 1031), noise(1, 6, 1031)
    for entries in (6, 2):
        into = torch.zeros(entries)
        add_importance(into, w, g)
        close(into, (w.double() * g.double()).view(entries, -1).sum(1).abs())


def test_strided_views(dtype):
    w, g = noise(0, 6, 13, dtype=dtype), noise(1, 6, 13, dtype=dtype)
    wide = torch.full((9, 17), float("nan"), dtype=dtype)
    view = wide[2:8, 3:16].copy_(w)
    want, got = torch.zeros(3), torch.zeros(3)
    add_importance(want, w, g)
    add_importance(got, view, g.t().contiguous().t())
    assert torch.equal(got, want)


def test_rewiring_adds_the_same(monkeypatch):
    heads, size, neurons, hidden = 3, 5, 11, 13
    shapes = {"out": (heads * size, hidden), "up": (neurons, hidden), "down": (neurons, hidden)}
    weights = {name: noise(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    up = SimpleNamespace(weight=weights["up"], bias=noise(3, neurons))
    layer = SimpleNamespace(
        attention=SimpleNamespace(out=SimpleNamespace(weight_t=weights["out"])),
        ffn=SimpleNamespace(up=up, down=SimpleNamespace(weight_t=weights["down"])),
    )
    gradients = [noise(4 + i, *p.shape) for i, p in enumerate(_watched(layer))]
    want, got = ([torch.ones(heads), torch.ones(neurons)] for _ in range(2))
    _add_importance([layer], gradients, want[:1], want[1:])

    calls = []
    triton = ops.backends()["triton"]
    add = triton.kernels["add_importance"]
    counted = {"add_importance": lambda *tensors: calls.append(len(tensors)) or add(*tensors)}
    on_the_cpu = replace(triton, kernels=counted, devices=("cpu",), supports=lambda *_: None)
    monkeypatch.setitem(registry._backends, "triton", on_the_cpu)
    _add_importance([layer], gradients, got[:1], got[1:])
    assert calls == [3, 5, 3]
    for g, w in zip(got, want, strict=True):
        close(g, w)

    with ops.use_backend("reference"):
        _add_importance([layer], gradients, got[:1], got[1:])
    assert calls == [3, 5, 3]
