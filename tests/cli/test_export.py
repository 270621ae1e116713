from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers import BertForSequenceClassification as PlainBert

from dynabert_fast.models import DynaBertForSequenceClassification
from dynabert_fast.subnet import Subnet

FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def logits(model, ids, **arguments):
    with torch.inference_mode():
        return model.eval()(input_ids=ids, **arguments).logits


@pytest.fixture(scope="module")
def ids():
    return torch.randint(5, 50, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["w1.00-d1.00", "w0.50-d0.75", "l0+2-h4+1-n40+3", "l3-h2-n13"])
def test_export_is_the_slice(cli, checkpoints, tmp_path, ids, name):
    output = tmp_path / "deep" / "out"
    result = cli("export", checkpoints["classifier"], "--subnet", name, "--output", output)
    assert result.code == 0, result.err
    assert result.err == ""
    assert {path.name for path in output.iterdir()} == FILES
    whole = DynaBertForSequenceClassification.from_pretrained(checkpoints["classifier"])
    subnet = Subnet.parse(whole.config, name)
    part = AutoModelForSequenceClassification.from_pretrained(output)
    assert isinstance(part, DynaBertForSequenceClassification)
    assert torch.equal(logits(part, ids), logits(whole, ids, subnet=subnet))
    assert part.config.id2label == {0: "good", 1: "bad"}
    millions = sum(p.numel() for p in part.parameters()) / 1e6
    assert result.out == (
        f"saved: {output} ({subnet}, {millions:.3g} M parameters, equal bit for bit)\n"
    )
    text = "a great film"
    one, other = map(AutoTokenizer.from_pretrained, (output, checkpoints["classifier"]))
    assert one(text) == other(text)


def test_a_shallower_model_of_full_width_is_a_plain_bert(cli, checkpoints, tmp_path, ids):
    output = tmp_path / "out"
    words = ("export", checkpoints["classifier"], "--subnet", "w1.00-d0.50", "--output", output)
    assert cli(*words).code == 0
    plain = PlainBert.from_pretrained(output)
    assert plain.config.num_hidden_layers == 2
    part = DynaBertForSequenceClassification.from_pretrained(output)
    torch.testing.assert_close(logits(plain, ids), logits(part, ids))


def test_an_export_can_be_evaluated_and_exported(cli, checkpoints, sources, latency, tmp_path, ids):
    once, twice = tmp_path / "once", tmp_path / "twice"
    source = checkpoints["classifier"]
    assert cli("export", source, "--subnet", "w0.50-d1.00", "--output", once).code == 0
    assert cli("export", once, "--subnet", "w0.50-d0.50", "--output", twice).code == 0
    whole = DynaBertForSequenceClassification.from_pretrained(source)
    part = DynaBertForSequenceClassification.from_pretrained(twice)
    subnet = Subnet.from_extents(whole.config, (0, 2), (1, 1), (10, 10))
    assert torch.equal(logits(part, ids), logits(whole, ids, subnet=subnet))
    options = (*sources["dev only"], *latency, "--widths", "1,0.5", "--depths", "1")
    assert cli("evaluate", once, *options).code == 0


def test_an_export_that_differs_is_not_saved(cli, checkpoints, tmp_path, monkeypatch):
    own = DynaBertForSequenceClassification.extract

    def extract(self, subnet):
        part = own(self, subnet)
        with torch.no_grad():
            part.classifier.bias[0] += 1
        return part

    monkeypatch.setattr(DynaBertForSequenceClassification, "extract", extract)
    words = ("export", checkpoints["classifier"], "--subnet", "w0.50-d0.50")
    result = cli(*words, "--output", tmp_path / "out")
    assert result.code != 0
    assert "differs from the slice by 1.0e+00; nothing was saved" in result.err
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite(refused, make_checkpoint, tmp_path):
    folder = make_checkpoint(tmp_path / "checkpoint", ("good", "bad"))
    model = DynaBertForSequenceClassification.from_pretrained(folder)
    model.dynabert.encoder.layer[1].attention.qkv.weight.data[0, 1, 0, 0] = float("nan")
    model.save_pretrained(folder)
    words = ("export", folder, "--subnet", "w1.00-d1.00", "--output", tmp_path / "out")
    name = "bert.encoder.layer.1.attention.self.key.weight"
    assert f"weights must be finite, and {name} has NaN" in refused(*words)
    assert list(tmp_path.iterdir()) == [folder]


def test_full_disk(cli, checkpoints, tmp_path, file_size_limit):
    words = ("export", checkpoints["classifier"], "--subnet", "w1.00-d1.00")
    with file_size_limit(20_000):
        result = cli(*words, "--output", tmp_path / "out")
    assert result.code == 1
    assert result.err.startswith(f"dynabert-fast: error: could not save {tmp_path / 'out'} (")
    assert result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_configuration_of_an_export(cli, checkpoints, tmp_path):
    output = tmp_path / "out"
    words = ("export", checkpoints["classifier"], "--subnet", "l0+2-h4+1-n40+3")
    assert cli(*words, "--output", output).code == 0
    config = json.loads((output / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert config["heads_per_layer"] == [4, 1]
    assert config["neurons_per_layer"] == [40, 3]
