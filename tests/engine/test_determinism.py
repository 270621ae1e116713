"""A sequence's result has the same bits alone, in any batch, padded, in any order, on any threads;
and a call leaves nothing behind for the next one.
"""

from __future__ import annotations

import numpy as np
import pytest

from dynabert_fast.engine.native import native_module
from dynabert_fast.subnet import Subnet

LENGTHS = (70, 1, 37, 13, 64, 6)
LONGEST = 74  # what RoBERTa has positions for


def sequences(case):
    """`[(ids, types)]`, each as long as it is."""
    batch = {k: v.numpy() for k, v in case.batch(LENGTHS).items()}
    ids, types = batch["input_ids"], batch["token_type_ids"]
    return [(ids[i, :n], types[i, :n]) for i, n in enumerate(LENGTHS)]


def run(engine, texts, subnets, length=None, order=None, hidden=True):
    """Results of each text in the order of `texts`: bytes of its outputs, of real tokens only.

    Args:
        length: Of the padded rows, filled with ids and types that must not matter.
        order: In which the texts stand in the batch.
    """
    order = range(len(texts)) if order is None else order
    length = length or max(len(texts[i][0]) for i in order)
    shape = (len(texts), length)
    ids, types = np.full(shape, engine.config.vocab_size - 1), np.ones(shape, np.int64)
    mask = np.zeros(shape, bool)
    for row, i in enumerate(order):
        n = len(texts[i][0])
        ids[row, :n], types[row, :n] = texts[i]
        mask[row, :n] = True
    chosen = [subnets[i] for i in order] if isinstance(subnets, list) else subnets
    out = engine(ids, mask, types, subnet=chosen, output_hidden_states=hidden)
    found = [b""] * len(texts)
    for row, i in enumerate(order):
        arrays = (out.logits, out.pooler_output, out.last_hidden_state, *(out.hidden_states or ()))
        parts = [a[row, mask[row]] if a.ndim == 3 else a[row] for a in arrays if a is not None]
        assert parts
        found[i] = b"".join(part.tobytes() for part in parts)
    return found


def alone(engine, texts, subnets, hidden=True):
    chosen = subnets if isinstance(subnets, list) else [subnets] * len(texts)
    return [
        run(engine, [text], subnet, hidden=hidden)[0]
        for text, subnet in zip(texts, chosen, strict=True)
    ]


@pytest.fixture
def engine_of(make_engine, case, dtype, isa):
    return lambda threads: make_engine(case, dtype, threads, isa)


@pytest.fixture
def texts(case):
    return sequences(case)


def test_batches(case, engine_of, texts):
    subnet = case.subnets()["heterogeneous"]
    want = alone(engine_of(1), texts, subnet)
    assert len(set(want)) == len(want)
    shuffled = [3, 0, 5, 1, 4, 2]
    for threads in (1, 2, 3):
        engine = engine_of(threads)
        assert alone(engine, texts, subnet) == want
        assert run(engine, texts, subnet) == want
        assert run(engine, texts, subnet, length=LONGEST) == want
        assert run(engine, texts, subnet, order=shuffled) == want
        assert run(engine, texts[:3] * 2, subnet) == want[:3] * 2


def test_mixed_batch(case, engine_of, texts):
    """One sub-network for each sequence is the same as a call for each, in the caller's order."""
    subnets = list(case.subnets().values())
    subnets += subnets[:3]  # some of them twice, apart from each other
    texts = [texts[i % len(texts)] for i in range(len(subnets))]
    want = alone(engine_of(1), texts, subnets, hidden=False)
    backwards = range(len(subnets))[::-1]
    for threads in (1, 2, 3):
        engine = engine_of(threads)
        assert run(engine, texts, subnets, hidden=False) == want
        assert run(engine, texts, subnets, order=backwards, hidden=False) == want


def test_mixed_batch_with_hidden_states(case, engine_of, texts):
    """Of as many layers each, but not the same ones."""
    chosen = [
        Subnet.from_extents(case.config, layers, heads, neurons)
        for layers, heads, neurons in (
            ((0, 1), (1, 4), (7, 19)),
            ((2, 3), (4, 2), (20, 1)),
            ((0, 3), (3, 3), (20, 20)),
        )
    ] * 2
    want = alone(engine_of(1), texts, chosen)
    for threads in (1, 2):
        assert run(engine_of(threads), texts, chosen) == want


@pytest.fixture
def broken_token():
    """`broken_token(engine)`: an id whose embedding is NaN from now on."""

    def make(engine):
        word = engine.config.vocab_size - 1
        of_name = {s[0]: s for s in native_module().layout(engine.config.native())}
        name = "word.scale" if engine.config.dtype == "int8" else "word.rows"
        _, kind, (rows, *_), _, offset, size = of_name[name]
        types = {"f": (np.float32, np.nan), "h": (np.uint16, 0x7FC0)}
        numbers, nan = types[kind]
        engine._packed[offset : offset + size].view(numbers).reshape(rows, -1)[word] = nan
        return word

    return make


@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_of_an_earlier_call_or_another_sequence(
    case, dtype, isa, texts, broken_token, threads
):
    """A sequence of NaN makes every buffer of the engine NaN, and no other result."""
    engine = case.model.pack(dtype, threads=threads, isa=isa)
    word = broken_token(engine)
    texts = [(np.where(ids == word, 5, ids), types) for ids, types in texts]
    subnets = list(case.subnets().values())
    chosen = [subnets[i] for i in (11, 4, 12, 14, 0, 3)]
    want = alone(engine, texts, chosen, hidden=False)

    poison = (np.full(LONGEST, word), np.zeros(LONGEST, np.int64))
    out = engine(np.tile(poison[0], (8, 1)), output_hidden_states=True)
    assert np.isnan(np.stack(out.hidden_states)).all()
    assert np.isnan(out.logits if out.pooler_output is None else out.pooler_output).all()

    assert alone(engine, texts, chosen, hidden=False) == want
    together = run(engine, [*texts, poison], [*chosen, subnets[0]], hidden=False)
    assert together[:-1] == want
