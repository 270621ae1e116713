"""Damaged files: each is refused with `InputError`, or opens and runs.

    python fuzz_files.py FILE COUNT

Works in the folder of FILE, a good one. Needs numpy only.
"""

from __future__ import annotations

import json
import random
import struct
import sys
import zlib
from pathlib import Path

import numpy as np

from dynabert_fast.engine import load
from dynabert_fast.errors import InputError
from dynabert_fast.subnet import grid

GOOD = Path(sys.argv[1])
COUNT = int(sys.argv[2])
WHOLE = GOOD.read_bytes()
PREAMBLE = struct.Struct("<8sIII")
HEADER_END = PREAMBLE.size + PREAMBLE.unpack_from(WHOLE)[2]
START = HEADER_END + -HEADER_END % 4096
DAMAGED = GOOD.with_name("damaged")

chance = random.Random(0)
seen = {"refused": 0, "ran": 0}


def run(engine):
    """A batch of any sub-networks; results may be anything."""
    config = engine.config
    rows, length = chance.randint(1, 4), chance.randint(1, min(9, config.max_tokens))
    ids = np.array(
        [[chance.randrange(config.vocab_size) for _ in range(length)] for _ in range(rows)]
    )
    subnets = [chance.choice(grid(config)) for _ in range(rows)]
    lengths = [chance.randint(1, length) for _ in range(rows)]
    with np.errstate(all="ignore"):
        engine(ids, subnet=subnets, lengths=lengths)


def attempt(data, must_refuse=False, verify=False):
    DAMAGED.write_bytes(data)
    try:
        engine = load(DAMAGED, threads=chance.choice((1, 2)), verify=verify)
        assert not must_refuse, "a damaged file was opened"
        run(engine)
    except InputError:
        seen["refused"] += 1
    else:
        seen["ran"] += 1


def flipped(begin, end):
    """One to four bytes of a region changed."""
    data = bytearray(WHOLE)
    for _ in range(chance.randint(1, 4)):
        data[chance.randrange(begin, end)] ^= chance.randint(1, 255)
    return bytes(data)


def with_header(text):
    preamble = PREAMBLE.pack(b"DYNABERT", 1, len(text), zlib.crc32(text))
    return preamble + text + b"\0" * (-(len(preamble) + len(text)) % 4096) + WHOLE[START:]


def anything(depth=0):
    """A value that JSON can hold."""
    kinds = [
        lambda: chance.choice((0, 1, -1, 2**31 - 1, 2**31, -(2**31), 2**63, 10**30)),
        lambda: chance.randint(-(2**33), 2**33),
        lambda: chance.choice((0.5, -1e300, float("nan"), float("inf"), 1e-320)),
        lambda: chance.choice(("", "int8", "relu", "\ud800", "\0", "x" * 5000)),
        lambda: chance.choice((None, True, False)),
    ]
    if depth < 3:
        kinds.append(lambda: [anything(depth + 1) for _ in range(chance.randint(0, 5))])
        kinds.append(lambda: {str(anything(3)): anything(depth + 1) for _ in range(2)})
    return chance.choice(kinds)()


def plausible(value):
    """Another value of its type."""
    if isinstance(value, list):
        return value[: chance.randint(0, 3)] + value * chance.randint(0, 2)
    if isinstance(value, str):
        return chance.choice(("fp32", "bf16", "int8", "", "relu", "gelu_tanh"))
    if isinstance(value, float):
        return value * chance.choice((0, -1, 1e6, 1e30))
    if isinstance(value, int):
        return value + chance.choice((-1, 1, 1000, -(10**6)))
    return anything()


def other_header():
    """The header with a field or two changed."""
    header = json.loads(WHOLE[PREAMBLE.size : HEADER_END])
    model = header["model"]
    for _ in range(chance.randint(1, 2)):
        name = chance.choice(list(model))
        value = model[name]
        model[name] = plausible(value) if chance.random() < 0.5 else anything()
        if chance.random() < 0.1:
            del model[chance.choice(list(model))]
    return json.dumps(header).encode()


for cut in (*range(HEADER_END + 1), *range(HEADER_END + 1, START, 64), START):
    attempt(WHOLE[:cut], must_refuse=True)
for _ in range(100 * COUNT):
    attempt(WHOLE[: chance.randrange(START, len(WHOLE))], must_refuse=True)
for _ in range(2000 * COUNT):
    attempt(flipped(0, HEADER_END), must_refuse=True)
for _ in range(1000 * COUNT):
    attempt(with_header(other_header()))
for _ in range(300 * COUNT):  # a header that is no longer the JSON it was
    text = bytearray(WHOLE[PREAMBLE.size : HEADER_END])
    for _ in range(chance.randint(1, 3)):
        text[chance.randrange(len(text))] = chance.randrange(256)
    attempt(with_header(bytes(text)))
for _ in range(300 * COUNT):
    attempt(bytes(chance.randbytes(chance.randrange(10_000))), must_refuse=True)
assert seen["refused"] > 2000 * COUNT, seen
before = seen["ran"]
for _ in range(500 * COUNT):
    attempt(flipped(START, len(WHOLE)))
assert seen["ran"] == before + 500 * COUNT
for _ in range(100 * COUNT):  # more than a few bytes: whole kilobytes of noise
    data, at = bytearray(WHOLE), chance.randrange(START, len(WHOLE))
    noise = chance.randbytes(4096)[: len(WHOLE) - at]
    data[at : at + len(noise)] = noise
    attempt(bytes(data))
    attempt(bytes(data), must_refuse=True, verify=True)
DAMAGED.unlink()
print(seen)
