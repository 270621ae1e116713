from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from dynabert_fast.models import (
    DynaBertConfig,
    DynaBertForSequenceClassification,
    DynaBertModel,
)
from dynabert_fast.subnet import Subnet


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_auto_classes_open_what_is_saved(make_model, make_batch, tmp_path, family):
    model, batch = make_model(family), make_batch(family)
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is DynaBertConfig
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(classifier) is DynaBertForSequenceClassification
    encoder = AutoModel.from_pretrained(tmp_path)
    assert type(encoder) is DynaBertModel
    subnet = Subnet.from_multipliers(classifier.config, 0.5, 0.5)
    with torch.no_grad():
        want = model(**batch, subnet=subnet, output_hidden_states=True)
        assert torch.equal(classifier(**batch, subnet=subnet).logits, want.logits)
        hidden = encoder(**batch, subnet=subnet).last_hidden_state
        assert torch.equal(hidden, want.hidden_states[-1])


def test_auto_classes_take_overrides(make_model, tmp_path):
    make_model(base=True).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, dtype=torch.bfloat16
    )
    assert model.classifier.weight.shape == (5, 24)
    assert model.dtype == torch.bfloat16


def test_auto_classes_build_from_a_configuration(sizes):
    config = DynaBertConfig(**sizes, num_labels=4)
    model = AutoModelForSequenceClassification.from_config(config)
    assert type(model) is DynaBertForSequenceClassification
    assert model.classifier.weight.shape == (4, 24)


def test_plain_checkpoints_stay_transformers_own(make_hf, tmp_path):
    hf = make_hf("bert")
    hf.save_pretrained(tmp_path)
    assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path)) is type(hf)


@pytest.mark.slow
def test_the_import_alone_registers(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    code = (
        "import sys, dynabert_fast.models\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        "print(type(Auto.from_pretrained(sys.argv[1])).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.stdout == "DynaBertForSequenceClassification\n", done.stderr
