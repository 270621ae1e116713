"""A sub-network as a model of its own: the same bits, in a checkpoint that holds nothing else."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from dynabert_fast.errors import InputError
from dynabert_fast.models import DynaBertForSequenceClassification
from dynabert_fast.models.conversion import to_huggingface
from dynabert_fast.subnet import Subnet, grid

LABELS = {0: "no", 1: "yes", 2: "perhaps"}


@pytest.mark.parametrize("base", [True, False], ids=["encoder", "classifier"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_extracted_saved_and_loaded_agrees_bit_for_bit(
    make_model, make_batch, tmp_path, subnet_of, family, base
):
    model, batch = make_model(family, base=base), make_batch(family)
    subnet = subnet_of(model.config)
    part = model.extract(subnet)
    part.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.layer_heads == list(subnet.heads)
    assert loaded.config.layer_neurons == list(subnet.neurons)
    assert loaded.config.head_size == model.config.head_size
    with torch.no_grad():
        want = model(**batch, subnet=subnet, output_hidden_states=True)
        for stand_alone in (part, loaded):
            got = stand_alone(**batch, output_hidden_states=True)
            assert torch.equal(got[0], want[0])
            for g, w in zip(got.hidden_states, want.hidden_states, strict=True):
                assert torch.equal(g, w)


def test_one_token_agrees_bit_for_bit(make_model, tmp_path, subnet_of):
    """Products with a vector: there a BLAS rounds differently for a weight at an odd address."""
    model, ids = make_model(), torch.tensor([[7]])
    subnet = subnet_of(model.config)
    model.extract(subnet).save_pretrained(tmp_path)
    loaded = DynaBertForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids, subnet=subnet).logits)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_weights_are_the_slices(make_model, subnet_of, family):
    model = make_model(family)
    subnet, d = subnet_of(model.config), model.config.head_size
    part = model.extract(subnet)
    whole = to_huggingface(model.state_dict(), model.config)
    prefix = f"{family}.encoder.layer."
    want = {name: t for name, t in whole.items() if not name.startswith(prefix)}
    for new, (old, heads, neurons) in enumerate(
        zip(subnet.layers, subnet.heads, subnet.neurons, strict=True)
    ):
        cut = {
            "attention.self": (slice(heads * d),),
            "attention.output.dense.weight": (slice(None), slice(heads * d)),
            "intermediate": (slice(neurons),),
            "output.dense.weight": (slice(None), slice(neurons)),
        }
        at = f"{prefix}{old}."
        for name, tensor in whole.items():
            if name.startswith(at):
                index = next((i for k, i in cut.items() if name[len(at) :].startswith(k)), ())
                want[f"{prefix}{new}.{name[len(at) :]}"] = tensor[index]
    got = to_huggingface(part.state_dict(), part.config)
    assert got.keys() == want.keys()
    for name in got:
        assert torch.equal(got[name], want[name]), name


def test_shares_no_memory_and_holds_no_more_than_it_uses(make_model, tmp_path):
    model = make_model()
    part = model.extract(Subnet.from_multipliers(model.config, 0.25, 0.5))
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not pointers & {p.data_ptr() for p in part.parameters()}
    assert sum(p.numel() for p in part.parameters()) < sum(p.numel() for p in model.parameters())
    part.save_pretrained(tmp_path)
    stored = sum(t.numel() for t in load_file(tmp_path / "model.safetensors").values())
    assert stored == sum(p.numel() for p in part.parameters())


def test_keeps_type_mode_and_labels(make_model):
    model = make_model(dtype=torch.bfloat16, id2label=LABELS)
    subnet = Subnet.from_multipliers(model.config, 0.5)
    for training in (False, True):
        part = model.train(training).extract(subnet)
        assert part.dtype == torch.bfloat16
        assert {m.training for m in part.modules()} == {training}
    assert part.config.id2label == LABELS
    assert model.config.layer_heads == [4] * 4  # the original's configuration has not changed


@pytest.mark.parametrize(
    ("family", "kind"),
    [("bert", transformers.BertModel), ("roberta", transformers.RobertaModel)],
)
def test_fewer_layers_at_full_width_open_in_transformers(
    make_model, make_batch, tmp_path, family, kind
):
    model, batch = make_model(family, dtype=torch.float64), make_batch(family)
    subnet = Subnet.from_multipliers(model.config, depth=0.5)
    model.extract(subnet).save_pretrained(tmp_path)
    plain = kind.from_pretrained(tmp_path).eval()
    assert plain.config.num_hidden_layers == 2
    with torch.no_grad():
        got = plain(**batch).last_hidden_state
        want = model(**batch, subnet=subnet, output_hidden_states=True).hidden_states[-1]
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-10, atol=1e-10)


def test_an_extracted_model_is_elastic_itself(make_model, make_batch):
    model, batch = make_model(), make_batch()
    part = model.extract(Subnet.from_extents(model.config, (0, 2, 3), (4, 2, 3), (40, 20, 30)))
    inner = Subnet.from_multipliers(part.config, 0.5)
    assert (inner.heads, inner.neurons) == ((2, 1, 2), (20, 10, 20))
    same = Subnet.from_extents(model.config, (0, 2, 3), inner.heads, inner.neurons)
    with torch.no_grad():
        want = model(**batch, subnet=same).logits
        assert torch.equal(part(**batch, subnet=inner).logits, want)
        assert torch.equal(part.extract(inner)(**batch).logits, want)


def test_a_subnet_computes_no_more_than_the_stand_alone_model(make_model, make_batch, subnet_of):
    model, batch = make_model(), make_batch(labels=True)
    subnet = subnet_of(model.config)
    part = model.extract(subnet)
    counts = []
    for run in (lambda: model(**batch, subnet=subnet), lambda: part(**batch)):
        with FlopCounterMode(display=False) as counter:
            run().loss.backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_the_whole_grid(make_model, make_batch):
    model, batch = make_model(), make_batch()
    for subnet in grid(model.config):
        with torch.no_grad():
            want = model(**batch, subnet=subnet).logits
            assert torch.equal(model.extract(subnet)(**batch).logits, want), subnet


def test_trains_like_the_slice(make_model, make_batch):
    model, batch = make_model(), make_batch(labels=True)
    subnet = Subnet.from_multipliers(model.config, 0.5)
    part = model.extract(subnet)
    part(**batch).loss.backward()
    model(**batch, subnet=subnet).loss.backward()
    for (name, small), (_, big) in zip(
        part.named_parameters(), model.named_parameters(), strict=True
    ):
        index = tuple(slice(n) for n in small.shape)
        torch.testing.assert_close(small.grad, big.grad[index], msg=name)


def test_a_subnet_of_another_model_is_refused(make_model):
    with pytest.raises(InputError, match="layers must be in 0 to 3, got 7"):
        make_model().extract(Subnet((7,), (1,), (1,)))


def test_loads_through_the_class_that_saved_it(make_model, tmp_path):
    model = make_model()
    model.extract(Subnet.from_multipliers(model.config, 0.25)).save_pretrained(tmp_path)
    _, info = DynaBertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
