"""Forward latency of every sub-network at batch 1, against `transformers` at full size.

Each model is random, of the size named; its outputs are compared before anything is timed.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel

from dynabert_fast.models import DynaBertConfig, DynaBertModel
from dynabert_fast.subnet import Subnet, grid

SIZES = {
    "minilm": {
        "num_hidden_layers": 6,
        "hidden_size": 384,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "bert-base": {
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
}
VOCABULARY = 1000  # rows of a table that is only looked up
LENGTHS = (32, 128)
CELLS = [str(s) for s in grid(DynaBertConfig(**SIZES["bert-base"]))]
# 5e-6 of values about 1 is what float32 leaves after 12 layers of sums over up to 3072 terms.
TOLERANCE = 5e-5


@functools.lru_cache(maxsize=1)  # the tests of one size come one after another
def models(size: str) -> tuple[BertModel, DynaBertModel]:
    """A random BERT of `transformers` (sdpa attention) and ours with its weights."""
    torch.manual_seed(0)
    fields = SIZES[size] | {"vocab_size": VOCABULARY}
    theirs = BertModel(BertConfig(**fields, attn_implementation="sdpa")).eval()
    ours = DynaBertModel(DynaBertConfig(**fields)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@functools.cache
def check(size: str, cell: str) -> None:
    """The whole model agrees with `transformers`, a sub-network with its slice, at 16 tokens."""
    theirs, ours = models(size)
    ids = ids_of(16)
    if cell == "transformers":
        got, want = ours(ids), theirs(ids)
    else:
        subnet = Subnet.parse(ours.config, cell)
        got, want = ours(ids, subnet=subnet), ours.extract(subnet)(ids)
    torch.testing.assert_close(
        got.last_hidden_state, want.last_hidden_state, rtol=0, atol=TOLERANCE
    )


def ids_of(length: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))


def time_forward(benchmark, run, row: str, baseline: bool = False) -> None:
    benchmark.extra_info |= {"row": row, "baseline": baseline}
    benchmark.pedantic(run, rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("cell", ["transformers", *CELLS])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("size", SIZES)
def test_forward(benchmark, size, length, cell):
    benchmark.group = f"{size}, 1 x {length}, float32"
    theirs, ours = models(size)
    ids = ids_of(length)
    with torch.inference_mode():
        check(size, cell)
        if cell == "transformers":
            time_forward(benchmark, lambda: theirs(ids), cell, baseline=True)
        else:
            subnet = Subnet.parse(ours.config, cell)
            time_forward(benchmark, lambda: ours(ids, subnet=subnet), cell)


class Refuse(TorchDispatchMode):
    """Fails on any tensor operation: what runs under it neither computes, allocates nor copies."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"switching ran {function}")


def test_switch(benchmark):
    """Host time of making a view of another sub-network; no tensor is touched."""
    benchmark.group = "switch"
    _, model = models("bert-base")
    subnets = grid(model.config)
    with Refuse():
        views = [model.at(subnet) for subnet in subnets]
    pointers = [p.data_ptr() for p in model.parameters()]
    assert all([p.data_ptr() for p in view.parameters()] == pointers for view in views)
    benchmark.extra_info["bytes copied"] = 0
    benchmark(lambda: [model.at(subnet) for subnet in subnets])


@pytest.mark.parametrize("order", ["one sub-network", "another each time"])
def test_alternate(benchmark, order):
    """The same twelve calls of two sub-networks: grouped, and switching at every call."""
    benchmark.group = "minilm, 12 calls of two sub-networks"
    _, model = models("minilm")
    subnets = [Subnet.from_multipliers(model.config, width, 0.5) for width in (0.5, 0.25)]
    calls = subnets * 6 if order == "another each time" else sorted(subnets * 6, key=str)
    ids = ids_of(32)

    def run():
        for subnet in calls:
            model(ids, subnet=subnet)

    with torch.inference_mode():
        time_forward(benchmark, run, order, baseline=order == "one sub-network")
