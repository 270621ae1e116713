"""How an engine is called: every kind of input, the model's own outputs, one clear error each."""

from __future__ import annotations

import os
from dataclasses import fields

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput

from dynabert_fast.engine import DTYPES, CpuEngine, EngineOutput, isas, measure_peak
from dynabert_fast.engine.native import native_module
from dynabert_fast.engine.packing import PackedConfig, pack
from dynabert_fast.errors import InputError
from dynabert_fast.models import DynaBertConfig
from dynabert_fast.subnet import Subnet

BASE, HEAD, ROBERTA = "bert, odd sizes, base", "bert", "roberta"
STAGES = {"embed", "qkv", "attention", "quantise", "out", "norm", "up", "down", "pool"}


@pytest.fixture(scope="module")
def base(make_case, make_engine):
    return make_engine(make_case(BASE), "fp32", threads=2)


@pytest.fixture(scope="module")
def head(make_case, make_engine):
    return make_engine(make_case(HEAD), "int8")


@pytest.fixture(scope="module")
def batch(make_case):
    return {k: v.numpy() for k, v in make_case(BASE).batch((9, 1, 6, 4)).items()}


def numbers(output):
    return {k: v for k, v in vars(output).items() if v is not None}


def assert_same(same, got, want):
    assert isinstance(got, EngineOutput)
    assert same(got, want)


# --- kinds of input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert",
    [
        np.ndarray.tolist,
        lambda a: [tuple(row) for row in a],
        list,
        lambda a: a.astype(np.int32),
        lambda a: a.astype(np.uint8),
        lambda a: a.astype(">i8"),
        np.asfortranarray,
        lambda a: np.repeat(a, 2, axis=1)[:, ::2],
        lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
        lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    ],
    ids=[
        "lists",
        "tuples",
        "list of arrays",
        "int32",
        "uint8",
        "big-endian",
        "Fortran order",
        "strided",
        "negative strides",
        "read-only",
    ],
)
def test_kinds_of_numbers(base, batch, same, convert):
    want = base(**batch)
    assert_same(same, base(**{k: convert(v) for k, v in batch.items()}), want)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_tensors(base, batch, kind):
    want = base(**batch)
    got = base(**{k: torch.from_numpy(v).to(kind) for k, v in batch.items()})
    assert isinstance(got, BaseModelOutputWithPooling)
    assert torch.equal(got.last_hidden_state, torch.from_numpy(want.last_hidden_state))
    assert torch.equal(got.pooler_output, torch.from_numpy(want.pooler_output))


def test_tensors_that_are_not_contiguous(base, batch):
    want = base(**batch).last_hidden_state
    tensors = {k: torch.from_numpy(v).T.contiguous().T for k, v in batch.items()}
    assert not tensors["input_ids"].is_contiguous()
    assert np.array_equal(base(**tensors).last_hidden_state.numpy(), want)


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.astype(bool),
        lambda m: m.astype(np.float32),
        lambda m: m * -3,
        lambda m: m.astype(bool).tolist(),
        lambda m: torch.from_numpy(m).bool(),
        lambda m: torch.from_numpy(m).bfloat16(),
    ],
    ids=["bool", "float32", "any number but zero", "lists", "tensor of bool", "tensor of bf16"],
)
def test_kinds_of_masks(base, batch, same, convert):
    ids, mask, types = (batch[k] for k in ("input_ids", "attention_mask", "token_type_ids"))
    assert_same(same, base(ids, convert(mask), types), base(ids, mask, types))


@pytest.mark.parametrize("convert", [list, np.int32, torch.tensor], ids=lambda f: f.__name__)
def test_lengths_are_a_mask(base, batch, same, convert):
    ids, mask = batch["input_ids"], batch["attention_mask"]
    lengths = mask.sum(1)
    assert_same(same, base(ids, lengths=convert(lengths)), base(ids, mask))
    whole = base(ids, lengths=[ids.shape[1]] * len(ids))
    assert_same(same, whole, base(ids))
    assert not same(whole, base(ids, mask))


def test_inputs_are_not_changed(base, batch):
    before = {k: v.copy() for k, v in batch.items()}
    frozen = {k: v.copy() for k, v in batch.items()}
    for array in frozen.values():
        array.flags.writeable = False
    base(**frozen)
    assert all(np.array_equal(frozen[k], before[k]) for k in before)


def test_results_are_the_callers(base, batch, same):
    """A later call does not write into them."""
    first = base(**batch)
    kept = {k: v.copy() for k, v in numbers(first).items()}
    base(np.roll(batch["input_ids"], 1), batch["attention_mask"])
    for name, value in numbers(first).items():
        assert same(value, kept[name])
        assert value.flags.writeable


# --- what the model does with the same arguments --------------------------------------------------


def test_output_classes(make_case, make_engine, batch):
    """The model's own, with the same fields, for tensors; arrays for anything else."""
    tensors = {k: torch.from_numpy(v) for k, v in batch.items()}
    kinds = {BASE: BaseModelOutputWithPooling, HEAD: SequenceClassifierOutput}
    for name, kind in kinds.items():
        case = make_case(name)
        engine = make_engine(case, "bf16")
        for states in (False, True):
            with torch.no_grad():
                want = case.model(**tensors, output_hidden_states=states)
            got = engine(**tensors, output_hidden_states=states)
            assert type(got) is type(want) is kind
            assert got.keys() == want.keys()
            for g, w in zip(got.to_tuple(), want.to_tuple(), strict=True):
                pairs = zip(g, w, strict=True) if isinstance(w, tuple) else [(g, w)]
                assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
            arrays = numbers(engine(**batch, output_hidden_states=states))
            assert arrays.keys() == set(got.keys())
            for field in arrays.values():
                for array in field if isinstance(field, tuple) else (field,):
                    assert array.dtype == np.float32


def test_hidden_states_end_with_the_last(make_case, make_engine, batch, same):
    engine = make_engine(make_case(BASE), "int8")
    for subnet in make_case(BASE).subnets().values():
        out = engine(**batch, subnet=subnet, output_hidden_states=True)
        assert len(out.hidden_states) == 1 + len(subnet.layers)
        assert same(out.hidden_states[-1], out.last_hidden_state)
        padding = batch["attention_mask"] == 0
        assert all(not h[padding].any() for h in out.hidden_states)
        assert same(out.last_hidden_state, engine(**batch, subnet=subnet).last_hidden_state)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_profile(make_case, make_engine, batch, same, dtype, threads):
    engine = make_engine(make_case(BASE), dtype, threads)
    out = engine(**batch, profile=True)
    assert out.seconds.keys() == STAGES
    assert all(seconds >= 0 for seconds in out.seconds.values())
    assert all(out.seconds[stage] > 0 for stage in STAGES - {"quantise"})
    assert (out.seconds["quantise"] > 0) == (dtype != "fp32")
    assert engine(**batch).seconds is None
    assert same(out, engine(**batch))


def test_no_sequence(base, head):
    empty = np.zeros((0, 5), np.int64)
    assert base(empty).last_hidden_state.shape == (0, 5, 77)
    assert base(empty).pooler_output.shape == (0, 77)
    assert head(empty, subnet=[]).logits.shape == (0, 3)
    assert len(base(empty, output_hidden_states=True).hidden_states) == 5


def test_longest_sequence(make_case, make_engine):
    for name, longest in ((BASE, 77), (ROBERTA, 75)):
        engine = make_engine(make_case(name), "bf16")
        assert engine.config.max_tokens == longest
        assert engine(np.full((1, longest), 5)) is not None
        with pytest.raises(InputError, match=rf"1 to {longest} tokens, got {longest + 1}"):
            engine(np.full((1, longest + 1), 5))


def test_ids_at_padding_do_not_matter(base, batch, same):
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert same(base(np.where(mask == 1, ids, -100), mask), base(ids, mask))


# --- the engine itself ----------------------------------------------------------------------------


def test_properties(make_case, monkeypatch):
    model = make_case(HEAD).model
    monkeypatch.delenv("DYNABERT_FAST_ISA", raising=False)
    engine = model.pack("bf16")
    assert engine.isa == isas()[0]
    assert engine.threads == len(os.sched_getaffinity(0))
    assert repr(engine).startswith(f"CpuEngine(bf16, {isas()[0]}, {engine.threads} threads, 0.")
    assert engine.nbytes == engine._packed.nbytes > 0
    assert engine.config.layer_heads == (4, 4, 4, 4)
    assert engine.config.label_names == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_default_is_int8_on_every_core(make_case):
    engine = make_case(HEAD).model.pack()
    assert engine.config.dtype == "int8"


def test_isa_of_the_environment(make_case, monkeypatch, isa):
    model = make_case(HEAD).model
    monkeypatch.setenv("DYNABERT_FAST_ISA", isa)
    assert model.pack().isa == isa
    assert model.pack(isa=isas()[0]).isa == isas()[0]  # an argument goes first


@pytest.mark.parametrize(("dtype", "width"), [("fp32", 4), ("bf16", 2), ("int8", 1)])
def test_packed_bytes_of_bert_base(dtype, width):
    """At most 1.02 times the bytes of the weights themselves; nothing is made to find that out."""
    config = DynaBertConfig()
    layer = 12 * (4 * 768**2 + 2 * 768 * 3072)
    weights = layer + (config.vocab_size + 512 + 2) * 768 + 768**2
    packed = PackedConfig.of(config, dtype, num_labels=0)
    assert weights * width < native_module().packed_bytes(packed.native()) <= 1.02 * weights * width


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_any_type_are_packed(make_case, dtype, same):
    """A model in float64 or bf16 packs as its float32 numbers do."""
    model = make_case(HEAD, torch.bfloat16).model
    want = model.pack(dtype)._packed
    assert same(make_case(HEAD, torch.bfloat16).model.double().pack(dtype)._packed, want)
    assert same(model.to(torch.bfloat16).pack(dtype)._packed, want)
    model.float()


def test_switching_copies_nothing(make_case, dtype):
    case = make_case(BASE)
    engine = case.model.pack(dtype, threads=2)
    memory, before = engine._packed.ctypes.data, engine._packed.copy()
    ids = np.arange(12).reshape(2, 6)
    assert not engine._subnets
    subnets = list(case.subnets().values())
    first = [engine(ids, subnet=s).last_hidden_state for s in subnets]
    assert len(engine._subnets) == len(subnets)
    for subnet, want in zip(subnets[::-1], first[::-1], strict=True):
        assert np.array_equal(engine(ids, subnet=subnet).last_hidden_state, want)
    again = Subnet(subnets[3].layers, subnets[3].heads, subnets[3].neurons)
    assert again is not subnets[3]
    engine(ids, subnet=[again, subnets[5]])
    assert len(engine._subnets) == len(subnets)
    assert engine._packed.ctypes.data == memory
    assert np.array_equal(engine._packed, before)
    assert engine.nbytes == before.nbytes


def test_weights_may_lie_in_memory_that_cannot_be_written(make_case, batch, dtype, same):
    engine = make_case(BASE).model.pack(dtype)
    want = engine(**batch)
    engine._packed.flags.writeable = False
    assert same(CpuEngine(engine.config, engine._packed)(**batch), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_measure_peak(dtype, isa):
    assert measure_peak(dtype, isa, seconds=1e-3) > 1e6


# --- errors ---------------------------------------------------------------------------------------

IDS = np.full((2, 4), 5)
# arguments of a call, and what its error says
CALLS = {
    "one dimension": ({"input_ids": IDS[0]}, r"input_ids must be \[batch, length\], got \[4\]"),
    "three": ({"input_ids": IDS[None]}, r"input_ids must be \[batch, length\], got \[1, 2, 4\]"),
    "a number": ({"input_ids": 7}, r"input_ids must be \[batch, length\], got \[\]"),
    "nothing": ({"input_ids": []}, "input_ids must be integers, got .* float64"),
    "no token": ({"input_ids": IDS[:, :0]}, "1 to 77 tokens, got 0"),
    "None": ({"input_ids": None}, "input_ids must be integers, got .* object"),
    "text": ({"input_ids": [["a", "film"]]}, "input_ids must be integers, got .* <U4"),
    "floats": ({"input_ids": IDS + 0.5}, "input_ids must be integers, got .* float64"),
    "bools": ({"input_ids": IDS > 0}, "input_ids must be integers, got .* bool"),
    "ragged": ({"input_ids": [[1, 2], [3]]}, "input_ids .* rows of different lengths"),
    "beyond int64": ({"input_ids": [[2**70]]}, "input_ids must be integers, got .* object"),
    "bf16 tensor": (
        {"input_ids": torch.zeros(2, 4, dtype=torch.bfloat16)},
        "input_ids must be a dense tensor .* got torch.bfloat16",
    ),
    "sparse tensor": (
        {"input_ids": torch.zeros(2, 4, dtype=torch.int64).to_sparse()},
        "input_ids must be a dense tensor .* got torch.int64 torch.sparse_coo",
    ),
    "another device": (
        {"input_ids": torch.zeros(2, 4, dtype=torch.int64, device="meta")},
        "input_ids must be on the CPU, got a tensor on meta",
    ),
    "unknown id": ({"input_ids": IDS + 56}, "token ids must be in 0 to 60, got 61; .* tokenizer"),
    "negative id": ({"input_ids": IDS - 6}, "token ids must be in 0 to 60, got -1"),
    "huge id": ({"input_ids": IDS + 2**40}, "token ids must be in 0 to 60, got 1099511627781"),
    "2^32": ({"input_ids": IDS + 2**32}, "token ids must be in 0 to 60, got 4294967301"),
    "unsigned": ({"input_ids": IDS.astype(np.uint64) + 2**63}, "token ids must be in 0 to 60"),
    "unknown type": (
        {"input_ids": IDS, "token_type_ids": IDS},
        "token_type_ids must be in 0 to 1, got 5",
    ),
    "unknown position": (
        {"input_ids": IDS, "position_ids": IDS + 72},
        "position_ids must be in 0 to 76, got 77",
    ),
    "types of another shape": (
        {"input_ids": IDS, "token_type_ids": IDS[:1]},
        "token_type_ids must have the shape of input_ids",
    ),
    "positions of one row": (
        {"input_ids": IDS, "position_ids": np.arange(4)},
        "position_ids must have the shape of input_ids",
    ),
    "float types": (
        {"input_ids": IDS, "token_type_ids": IDS / 5},
        "token_type_ids must be integers, got .* float64",
    ),
    "mask of another shape": (
        {"input_ids": IDS, "attention_mask": np.ones((2, 3))},
        r"attention_mask must be \[2, 4\] numbers, got \[2, 3\] float64",
    ),
    "mask of four dimensions": (
        {"input_ids": IDS, "attention_mask": np.ones((2, 1, 1, 4))},
        r"attention_mask must be \[2, 4\] numbers",
    ),
    "mask of text": (
        {"input_ids": IDS, "attention_mask": [["1"] * 4] * 2},
        r"attention_mask must be \[2, 4\] numbers, got \[2, 4\] <U1",
    ),
    "empty row": (
        {"input_ids": IDS, "attention_mask": [[1, 1, 1, 1], [0, 0, 0, 0]]},
        "attention_mask leaves no token in row 1; drop the row",
    ),
    "lengths and a mask": (
        {"input_ids": IDS, "attention_mask": IDS, "lengths": [4, 4]},
        "lengths or attention_mask, not both",
    ),
    "too few lengths": ({"input_ids": IDS, "lengths": [4]}, r"lengths must be \[2\], got \[1\]"),
    "no length": ({"input_ids": IDS, "lengths": [4, 0]}, "lengths must be in 1 to 4, got 0 to 4"),
    "beyond": ({"input_ids": IDS, "lengths": [5, 1]}, "lengths must be in 1 to 4, got 1 to 5"),
    "float lengths": (
        {"input_ids": IDS, "lengths": [4.0, 1.0]},
        r"lengths must be integers, got \[2\] float64",
    ),
    "a name for a sub-network": (
        {"input_ids": IDS, "subnet": "w0.50-d0.50"},
        "subnet must be a Subnet, got str",
    ),
    "a number for a sub-network": (
        {"input_ids": IDS, "subnet": 3},
        "subnet must be a Subnet, got int",
    ),
    "a name among sub-networks": (
        {"input_ids": IDS, "subnet": ["w0.50-d0.50"] * 2},
        "subnet must be a Subnet, got str",
    ),
    "too many sub-networks": (
        {"input_ids": IDS, "subnet": [Subnet((0,), (1,), (1,))] * 3},
        "one for each of 2 sequences, got 3",
    ),
    "no sub-network": ({"input_ids": IDS, "subnet": []}, "one for each of 2 sequences, got 0"),
    "unknown layer": (
        {"input_ids": IDS, "subnet": Subnet((4,), (1,), (1,))},
        "layers must be in 0 to 3, got 4",
    ),
    "too many heads": (
        {"input_ids": IDS, "subnet": Subnet((0,), (5,), (1,))},
        "heads of layer 0 must be in 1 to 4, got 5",
    ),
    "too many neurons": (
        {"input_ids": IDS, "subnet": Subnet((0, 2), (1, 1), (1, 302))},
        "neurons of layer 2 must be in 1 to 301, got 302",
    ),
    "layers out of order": (
        {"input_ids": IDS, "subnet": Subnet((2, 0), (1, 1), (1, 1))},
        "strictly ascending",
    ),
    "no layer": ({"input_ids": IDS, "subnet": Subnet((), (), ())}, "needs one layer or more"),
    "hidden states of two depths": (
        {
            "input_ids": IDS,
            "subnet": [Subnet((0,), (1,), (1,)), Subnet((0, 1), (1, 1), (1, 1))],
            "output_hidden_states": True,
        },
        "one depth, got 1 and 2 layers",
    ),
    "profile of tensors": (
        {"input_ids": torch.from_numpy(IDS), "profile": True},
        "profile needs input_ids as a numpy array or lists",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), CALLS.values(), ids=CALLS.keys())
def test_bad_call(base, same, arguments, message):
    want = base(IDS)
    with pytest.raises(InputError, match=message) as caught:
        base(**arguments)
    assert "\n" not in str(caught.value)
    assert same(base(IDS), want)  # and the engine goes on


PACKS = {
    "type": ({"dtype": "fp16"}, "dtype must be one of fp32, bf16, int8, got 'fp16'"),
    "no thread": ({"threads": 0}, "threads must be a whole number in 1 to 1024, got 0"),
    "too many threads": ({"threads": 1025}, "in 1 to 1024, got 1025"),
    "negative threads": ({"threads": -1}, "in 1 to 1024, got -1"),
    "half a thread": ({"threads": 1.5}, "a whole number in 1 to 1024, got 1.5"),
    "threads in words": ({"threads": "2"}, "a whole number in 1 to 1024, got '2'"),
    "instruction set": ({"isa": "mmx"}, "must be one of .*portable .*got mmx"),
    "no name": ({"isa": 512}, "isa must be the name of an instruction set, got 512"),
}


@pytest.mark.parametrize(("arguments", "message"), PACKS.values(), ids=PACKS.keys())
def test_bad_pack(make_case, arguments, message):
    with pytest.raises(InputError, match=message):
        make_case(HEAD).model.pack(**arguments)


def test_unknown_isa_in_the_environment(make_case, monkeypatch):
    monkeypatch.setenv("DYNABERT_FAST_ISA", "sse")
    with pytest.raises(InputError, match=r"must be one of .* got sse"):
        make_case(HEAD).model.pack()


def test_bad_measurement():
    with pytest.raises(InputError, match="dtype must be one of fp32, bf16, int8, got 'fp64'"):
        measure_peak("fp64")
    with pytest.raises(InputError, match="got mmx"):
        measure_peak("fp32", "mmx")


LAYER = "encoder.layer.1"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("embeddings.word.weight", "embeddings.word_embeddings.weight"),
        (f"{LAYER}.attention.qkv.weight", f"{LAYER}.attention.self.query.weight"),
        (f"{LAYER}.attention.out.weight_t", f"{LAYER}.attention.output.dense.weight"),
        (f"{LAYER}.ffn.norm.bias", f"{LAYER}.output.LayerNorm.bias"),
        ("pooler.dense.weight", "pooler.dense.weight"),
    ],
)
def test_weights_must_be_finite(make_model, name, saved, value, dtype):
    model = make_model(base=True)
    with torch.no_grad():
        model.get_parameter(name).flatten()[7] = value
    with pytest.raises(InputError) as error:
        model.pack(dtype)
    assert f"weights must be finite, and {saved} has NaN or infinite" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["attention.qkv.weight", "ffn.up.weight", "ffn.down.weight_t"])
@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
def test_a_weight_that_is_nan_is_not_hidden(make_model, dtype, name, act, isa):
    """The model's result is NaN, and so is the engine's, of weights that nobody checked."""
    model = make_model(base=True, hidden_act=act)
    ids = torch.full((1, 3), 5)
    with torch.no_grad():
        model.get_parameter(f"{LAYER}.{name}")[0] = float("nan")
        assert model(ids).last_hidden_state.isnan().all()
    config, state = PackedConfig.of(model.config, dtype, 0), model.state_dict()
    packed = pack(config, lambda name: state[name].numpy())
    engine = CpuEngine(config, packed, threads=1, isa=isa)
    assert np.isnan(engine(ids.numpy()).last_hidden_state).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[:-1], r"have \d+ bytes, the model's shape needs \d+"),
        (lambda a: np.append(a, a[:64]), r"have \d+ bytes, the model's shape needs \d+"),
        (lambda a: np.append(a[:1], a)[1:], "aligned to 64 bytes"),
        (lambda a: a[::-1], "without gaps"),
        (lambda a: a[::2], "without gaps"),
        (lambda a: a.view(np.int8), r"must be \[n\] uint8 without gaps, got \[\d+\] int8"),
        (lambda a: a[None], r"must be \[n\] uint8 without gaps, got \[1, \d+\] uint8"),
    ],
    ids=["too few", "too many", "not aligned", "backwards", "strided", "int8", "two dimensions"],
)
def test_bytes_that_do_not_fit(head, change, message):
    with pytest.raises(InputError, match=message):
        CpuEngine(head.config, change(head._packed))


def test_fields_of_outputs():
    names = ["logits", "pooler_output", "last_hidden_state", "hidden_states", "seconds"]
    assert [f.name for f in fields(EngineOutput)] == names
