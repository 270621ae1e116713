"""Calls with random arguments: each is refused with `InputError` or gives results of its shape.

    python fuzz_calls.py FILE COUNT

FILE is a packed model. Needs numpy only.
"""

from __future__ import annotations

import random
import sys

import numpy as np

from dynabert_fast.engine import load
from dynabert_fast.errors import InputError
from dynabert_fast.subnet import Subnet, grid

COUNT = int(sys.argv[2])
KINDS = "i1 i2 i4 i8 u1 u2 u4 u8 >i8 >i4 f2 f4 f8 ? O U3 S2 c8 M8[s] m8[s]".split()
EDGES = (0, 1, -1, 60, 61, 76, 77, 127, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**63 - 1, -(2**63))

chance, numbers = random.Random(1), np.random.default_rng(1)
engines = [load(sys.argv[1], threads=threads) for threads in (1, 2, 3)]
config = engines[0].config
subnets = grid(config)
seen = {"refused": 0, "ran": 0}


def shape(wanted):
    """Mostly the one that is wanted."""
    if chance.random() < 0.9:
        return wanted
    return tuple(chance.choice((0, 1, 2, 3, 5, 78)) for _ in range(chance.randint(0, 4)))


def array(wanted, low, high):
    """Mostly integers in their range."""
    values = numbers.integers(low, high, shape(wanted))
    if values.size and chance.random() < 0.05:
        values.flat[chance.randrange(values.size)] = chance.choice(EDGES)
    if chance.random() < 0.1:
        with np.errstate(all="ignore"):
            values = values.astype(chance.choice(KINDS))
    form = chance.randrange(6)
    if form == 0:
        return values.tolist()
    if form == 1 and values.ndim:
        return np.repeat(values, 3, axis=-1)[..., 1::3]
    if form == 2:
        return np.asfortranarray(values)
    if form == 3 and values.ndim:
        return values[::-1].copy()[::-1]
    return values


def subnet(rows):
    form = chance.randrange(10)
    if form < 4:
        return chance.choice(subnets)
    if form < 7:
        return [chance.choice(subnets) for _ in range(rows)]
    if form == 7:
        size, ints = chance.randint(0, 3), (-1, 0, 1, 2, 9, np.int8(1), 2**31, -(2**70))
        return Subnet(*(tuple(chance.choice(ints) for _ in range(size)) for _ in "lhn"))
    if form == 8:
        return chance.choice(("w1.00-d1.00", 3, [], [None], {}, object(), [subnets[0]] * 2))
    return None


def call(engine):
    rows, length = chance.randint(0, 5), chance.choice((1, 2, 3, 7, 40, config.max_tokens))
    size = (rows, length)
    given = {"input_ids": array(size, 0, config.vocab_size)}
    for name, likely, make in (
        ("attention_mask", 0.4, lambda: array(size, 0, 2)),
        ("token_type_ids", 0.4, lambda: array(size, 0, config.type_vocab_size)),
        ("position_ids", 0.3, lambda: array(size, 0, config.max_position_embeddings)),
        ("lengths", 0.3, lambda: array((rows,), 1, length + 1)),
        ("subnet", 0.7, lambda: subnet(rows)),
        ("output_hidden_states", 0.3, lambda: chance.random() < 0.8),
        ("profile", 0.2, lambda: True),
    ):
        if chance.random() < likely:
            given[name] = make()
    try:
        out = engine(**given)
    except InputError:
        seen["refused"] += 1
        return
    rows, length = np.asarray(given["input_ids"]).shape
    expected = {
        "logits": (rows, config.num_labels) if config.num_labels else None,
        "pooler_output": None if config.num_labels else (rows, config.hidden_size),
        "last_hidden_state": None if config.num_labels else (rows, length, config.hidden_size),
    }
    for name, want in expected.items():
        found = getattr(out, name)
        assert (None if found is None else found.shape) == want, (name, given)
    for found in (out.logits, out.pooler_output, *(out.hidden_states or ())):
        assert found is None or np.isfinite(found).all(), given
    seen["ran"] += 1


for number in range(2000 * COUNT):
    call(engines[number % len(engines)])
assert min(seen.values()) > 300 * COUNT, seen
print(seen)
