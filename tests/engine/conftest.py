"""Small models of every kind, what they compute in plain torch, and int8 in plain torch."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dynabert_fast.engine import DTYPES, CpuEngine, isas
from dynabert_fast.subnet import Subnet, grid

# More than the longest sequence of the tests (70), so that there is room to pad it further.
POSITIONS = 77
# Sizes that no panel (64), block (256) or word divides, head sizes odd and even; D != H * d.
MODELS: dict[str, dict[str, Any]] = {
    "bert": {},
    "bert, odd sizes, base": {
        "base": True,
        "hidden_size": 77,
        "head_size": 11,
        "intermediate_size": 301,
        "hidden_act": "gelu_new",
    },
    "roberta": {
        "family": "roberta",
        "hidden_size": 64,
        "head_size": 32,
        "intermediate_size": 130,
        "hidden_act": "relu",
    },
    "xlm-roberta, base": {
        "family": "xlm-roberta",
        "base": True,
        "hidden_size": 50,
        "head_size": 64,
        "intermediate_size": 257,
    },
    "layers that differ": {
        "base": True,
        "hidden_size": 33,
        "head_size": 7,
        "heads_per_layer": [4, 9, 4, 5],
        "neurons_per_layer": [65, 20, 259, 64],
    },
}

Outputs = dict[str, Tensor]


@dataclass
class Case:
    """A model in float32, by its name in `MODELS`."""

    name: str
    model: Any

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def is_base(self) -> bool:
        return not hasattr(self.model, "classifier")

    def subnets(self) -> dict[str, Subnet]:
        """The grid, and sub-networks whose layers differ."""
        heads, neurons = self.config.layer_heads, self.config.layer_neurons
        found = {str(s): s for s in grid(self.config)}
        assert len(found) == 12
        for name, layers, h, n in (
            ("heterogeneous", (0, 2, 3), (3, 1, heads[3]), (7, neurons[2], 1)),
            ("last layer", (3,), (2,), (13,)),
            ("one of each", (1,), (1,), (1,)),
        ):
            found[name] = Subnet.from_extents(self.config, layers, h, n)
        return found

    def batch(self, lengths: Sequence[int] = (70, 1, 37, 13, 64), seed: int = 0) -> Outputs:
        """Right-padded; the padding id also stands between real tokens."""
        generator = torch.Generator().manual_seed(seed)
        shape = (len(lengths), max(lengths))
        vocabulary, types = self.config.vocab_size, self.config.type_vocab_size
        ids = torch.randint(0, vocabulary, shape, generator=generator)
        mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
        return {
            "input_ids": ids.masked_fill(mask == 0, self.config.pad_token_id),
            "attention_mask": mask,
            "token_type_ids": torch.randint(0, types, shape, generator=generator),
        }


@pytest.fixture(scope="session")
def make_case(make_model) -> Callable[..., Case]:
    """`make_case(name, weights=float32)`: a model, whose weights are numbers of that type."""
    made: dict[Any, Case] = {}

    def make(name: str, weights: torch.dtype = torch.float32) -> Case:
        if (name, weights) not in made:
            fields = {"max_position_embeddings": POSITIONS, **MODELS[name]}
            made[name, weights] = Case(name, make_model(**fields).to(weights).float())
        return made[name, weights]

    return make


@pytest.fixture(scope="session")
def case_of() -> Callable[[str, Any], Case]:
    """`case_of(name, model)`: any other model as a case."""
    return Case


@pytest.fixture(params=MODELS)
def case(request, make_case) -> Case:
    return make_case(request.param)


@pytest.fixture(scope="session")
def make_engine() -> Callable[..., CpuEngine]:
    """`make_engine(case, dtype, threads=1, isa=None)`: an engine; its weights are packed once."""
    packed: dict[Any, CpuEngine] = {}

    def make(case: Case, dtype: str, threads: int = 1, isa: str | None = None) -> CpuEngine:
        key = case.model, dtype
        if key not in packed:
            packed[key] = case.model.pack(dtype, threads=1)
        first = packed[key]
        return CpuEngine(first.config, first._packed, threads, isa)

    return make


@pytest.fixture(params=DTYPES)
def dtype(request) -> str:
    return request.param


@pytest.fixture(params=isas())
def isa(request) -> str:
    return request.param


def outputs(result: Any) -> Outputs:
    """The tensors of a model's or an engine's output; hidden states one by one."""
    found = {k: v for k, v in result.items() if k != "hidden_states"}
    return found | {f"hidden_states[{i}]": h for i, h in enumerate(result.hidden_states)}


@pytest.fixture(scope="session", name="outputs")
def _outputs() -> Callable[[Any], Outputs]:
    return outputs


@pytest.fixture(scope="session")
def run_model() -> Callable[..., Outputs]:
    """`run_model(case, type, subnet, batch)`: plain torch in a type."""
    from dynabert_fast.ops import use_backend

    cast: dict[Any, Any] = {}

    def run(case: Case, dtype: torch.dtype, subnet: Subnet, batch: Outputs) -> Outputs:
        key = case.model, dtype
        if key not in cast:
            cast[key] = copy.deepcopy(case.model).to(dtype)
        with torch.no_grad(), use_backend("reference"):
            return outputs(cast[key](**batch, subnet=subnet, output_hidden_states=True))

    return run


# ---- int8 in plain torch -------------------------------------------------------------------------


def _quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as whole numbers in -127 to 127, and the scale of each."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale.where(scale > 0, 1)).round(), scale


def _bf16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


def simulate_int8(case: Case, dtype: torch.dtype, subnet: Subnet, batch: Outputs) -> Outputs:
    """The int8 engine's arithmetic, one sequence at a time, in `dtype` where it has float32.

    Weights are quantised by output column, embeddings by row, activations by token; attention, and
    what the FFN hands on, is bf16.
    """
    model, config = case.model, case.config
    base = getattr(model, "dynabert", model)
    activate = {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
    }[config.activation]

    def linear(x: Tensor, weight: Tensor, bias: Tensor, columns: int) -> Tensor:
        """Of `weight [columns, K]`, quantised whole, the prefixes that are used."""
        w, of_column = _quantise(weight.to(dtype))
        q, of_token = _quantise(x)
        products = q @ w[:columns, : x.shape[-1]].T
        return products * of_token * of_column[:columns, 0] + bias[:columns].to(dtype)

    def norm(x: Tensor, layer: Any) -> Tensor:
        weight, bias = layer.weight.to(dtype), layer.bias.to(dtype)
        return F.layer_norm(x, x.shape[-1:], weight, bias, layer.eps)

    def look_up(table: Any, ids: Tensor) -> Tensor:
        rows, scale = _quantise(table.weight.to(dtype))
        return rows[ids] * scale[ids]

    def attend(qkv: Tensor, heads: int) -> Tensor:
        q, k, v = qkv.unflatten(-1, (heads, 3, config.head_size)).permute(2, 1, 0, 3)
        scores = q @ k.mT * config.head_size**-0.5
        weights = _bf16((scores - scores.amax(-1, keepdim=True)).exp())
        return (weights @ v / weights.sum(-1, keepdim=True)).transpose(0, 1).flatten(1)

    def encode(ids: Tensor, types: Tensor, positions: Tensor) -> list[Tensor]:
        tables = base.embeddings
        x = look_up(tables.word, ids) + look_up(tables.token_type, types)
        hidden = [norm(x + look_up(tables.position, positions), tables.norm)]
        for i, heads, neurons in zip(subnet.layers, subnet.heads, subnet.neurons, strict=True):
            layer, x = base.encoder.layer[i], hidden[-1]
            attention, ffn = layer.attention, layer.ffn
            weight, bias = attention.qkv.weight.flatten(0, -2), attention.qkv.bias.flatten()
            qkv = linear(x, weight, bias, heads * 3 * config.head_size)
            context = _bf16(attend(_bf16(qkv), heads))
            y = linear(context, attention.out.weight_t.T, attention.out.bias, config.hidden_size)
            x = norm(x + y, attention.norm)
            middle = _bf16(activate(linear(x, ffn.up.weight, ffn.up.bias, neurons)))
            y = linear(middle, ffn.down.weight_t.T, ffn.down.bias, config.hidden_size)
            hidden.append(norm(x + y, ffn.norm))
        return hidden

    with torch.no_grad():
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids))
        types = batch.get("token_type_ids", torch.zeros_like(ids))
        positions = batch.get("position_ids", base.embeddings.position_ids(ids))
        shape = (1 + len(subnet.layers), *ids.shape, config.hidden_size)
        hidden, first = torch.zeros(shape, dtype=dtype), []
        for row, real in enumerate(mask.bool()):
            states = encode(ids[row, real], types[row, real], positions[row, real])
            hidden[:, row, real] = torch.stack(states)
            first.append(states[-1][0])
        dense = base.pooler.dense
        pooled = linear(torch.stack(first), dense.weight, dense.bias, config.hidden_size).tanh()
        found = {f"hidden_states[{i}]": h for i, h in enumerate(hidden)}
        if case.is_base:
            return found | {"last_hidden_state": hidden[-1], "pooler_output": pooled}
        weight, bias = (p.to(dtype) for p in model.classifier.parameters())
        return found | {"logits": F.linear(pooled, weight, bias)}


@pytest.fixture(scope="session", name="simulate_int8")
def _simulate_int8() -> Callable[..., Outputs]:
    return simulate_int8


# ---- bits ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def same() -> Callable[[Any, Any], bool]:
    """Whether two outputs of an engine, or two arrays, have the same bits."""

    def bits(output: Any) -> Any:
        if output is None or isinstance(output, np.ndarray):
            return None if output is None else (output.shape, output.dtype, output.tobytes())
        if isinstance(output, tuple):
            return tuple(map(bits, output))
        return {k: bits(v) for k, v in vars(output).items() if k != "seconds"}

    return lambda a, b: bits(a) == bits(b)


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Environment of a real process: one OpenMP thread, this checkout on its path."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
