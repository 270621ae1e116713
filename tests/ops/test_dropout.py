"""The keep mask is part of the contract: every backend computes these very bits."""

from __future__ import annotations

import itertools

import pytest
import torch

from dynabert_fast.ops.reference import keep_mask

SIDE = 256
ROWS, COLUMNS = torch.arange(SIDE)[:, None], torch.arange(SIDE)
# Neighbours, halves that are zero, the formula's constant (doubled, to fit), the ends, any other.
SEEDS = [0, 1, 2, 3, 1 << 32, (1 << 32) + 1, 0x3C6EF372 << 32, 2**63 - 1, -1, 7868437823427190124]


def mask(seed, p=0.5):
    return keep_mask(torch.tensor(seed), ROWS, COLUMNS, p)


def mix(h):
    """lowbias32, on Python's integers."""
    h ^= h >> 16
    h = h * 0x7FEB352D % 2**32
    h ^= h >> 15
    h = h * 0x846CA68B % 2**32
    return h ^ h >> 16


@pytest.mark.parametrize("seed", SEEDS)
def test_is_the_documented_formula(seed):
    high = seed >> 32 & 0xFFFFFFFF
    low = mix(seed & 0xFFFFFFFF ^ mix(high))
    cells = [(0, 0), (1, 0), (0, 1), (65535, 11 * 65536 + 65535), (2**31, 7), (3, 2**31 - 1)]
    for p, (row, column) in itertools.product((0.1, 0.5, 0.9), cells):
        bits = mix(mix(row ^ low) ^ (column * 0x9E3779B9 + high) % 2**32)
        got = keep_mask(torch.tensor(seed), torch.tensor(row), torch.tensor(column), p)
        assert bool(got) == (bits >= round(p * 2**32))


def test_zero_keeps_everything():
    assert mask(5, 0.0).all()


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", SEEDS)
def test_keep_rate(seed, p):
    kept = mask(seed, p).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 5 * deviation / SIDE
    for along in (0, 1):  # every row and every column, too
        assert (kept.mean(along) - (1 - p)).abs().max() < 5 * deviation / SIDE**0.5


def correlation(a, b):
    a, b = (x.double() - x.double().mean() for x in (a, b))
    return (a * b).mean() / (a.square().mean() * b.square().mean()).sqrt()


@pytest.mark.parametrize("seed", SEEDS)
def test_neighbouring_rows_and_columns_are_independent(seed):
    bits = mask(seed)
    for rows, columns in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (2, 3), (0, 64), (64, 0)):
        shifted = bits.roll((rows, columns), (0, 1))
        assert correlation(bits, shifted).abs() < 5 / SIDE, (rows, columns)


def lines(bits):
    return {line.numpy().tobytes() for line in bits.contiguous()}


def test_seeds_are_independent_neighbours_too():
    masks = {seed: mask(seed) for seed in SEEDS}
    rows = {seed: lines(bits) for seed, bits in masks.items()}
    columns = {seed: lines(bits.T) for seed, bits in masks.items()}
    for pair in itertools.combinations(SEEDS, 2):
        one, other = pair
        assert correlation(masks[one], masks[other]).abs() < 5 / SIDE, pair
        # Nor may one be the other with its rows or columns in another order.
        assert not rows[one] & rows[other], pair
        assert not columns[one] & columns[other], pair


def test_rows_and_columns_broadcast():
    seed = torch.tensor(7)
    big = keep_mask(seed, torch.arange(6).view(2, 3, 1), torch.arange(5).view(1, 1, 5), 0.5)
    assert torch.equal(big.view(6, 5), keep_mask(seed, ROWS[:6], COLUMNS[:5], 0.5))
