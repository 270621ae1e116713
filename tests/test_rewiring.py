"""Importance by definition, and an order of weights that changes no function."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from dynabert_fast import ops
from dynabert_fast.errors import InputError
from dynabert_fast.models import DynaBertForSequenceClassification, DynaBertModel
from dynabert_fast.models.conversion import to_huggingface
from dynabert_fast.rewiring import (
    FILE_NAME,
    Rewiring,
    _add_importance,
    _watched,
    measure_importance,
    rewire,
)
from dynabert_fast.subnet import Subnet

COUNTS = HEADS, NEURONS = 4, 40
LAYERS = 4


def measure(model, batches, accumulation="per_batch"):
    return measure_importance(model, batches, accumulation, progress=False)


def same(a, b):
    for name in ("head_importance", "neuron_importance", "head_order", "neuron_order"):
        for x, y in zip(getattr(a, name), getattr(b, name), strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)
    assert (a.accumulation, a.batches) == (b.accumulation, b.batches)


@pytest.fixture
def batches(make_batch):
    def batch(seed):
        labels = torch.tensor([[2, 0, 1, 1], [0, 0, 2, 1], [1, 2, 2, 0]])[seed]
        return make_batch(padding=("right", "left", "holes")[seed], seed=seed) | {"labels": labels}

    return [batch(seed) for seed in range(3)]


def by_definition(dense_forward, model, batches, accumulation):
    """`|dL/dm_h|` with masks that are really there, and the neurons' formula on their weights."""
    config, full = model.config, Subnet.full(model.config)
    heads = [torch.zeros(HEADS, dtype=torch.float64) for _ in range(LAYERS)]
    neurons = [torch.zeros(NEURONS, dtype=torch.float64) for _ in range(LAYERS)]
    running = None
    for batch in batches:
        state = {
            name: tensor.detach().clone().requires_grad_()
            for name, tensor in to_huggingface(model.state_dict(), config).items()
        }
        masks = [torch.ones(HEADS, dtype=torch.float64, requires_grad=True) for _ in range(LAYERS)]
        logits, _ = dense_forward(state, config, full, batch, masks)
        F.cross_entropy(logits, batch["labels"]).backward()
        found = [mask.grad for mask in masks] + [
            state[f"bert.encoder.layer.{layer}.{name}"].grad
            for layer in range(LAYERS)
            for name in (
                "intermediate.dense.weight",
                "intermediate.dense.bias",
                "output.dense.weight",
            )
        ]
        if running is not None and accumulation == "running":
            found = [a + b for a, b in zip(running, found, strict=True)]
        running = found
        for layer in range(LAYERS):
            heads[layer] += found[layer].abs()
            grad_w1, grad_b1, grad_w2 = found[LAYERS + 3 * layer :][:3]
            at = f"bert.encoder.layer.{layer}."
            w1, b1 = (state[f"{at}intermediate.dense.{k}"] for k in ("weight", "bias"))
            w2 = state[f"{at}output.dense.weight"]
            for j in range(NEURONS):
                into = (w1[j] * grad_w1[j]).sum() + b1[j] * grad_b1[j]
                neurons[layer][j] += into.abs().detach()
                neurons[layer][j] += (w2[:, j] * grad_w2[:, j]).sum().abs().detach()
    return heads, neurons


@pytest.mark.parametrize("accumulation", ["per_batch", "running"])
def test_importance_is_the_definition(make_model, dense_forward, batches, accumulation):
    model = make_model(dtype=torch.float64)
    got = measure(model, batches, accumulation)
    heads, neurons = by_definition(dense_forward, model, batches, accumulation)
    for g, w in zip(got.head_importance, heads, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-7)
    for g, w in zip(got.neuron_importance, neurons, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-7)
    assert (got.accumulation, got.batches) == (accumulation, 3)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_magnitudes_are_added_as_in_float64(make_model, device, dtype):
    """On a GPU by a kernel of ours; allowed is twice the error of plain torch there."""
    layers = make_model(dtype=dtype).to(device).dynabert.encoder.layer
    generator = torch.Generator().manual_seed(0)
    gradients = [
        torch.randn(p.shape, generator=generator).to(p) for layer in layers for p in _watched(layer)
    ]
    truth = []
    for i, layer in enumerate(layers):
        out, up, up_bias, down = (
            p.detach().double() * g.double()
            for p, g in zip(_watched(layer), gradients[4 * i :][:4], strict=True)
        )
        truth.append(out.view(HEADS, -1).sum(1).abs())
        truth.append((up.sum(1) + up_bias).abs() + down.sum(1).abs())

    def error():
        heads, neurons = ([torch.full((n,), 0.5, device=device) for _ in layers] for n in COUNTS)
        _add_importance(layers, gradients, heads, neurons)
        got = [sums for pair in zip(heads, neurons, strict=True) for sums in pair]
        assert all(g.dtype == torch.float32 for g in got)
        errors = [(g - 0.5 - t).abs().max() for g, t in zip(got, truth, strict=True)]
        return torch.stack(errors).max()

    with ops.use_backend("reference"):
        allowed = error()
    assert error() <= 2 * allowed + 1e-5


def test_the_two_accumulations_differ_from_the_second_batch_on(make_model, batches):
    model = make_model()
    one = [measure(model, batches[:1], a).head_importance[0] for a in ("per_batch", "running")]
    assert torch.equal(*one)
    both = [measure(model, batches[:2], a).head_importance[0] for a in ("per_batch", "running")]
    assert not torch.allclose(*both)


def test_per_batch_adds_up(make_model, batches):
    model = make_model(dtype=torch.float64)
    total = measure(model, batches)
    for layer in range(LAYERS):
        parts = sum(measure(model, [b]).neuron_importance[layer] for b in batches)
        torch.testing.assert_close(total.neuron_importance[layer], parts)


def test_order_is_descending_and_ties_keep_their_place(make_model, batches):
    model = make_model()
    with torch.no_grad():  # two heads and all neurons of a layer that do nothing: importance zero
        attention, ffn = (
            model.dynabert.encoder.layer[1].attention,
            model.dynabert.encoder.layer[1].ffn,
        )
        attention.out.weight_t.view(HEADS, 6, -1)[[0, 2]] = 0
        ffn.down.weight_t.zero_()
    got = measure(model, batches)
    for orders, importances in (
        (got.head_order, got.head_importance),
        (got.neuron_order, got.neuron_importance),
    ):
        for order, importance in zip(orders, importances, strict=True):
            assert sorted(order.tolist()) == list(range(len(order)))
            assert (importance[order].diff() <= 0).all()
    assert got.head_order[1][2:].tolist() == [0, 2]
    assert got.neuron_order[1].tolist() == list(range(NEURONS))


def test_dropout_is_off_while_measuring(make_model, batches):
    model = make_model(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    quiet = measure(model, batches)
    noisy = measure(model.train(), batches)
    assert model.training
    for a, b in zip(quiet.neuron_importance, noisy.neuron_importance, strict=True):
        assert torch.equal(a, b)


def test_measuring_leaves_the_model_as_it_was(make_model, batches):
    model = make_model()
    model.classifier.requires_grad_(False)
    model.dynabert.encoder.layer[0].ffn.up.weight.requires_grad_(False)
    model(**batches[0]).loss.backward()
    model.train()
    model.dynabert.pooler.eval()

    def state():
        return {
            name: (p.requires_grad, None if p.grad is None else p.grad.clone(), p.detach().clone())
            for name, p in model.named_parameters()
        }

    before = state()
    measure(model, batches)
    assert model.training
    assert not model.dynabert.pooler.training
    for name, (requires_grad, grad, value) in state().items():
        assert requires_grad == before[name][0], name
        assert torch.equal(value, before[name][2]), name
        if grad is None:
            assert before[name][1] is None, name
        else:
            assert torch.equal(grad, before[name][1]), name


def test_a_view_is_measured_whole(make_model, batches):
    """Heads that it does not use would get no gradient, and count as worthless."""
    model = make_model()
    view = model.at(Subnet.from_multipliers(model.config, 0.5, 0.5))
    whole, part = measure(model, batches), measure(view, batches)
    same(part, whole)


def test_measuring_restores_the_model_when_it_fails(make_model, batches):
    model = make_model().train()
    batches[1]["input_ids"] = batches[1]["input_ids"] + 1000
    with pytest.raises(InputError, match="token ids"):
        measure(model, batches)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_measuring_works_where_gradients_are_off(make_model, batches):
    model = make_model()
    want = measure(model, batches)
    with torch.no_grad():
        same(measure(model, batches), want)


# --- rewiring -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str
)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_function_does_not_change(make_model, make_batch, batches, family, dtype, tolerance):
    model, batch = make_model(family, dtype=dtype), make_batch(family)
    with torch.no_grad():
        want = model(**batch, output_hidden_states=True)
        before = {name: p.clone() for name, p in model.named_parameters()}
        rewire(model, measure(model, batches))
        got = model(**batch, output_hidden_states=True)
    scale = want.logits.abs().max()
    assert (got.logits - want.logits).abs().max() <= tolerance * scale
    for g, w in zip(got.hidden_states, want.hidden_states, strict=True):
        assert (g - w).abs().max() <= tolerance * w.abs().max()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    kinds = ("qkv.weight", "qkv.bias", "out.weight_t", "up.weight", "up.bias", "down.weight_t")
    assert {n.split(".", 4)[4] for n in moved} <= {
        f"{'attention' if k[0] in 'qo' else 'ffn'}.{k}" for k in kinds
    }
    assert len(moved) >= LAYERS * 3


def test_importance_descends_in_the_new_order(make_model, batches):
    model = make_model(dtype=torch.float64)
    rewire(model, measure(model, batches))
    again = measure(model, batches)
    for importance in (*again.head_importance, *again.neuron_importance):
        assert (importance.diff() <= 1e-6 * importance.max()).all()


def test_every_head_and_neuron_moves_as_one(make_model, batches):
    """The weights of place i are those of the unit that the order names, in every parameter."""
    model = make_model()
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    importance = measure(model, batches)
    rewire(model, importance)
    new = dict(model.named_parameters())
    for layer in range(LAYERS):
        at = f"dynabert.encoder.layer.{layer}."
        for place, head in enumerate(importance.head_order[layer].tolist()):
            for name in ("attention.qkv.weight", "attention.qkv.bias"):
                assert torch.equal(new[at + name][place], old[at + name][head])
            out = at + "attention.out.weight_t"
            assert torch.equal(
                new[out].view(HEADS, 6, -1)[place], old[out].view(HEADS, 6, -1)[head]
            )
        order = importance.neuron_order[layer]
        for name in ("ffn.up.weight", "ffn.up.bias", "ffn.down.weight_t"):
            assert torch.equal(new[at + name], old[at + name][order])


def test_a_narrow_subnet_now_holds_the_most_important(make_model, make_batch, batches):
    """Put what matters last: a slice loses it before rewiring, and keeps it after."""
    model = make_model(dtype=torch.float64)
    with torch.no_grad():
        for layer in model.dynabert.encoder.layer:
            layer.attention.out.weight_t[: 3 * 6] *= 1e-6
            layer.ffn.down.weight_t[:30] *= 1e-6
    batch, narrow = make_batch(), Subnet.from_multipliers(model.config, 0.25)
    with torch.no_grad():
        want = model(**batch).logits
        lost = (model(**batch, subnet=narrow).logits - want).abs().max()
        rewire(model, measure(model, batches))
        kept = (model(**batch, subnet=narrow).logits - want).abs().max()
    assert lost > 0.1
    assert kept < 1e-3


def test_training_goes_on_after_rewiring(make_model, batches):
    """In place: an optimiser or a view that holds the parameters still holds the right ones."""
    model = make_model()
    view = model.at(Subnet.full(model.config))
    ids = [id(p) for p in model.parameters()]
    rewire(model, measure(model, batches))
    assert [id(p) for p in model.parameters()] == ids
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    assert torch.equal(view(**batches[0]).logits, model(**batches[0]).logits)


# --- with the checkpoint --------------------------------------------------------------------------


def test_saved_and_loaded_with_the_checkpoint(make_model, batches, tmp_path):
    model = make_model()
    assert model.rewiring is None
    importance = measure(model, batches, "running")
    assert model.rewiring is None
    rewire(model, importance)
    same(model.rewiring, importance)
    model.save_pretrained(tmp_path)
    for kind in (DynaBertForSequenceClassification, DynaBertModel):
        same(kind.from_pretrained(tmp_path).rewiring, importance)
    same(Rewiring.load(str(tmp_path)), importance)
    again = tmp_path / "again"
    DynaBertForSequenceClassification.from_pretrained(tmp_path).save_pretrained(again)
    same(Rewiring.load(str(again)), importance)


def test_a_checkpoint_that_was_never_rewired_has_none(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    assert Rewiring.load(str(tmp_path)) is None
    assert DynaBertForSequenceClassification.from_pretrained(tmp_path).rewiring is None


def test_saving_over_a_rewired_checkpoint_leaves_no_stale_record(make_model, batches, tmp_path):
    model = make_model()
    rewire(model, measure(model, batches))
    model.save_pretrained(tmp_path)
    make_model(seed=1).save_pretrained(tmp_path)
    assert DynaBertForSequenceClassification.from_pretrained(tmp_path).rewiring is None


def test_views_share_the_record(make_model, batches, tmp_path):
    model = make_model()
    view = model.at(Subnet.from_multipliers(model.config, 0.5))
    rewire(model, measure(model, batches))
    assert view.rewiring is model.rewiring is not None
    view.save_pretrained(tmp_path)
    assert (tmp_path / FILE_NAME).is_file()
    assert make_model().rewiring is None


def test_the_record_is_there_before_anything_is_sent(make_model, batches, tmp_path, monkeypatch):
    model, seen = make_model(), []
    rewire(model, measure(model, batches))

    def save(self, folder, **kwargs):
        seen.extend(path.name for path in Path(folder).iterdir())

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    model.save_pretrained(tmp_path / "new")
    assert seen == [FILE_NAME]


def test_numbers_are_those_before_the_first_rewiring(make_model, batches):
    model = make_model(dtype=torch.float64)
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = measure(model, batches[:1])
    rewire(model, first)
    second = measure(model, batches[1:])
    rewire(model, second)
    final = model.rewiring
    assert final.batches == 2
    for layer in range(LAYERS):
        at = f"dynabert.encoder.layer.{layer}."
        weight = model.get_parameter(f"{at}attention.qkv.weight")
        assert torch.equal(weight, original[f"{at}attention.qkv.weight"][final.head_order[layer]])
        up = model.get_parameter(f"{at}ffn.up.weight")
        assert torch.equal(up, original[f"{at}ffn.up.weight"][final.neuron_order[layer]])
    # The importance, measured on the weights of the original order, is in that order.
    fresh = make_model(dtype=torch.float64)
    direct = measure(fresh, batches[1:])
    for name in ("head_importance", "neuron_importance"):
        for got, want in zip(getattr(final, name), getattr(direct, name), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    for importance, order in (
        *zip(final.head_importance, final.head_order, strict=True),
        *zip(final.neuron_importance, final.neuron_order, strict=True),
    ):
        assert (importance[order].diff() <= 1e-6 * importance.max()).all()


def test_layers_of_unlike_width(make_model, make_batch, batches):
    model = make_model(
        dtype=torch.float64, heads_per_layer=[4, 1, 3, 2], neurons_per_layer=[40, 7, 1, 13]
    )
    batch = make_batch()
    with torch.no_grad():
        want = model(**batch).logits
        rewire(model, measure(model, batches))
        torch.testing.assert_close(model(**batch).logits, want, rtol=1e-12, atol=1e-12)
    assert [len(o) for o in model.rewiring.head_order] == [4, 1, 3, 2]


def test_description_names_every_layer_and_its_heads(make_model, batches):
    importance = measure(make_model(), batches)
    lines = importance.describe(widths=(0.5, 0.25)).splitlines()
    assert "3 batches (per_batch)" in lines[0]
    assert "w0.50" in lines[1]
    rows = lines[-LAYERS:]
    for layer, row in enumerate(rows):
        heads = importance.head_order[layer].tolist()
        assert row.split()[: HEADS + 1] == [str(layer), *map(str, heads)]
        share = importance.head_importance[layer].sort(descending=True).values
        assert f"{float(share[:2].sum() / share.sum()):.0%}" in row


def test_description_counts_as_sub_networks_do(make_model, batches):
    model = make_model()
    importance = measure(model, batches)
    kept = importance.describe(widths=(0.4,)).splitlines()[-1]
    subnet = Subnet.from_multipliers(model.config, 0.4)
    neurons = importance.neuron_importance[-1].sort(descending=True).values
    count = subnet.neurons[-1]
    assert count != round(0.4 * len(neurons)), "heads round, and neurons follow"
    assert f"{float(neurons[:count].sum() / neurons.sum()):4.0%} neurons" in kept


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accumulation": "sum"}, "accumulation must be per_batch or running, got 'sum'"),
        ({"batches": []}, "importance needs at least one labelled batch, got none"),
    ],
)
def test_bad_arguments(make_model, batches, change, message):
    with pytest.raises(InputError, match=message):
        measure(**{"model": make_model(), "batches": batches} | change)


def test_batches_without_labels(make_model, batches):
    del batches[1]["labels"]
    with pytest.raises(InputError, match="batch 1 has no labels"):
        measure(make_model(), batches)


def test_a_loss_that_is_not_finite(make_model, batches):
    model = make_model()
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    with pytest.raises(InputError, match="the loss of batch 0 is nan"):
        measure(model, batches)
    assert all(p.requires_grad for p in model.parameters())


def test_importance_of_another_model(make_model, batches):
    importance = measure(make_model(), batches)
    other = make_model(neurons_per_layer=[40, 40, 40, 39])
    with pytest.raises(InputError, match=r"importance is of layers .*\(4, 40\)\], the model has"):
        rewire(other, importance)


def test_importance_of_a_model_of_other_depth(make_model, batches):
    importance = measure(make_model(), batches)
    with pytest.raises(InputError, match="importance is of layers"):
        rewire(make_model(num_hidden_layers=3), importance)


def test_a_damaged_record(make_model, batches, tmp_path):
    model = make_model()
    rewire(model, measure(model, batches))
    model.save_pretrained(tmp_path)
    (tmp_path / FILE_NAME).write_bytes(b"not a record")
    with pytest.raises(InputError, match=r"rewiring\.safetensors cannot be read .*; rewire again"):
        DynaBertForSequenceClassification.from_pretrained(tmp_path)
