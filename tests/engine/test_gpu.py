"""The GPU engine. On a CPU its graphs are plain calls on the same padded buffers: what it packs,
pads, picks and gives back is tested anywhere, what CUDA makes of it where there is a GPU.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from dynabert_fast.engine import EngineOutput, GpuEngine
from dynabert_fast.engine.gpu import Bucket, token_bucket
from dynabert_fast.errors import InputError
from dynabert_fast.subnet import Subnet

SUBNETS = "w1.00-d1.00", "w0.50-d0.75", "l3-h2-n13"
# float32 sums on the way through four layers, in another order on a GPU.
CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


@pytest.fixture
def pair(make_model, device):
    """`pair(**model)`: a model, and an engine of it in float32 on the device."""

    def make(**fields):
        model = make_model(**fields).eval()
        # `pack` picks the engine by the device; here it is this one on a CPU too.
        return model, GpuEngine(model.to(device), "fp32")

    return make


def same(got, want):
    assert type(got) is type(want)
    assert got.keys() == want.keys()
    for name in got:
        torch.testing.assert_close(got[name].cpu(), want[name].cpu(), **CLOSE)


@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("subnet", SUBNETS)
@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("base", [True, False])
def test_is_the_model(pair, make_batch, device, base, family, subnet, padding):
    model, engine = pair(base=base, family=family)
    subnet = Subnet.parse(model.config, subnet)
    on = {k: v.to(device) for k, v in make_batch(family, padding).items()}
    with torch.no_grad():
        same(engine(**on, subnet=subnet), model(**on, subnet=subnet))
        host = {k: v.cpu() for k, v in on.items()}
        same(engine(**host, subnet=subnet), model(**on, subnet=subnet))


def test_batches_of_one_bucket_do_not_see_each_other(pair, device):
    """Longer, shorter, padded, with types: nothing is left of the batch before."""
    model, engine = pair(base=True)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for batch, length in ((4, 8), (3, 10), (3, 8), (4, 7), (4, 8), (3, 9)):
        ids = torch.randint(4, model.config.vocab_size, (batch, length), generator=generator)
        mask = torch.rand(batch, length, generator=generator) < 0.9
        mask[:, 0] = True
        types = torch.randint(0, 2, (batch, length), generator=generator)
        batches += [{"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}]
        batches += [{"input_ids": ids, "token_type_ids": types}, {"input_ids": ids}]
    with torch.no_grad():
        for batch in batches:
            on = {k: v.to(device) for k, v in batch.items()}
            same(engine(**on), model(**on))


def test_outputs_are_the_callers_own(pair, device):
    _, engine = pair(base=True)
    ids = torch.arange(4, 20, device=device)[None]
    first = engine(ids)
    kept = first.last_hidden_state.clone()
    engine(ids + 1)
    assert torch.equal(first.last_hidden_state, kept)
    first.last_hidden_state.zero_()
    assert torch.equal(engine(ids).last_hidden_state, kept)


def test_first_called_in_inference_mode(pair, device):
    _, engine = pair(base=True)
    ids = torch.arange(4, 20, device=device)[None]
    with torch.inference_mode():
        want = engine(ids.clone()).last_hidden_state.clone()
    assert torch.equal(engine(ids).last_hidden_state, want)


def test_several_sub_networks_in_one_call(pair, make_batch, device):
    model, engine = pair()
    on = {k: v.to(device) for k, v in make_batch().items()}
    subnets = [Subnet.parse(model.config, SUBNETS[i]) for i in (0, 1, 2, 1)]
    with torch.no_grad():
        same(engine(**on, subnet=subnets), model(**on, subnet=subnets))
        # As many times the same is one sub-network, and a graph.
        same(engine(**on, subnet=subnets[1:2] * 4), model(**on, subnet=subnets[1]))
    assert [subnet for _, subnet in engine.graphs] == [subnets[1]]


def test_hidden_states(pair, make_batch, device):
    model, engine = pair(base=True)
    on = {k: v.to(device) for k, v in make_batch().items()}
    with torch.no_grad():
        got = engine(**on, output_hidden_states=True).hidden_states
        want = model(**on, output_hidden_states=True).hidden_states
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("base", [True, False])
def test_numpy_and_lists(pair, make_batch, base):
    _, engine = pair(base=base)
    batch = make_batch()
    lengths = batch["attention_mask"].sum(1)
    with torch.no_grad():
        want = engine(batch["input_ids"], batch["attention_mask"])
    for ids, count in (
        (batch["input_ids"].numpy(), lengths.numpy()),
        (batch["input_ids"].tolist(), lengths.tolist()),
        (batch["input_ids"].numpy().astype(np.int32), lengths),
    ):
        got = engine(ids, lengths=count)
        assert isinstance(got, EngineOutput)
        name = "last_hidden_state" if base else "logits"
        assert getattr(got, name).dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(getattr(got, name)), want[name].cpu())


def test_empty_batch(pair):
    model, engine = pair(base=True)
    output = engine(torch.zeros(0, 5, dtype=torch.int64))
    assert output.last_hidden_state.shape == (0, 5, model.config.hidden_size)
    assert not engine.graphs


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 100, 127, 128, 129, 145, 1000, 4097, 16384])
def test_token_buckets(tokens):
    bucket = token_bucket(tokens)
    assert bucket >= tokens
    assert bucket % 16 == 0
    assert token_bucket(bucket) == bucket  # it holds itself
    if tokens > 128:
        assert bucket <= tokens * 1.125 + 1


def test_buckets_grow_with_the_batch():
    assert Bucket.of(33, 3, 11) == Bucket(48, 4, 16)
    assert Bucket.of(1, 1, 1) == Bucket(16, 1, 16)
    assert Bucket.of(512 * 8, 8, 512) == Bucket(4096, 8, 512)


def test_graphs_are_captured_once_and_the_oldest_goes_first(make_model, device):
    model = make_model(base=True).to(device).eval()
    engine = GpuEngine(model, "fp32", most_graphs=2)
    small, full = Subnet.parse(model.config, "w0.50-d0.50"), Subnet.full(model.config)
    ids = torch.arange(4, 20, device=device)[None]
    for subnet in (small, full, small):
        engine(ids, subnet=subnet)
    assert [s for _, s in engine.graphs] == [full, small]
    engine(ids[:, :7], subnet=small)  # the same bucket
    assert len(engine.graphs) == 2
    engine(ids.repeat(2, 1), subnet=small)
    assert [(b.sequences, s) for b, s in engine.graphs] == [(1, small), (2, small)]
    engine.clear()
    assert not engine.graphs
    with torch.no_grad():
        same(engine(ids), model(ids))


def test_weights_are_a_copy(pair, device):
    model, engine = pair(base=True)
    ids = torch.arange(4, 20, device=device)[None]
    want = engine(ids).last_hidden_state
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(engine(ids).last_hidden_state, want)


def test_threads(pair, device):
    model, engine = pair(base=True)
    calls = [
        (torch.randint(4, 30, (b, s), device=device), Subnet.parse(model.config, name))
        for b, s, name in ((1, 9, SUBNETS[0]), (2, 16, SUBNETS[1]), (4, 7, SUBNETS[2]))
    ]
    want = [engine(ids, subnet=s).last_hidden_state for ids, s in calls]
    wrong = []

    def work(number: int) -> None:
        for i in range(30):
            ids, subnet = calls[(number + i) % 3]
            got = engine(ids, subnet=subnet).last_hidden_state
            if not torch.equal(got, want[(number + i) % 3]):
                wrong.append((number, i))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_to_forget_the_graphs_waits_for_the_call(make_model):
    """A call that captures would keep a graph of buffers that are gone."""
    engine = GpuEngine(make_model(base=True).eval(), "fp32")
    engine([[5, 6, 7]])
    with engine._turn:  # a call is on its way
        thread = threading.Thread(target=engine.clear)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert engine.graphs
    thread.join()
    assert not engine.graphs


@pytest.mark.gpu
def test_a_callers_pinned_ids_are_read_before_the_call_returns(make_model):
    engine = GpuEngine(make_model(base=True).cuda().eval(), "fp32")
    batches = torch.randint(4, 30, (50, 8, 16))
    want = [engine(ids).last_hidden_state for ids in batches]
    buffer = torch.empty(8, 16, dtype=torch.int64).pin_memory()
    busy = torch.randn(4096, 4096, device="cuda")
    got = []
    for ids in batches:
        buffer.copy_(ids)
        busy @ busy  # what a copy that is not waited for lies behind
        got.append(engine(buffer).last_hidden_state)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [[1.5]]}, "input_ids must be integers, got"),
        ({"input_ids": [[1], [1, 2]]}, "input_ids must be a rectangular array of integers"),
        ({"input_ids": [1, 2]}, r"input_ids must be \[batch, length\]"),
        ({"input_ids": [[1] * 65]}, "1 to"),
        ({"input_ids": [[10**6]]}, "token ids must be in 0 to"),
        ({"lengths": [1]}, r"lengths must be \[2\], got \[1\]"),
        ({"lengths": [1, 4]}, "lengths must be in 1 to 3, got 1 to 4"),
        ({"lengths": [1, 2], "attention_mask": [[1, 1, 1]] * 2}, "not both"),
        ({"attention_mask": [[1, 1]]}, r"attention_mask must be \[2, 3\], got \[1, 2\]"),
        ({"attention_mask": [[1, 1, 1], [0, 0, 0]]}, "no token in row 1"),
        ({"subnet": "w1.00-d1.00"}, "subnet must be a Subnet, got str"),
        ({"subnet": []}, "one for each of 2 sequences, got 0"),
    ],
)
def test_bad_calls(pair, arguments, message):
    _, engine = pair(base=True)
    with pytest.raises(InputError, match=message):
        engine(**{"input_ids": [[5, 6, 7], [8, 9, 10]], **arguments})


def test_bad_dtype(make_model):
    with pytest.raises(
        InputError, match="dtype must be one of bf16, fp16, fp32 on a GPU, got 'int8'"
    ):
        GpuEngine(make_model(), "int8")


# ---- where there is a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_pack_on_a_gpu(make_model, make_batch, dtype):
    model = make_model().cuda().eval()
    engine = model.pack(dtype)
    assert isinstance(engine, GpuEngine)
    on = {k: v.cuda() for k, v in make_batch().items()}
    with torch.no_grad():
        got, want = engine(**on).logits.float(), model(**on).logits
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
    with pytest.raises(InputError, match="threads and isa are a CPU engine's"):
        model.pack(threads=2)


@pytest.mark.gpu
def test_two_streams(make_model):
    model = make_model(base=True).cuda().eval()
    engine = model.pack("fp32")
    ids = torch.randint(4, 30, (4, 16), device="cuda")
    want = [engine(ids + i).last_hidden_state for i in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(50):
        got = []
        for i, stream in enumerate(streams):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                got.append(engine(ids + i).last_hidden_state)
        torch.cuda.synchronize()
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.gpu
def test_out_of_memory(make_model, monkeypatch):
    """A capture that fails for want of memory costs the graphs, not the answer."""
    model = make_model(base=True).cuda().eval()
    engine = model.pack("fp32")
    ids = torch.randint(4, 30, (4, 16), device="cuda")
    want = engine(ids).last_hidden_state
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(int(free * 0.98), dtype=torch.uint8, device="cuda")
    try:
        wide = torch.randint(4, 30, (256, 16), device="cuda")
        engine(wide)
    except torch.OutOfMemoryError:
        pass  # not even kernel by kernel
    finally:
        del hog
        torch.cuda.empty_cache()
    torch.testing.assert_close(engine(ids).last_hidden_state, want)


@pytest.mark.gpu
def test_memory_of_all_sub_networks(make_model):
    """Twelve sub-networks at several sizes: one copy of the weights, one pool for the graphs."""
    fields = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    fields["max_position_embeddings"] = 128
    model = make_model(base=True, vocab_size=30522, num_hidden_layers=12, **fields).cuda().eval()
    engine = model.pack("bf16")
    del model
    torch.cuda.empty_cache()
    ids = torch.randint(4, 30000, (1, 128), device="cuda")
    engine(ids)
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    for width in (1.0, 0.75, 0.5, 0.25):
        for depth in (1.0, 0.75, 0.5):
            engine(ids, subnet=Subnet.from_multipliers(engine.config, width, depth))
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() - before < 0.05 * engine.nbytes
