"""What packing does to numbers, and where it puts them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynabert_fast.engine.native import native_module
from dynabert_fast.engine.packing import PANEL, quantise_rows, to_bf16
from dynabert_fast.errors import InputError

FLOAT = np.finfo(np.float32)


def test_bf16_is_torchs():
    """Of numbers on both sides of every boundary, of all sizes and signs."""
    edges = np.arange(0, 1 << 16, dtype=np.uint32) << 16
    offsets = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = (edges[:, None] + offsets).ravel().view(np.float32)
    got = to_bf16(values)
    want = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    numbers = ~np.isnan(values)
    assert np.array_equal(got[numbers], want[numbers])
    assert set(got[~numbers]) == {0x7FC0}


def test_quantised_rows():
    rows = np.random.default_rng(0).standard_normal((50, 33)).astype(np.float32)
    rows *= np.logspace(-30, 30, 50, dtype=np.float32)[:, None]
    numbers, scale = quantise_rows(rows)
    assert (numbers.dtype, scale.dtype) == (np.int8, np.float32)
    assert (np.abs(numbers.astype(int)).max(1) == 127).all()
    error = np.abs(rows.astype(np.float64) - numbers * scale.astype(np.float64)[:, None])
    assert (error <= 0.5001 * scale[:, None]).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "top", [0.0, FLOAT.smallest_subnormal, 1e-40, FLOAT.tiny, 1e-37, FLOAT.max]
)
def test_quantised_rows_of_extreme_numbers(top):
    rows = np.array([[top, -top, top / 2, 0]], np.float32)
    numbers, scale = quantise_rows(rows)
    assert np.isfinite(scale).all()
    assert (numbers.astype(int) * np.sign(rows) >= 0).all()
    error = np.abs(rows.astype(np.float64) - numbers * scale.astype(np.float64)[:, None])
    # Half a step, or a number that nothing notices.
    assert error.max() <= max(0.5001 * float(scale[0]), 127 * float(FLOAT.tiny))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_quantised_rows_are_finite(value):
    with pytest.raises(InputError, match="int8 needs finite weights"):
        quantise_rows(np.array([[1, 2], [3, value]], np.float32))


def sections_of(engine):
    """The packed arrays by name."""
    types = {"f": np.float32, "h": np.uint16, "b": np.int8, "i": np.int32}
    return {
        name: engine._packed[offset : offset + size].view(types[kind]).reshape(shape)
        for name, kind, shape, _, offset, size in native_module().layout(engine.config.native())
    }


def test_layout(case, dtype, make_engine):
    """Sections lie apart, in order, each on a line of the cache."""
    engine = make_engine(case, dtype)
    end = 0
    for _, kind, shape, _, offset, size in native_module().layout(engine.config.native()):
        assert offset % 64 == 0
        assert end <= offset < end + 64
        assert size == np.prod(shape) * {"f": 4, "h": 2, "b": 1, "i": 4}[kind]
        end = offset + size
    assert end == engine.nbytes


def test_panels_hold_the_weights(case, dtype, make_engine):
    """`[columns / 64, K / group, 64, group]`, zero where there is no column or K."""
    sections = sections_of(make_engine(case, dtype))
    base = getattr(case.model, "dynabert", case.model)
    for i, layer in enumerate(base.encoder.layer):
        for name, weight, bias in (
            ("qkv", layer.attention.qkv.weight.flatten(0, -2), layer.attention.qkv.bias.flatten()),
            ("out", layer.attention.out.weight_t.T, layer.attention.out.bias),
            ("up", layer.ffn.up.weight, layer.ffn.up.bias),
            ("down", layer.ffn.down.weight_t.T, layer.ffn.down.bias),
        ):
            panels = sections[f"layer.{i}.{name}.panels"]
            assert panels.shape[2] == PANEL
            whole = panels.transpose(0, 2, 1, 3).reshape(panels.shape[0] * PANEL, -1)
            columns, rows = weight.shape
            want = weight.detach().numpy()
            if dtype == "int8":
                want, scale = quantise_rows(want)
                assert np.array_equal(sections[f"layer.{i}.{name}.scale"][:columns], scale)
            elif dtype == "bf16":
                want = to_bf16(want)
            assert np.array_equal(whole[:columns, :rows], want)
            assert not whole[columns:].any()
            assert not whole[:, rows:].any()
            packed_bias = sections[f"layer.{i}.{name}.bias"]
            assert np.array_equal(packed_bias[:columns], bias.detach().numpy())
            assert not packed_bias[columns:].any()
