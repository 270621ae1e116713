"""A batch whose sequences run different sub-networks: as if each were in a call of its own."""

from __future__ import annotations

import pytest
import torch

from dynabert_fast import ops
from dynabert_fast.errors import InputError
from dynabert_fast.models.packed import MixedBatch
from dynabert_fast.subnet import Subnet

# For 4 layers of 4 heads and 40 neurons.
RAGGED, LAST = "l0+2+3-h3+1+4-n7+40+1", "l3-h2-n13"
ORDERS = {
    "all": ["w1.00-d1.00", "w0.25-d1.00", RAGGED, "w0.50-d0.50", "w0.75-d0.75", LAST],
    "one": ["w0.50-d0.50"] * 4,
    "back and forth": ["w0.25-d1.00", "w1.00-d1.00", "w0.25-d1.00", LAST],
    "nobody keeps a layer": ["w0.50-d0.50", LAST, LAST],
    "one sequence": [RAGGED],
}


def take(batch, count):
    """As many sequences of a batch, over and over."""
    return {k: v[torch.arange(count) % len(v)] for k, v in batch.items()}


@pytest.fixture(params=ORDERS.values(), ids=ORDERS.keys())
def mixed(request, make_model, make_batch):
    """`mixed(**model)`: a model, a batch, and a sub-network for each of its sequences."""

    def make(padded=True, **fields):
        model = make_model(dtype=torch.float64, **fields).eval()
        subnets = [Subnet.parse(model.config, name) for name in request.param]
        batch = take(make_batch(model.config.backbone), len(subnets))
        if not padded:
            del batch["attention_mask"]
        return model, batch, subnets

    return make


def alone(model, batch, subnets, **arguments):
    """The sequences one by one."""
    return [
        model(**{k: v[i : i + 1] for k, v in batch.items()}, subnet=subnet, **arguments)
        for i, subnet in enumerate(subnets)
    ]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_each_sequence_is_computed_as_if_it_were_alone(mixed, family, padded):
    model, batch, subnets = mixed(family=family, base=True, padded=padded)
    with torch.no_grad():
        got = model(**batch, subnet=subnets)
        want = alone(model, batch, subnets)
    for i, output in enumerate(want):
        for name in ("last_hidden_state", "pooler_output"):
            torch.testing.assert_close(got[name][i], output[name][0], rtol=1e-10, atol=1e-10)


def test_float32_has_the_bits_of_a_call_alone(mixed):
    if "cpp" not in ops.backends():
        pytest.skip("plain torch makes no such promise")
    model, batch, subnets = mixed(base=True)
    model = model.float()
    with torch.no_grad():
        got = model(**batch, subnet=tuple(subnets)).last_hidden_state
        want = [o.last_hidden_state[0] for o in alone(model, batch, subnets)]
    assert torch.equal(got, torch.stack(want))


def test_gradients_are_the_sum_of_single_calls(mixed):
    model, batch, subnets = mixed()
    weights = torch.arange(1, len(subnets) + 1, dtype=torch.float64)
    (model(**batch, subnet=subnets).logits.sum(1) * weights).sum().backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    for weight, output in zip(weights, alone(model, batch, subnets), strict=True):
        (output.logits.sum() * weight).backward()
    for name, p in model.named_parameters():
        if p.grad is None:
            assert got[name] is None
        else:
            torch.testing.assert_close(got[name], p.grad, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("unpack", [True, False])
def test_hidden_states(make_model, make_batch, unpack):
    model = make_model(dtype=torch.float64, base=True).eval()
    config, batch = model.config, take(make_batch(), 3)
    subnets = [
        Subnet.from_extents(config, (0, 3), (1, 4), (40, 3)),
        Subnet.from_multipliers(config, 0.75, 0.5),
        Subnet.from_extents(config, (1, 2), (4, 4), (40, 40)),
    ]
    with torch.no_grad():
        got = model(**batch, subnet=subnets, output_hidden_states=True, unpack=unpack)
        want = alone(model, batch, subnets, output_hidden_states=True)
    assert len(got.hidden_states) == 3
    for state in range(3):
        if unpack:
            found = got.hidden_states[state]
        else:  # the widest first, then in the batch's order
            mask = batch["attention_mask"]
            mixed = MixedBatch.from_mask(tuple(mask.shape), mask, torch.device("cpu"), subnets)
            found = mixed.packed.unpack(got.hidden_states[state])
        for i, output in enumerate(want):
            torch.testing.assert_close(found[i], output.hidden_states[state][0])


def test_training_with_dropout_checkpointing_and_autocast(make_model, make_batch):
    model = make_model(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train()
    batch = make_batch(labels=True)
    subnets = [Subnet.parse(model.config, name) for name in ORDERS["all"][:4]]
    losses = []
    for checkpoint in (False, True):
        if checkpoint:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, subnet=subnets).loss
        loss.backward()
        losses.append((loss.item(), model.dynabert.encoder.layer[0].ffn.up.weight.grad.clone()))
        model.zero_grad()
    assert losses[0][0] == losses[1][0]
    torch.testing.assert_close(losses[0][1], losses[1][1])


def test_each_op_is_called_once_a_layer(make_model, make_batch, monkeypatch):
    """Twelve sub-networks cost as many calls as one: that is what lanes are for."""
    model = make_model(base=True).eval()
    subnets = [Subnet.from_multipliers(model.config, w, d) for w in (1, 0.5) for d in (1, 0.5)]
    calls = []
    expand = ops.expand
    monkeypatch.setattr(ops, "expand", lambda *a: calls.append(a[3]) or expand(*a))
    with torch.no_grad():
        model(**make_batch(), subnet=subnets)
    assert len(calls) == 2 * 4
    # Layers 0 and 2 are everybody's.
    assert [len(extents) for extents in calls] == [4, 4, 2, 2] * 2


def test_lanes_that_differ_in_depth_alone_are_one_block(make_model):
    config = make_model().config
    subnets = [Subnet.from_multipliers(config, 0.5, depth) for depth in (0.5, 1, 0.75)]
    mixed = MixedBatch.from_mask((3, 5), None, torch.device("cpu"), subnets)
    part = mixed.part(0)
    assert (part.heads, part.neurons, part.packed.rows, part.packed.sequences) == (
        [2],
        [20],
        [15],
        [3],
    )
    assert mixed.part(1).packed.rows == [10]


def test_empty_batch(make_model):
    model = make_model(base=True).eval()
    output = model(torch.zeros(0, 5, dtype=torch.int64), subnet=[])
    assert output.last_hidden_state.shape == (0, 5, model.config.hidden_size)


@pytest.mark.parametrize(
    ("count", "message"),
    [(3, "one for each of 2 sequences, got 3"), (1, "one for each of 2 sequences, got 1")],
)
def test_one_for_each_sequence(make_model, make_batch, count, message):
    model = make_model()
    with pytest.raises(InputError, match=message):
        model(**take(make_batch(), 2), subnet=[Subnet.full(model.config)] * count)


def test_hidden_states_need_one_depth(make_model, make_batch):
    model = make_model()
    subnets = [Subnet.from_multipliers(model.config, 1, d) for d in (1, 0.5)]
    with pytest.raises(InputError, match="one depth, got 2 and 4 layers"):
        model(**take(make_batch(), 2), subnet=subnets, output_hidden_states=True)
