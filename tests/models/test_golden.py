"""Agreement with outputs recorded from the released model code, at all 12 sub-networks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dynabert_fast.models import DynaBertForSequenceClassification
from dynabert_fast.subnet import DEPTHS, WIDTHS, Subnet

FOLDER = os.environ.get("DYNABERT_FAST_GOLDEN")
pytestmark = pytest.mark.skipif(
    FOLDER is None, reason="DYNABERT_FAST_GOLDEN does not name a folder of recorded outputs"
)


@pytest.fixture(scope="module", params=["bert", "roberta"])
def recorded(request, tmp_path_factory):
    """The recorded tensors, and their weights loaded through a Hugging Face checkpoint."""
    family = request.param
    with safe_open(Path(FOLDER) / f"{family}_h64_l12_a4.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    folder = tmp_path_factory.mktemp(family)
    state = {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    labels = config.pop("num_labels")
    for name in ("output_hidden_states", "output_attentions"):
        config.pop(name, None)
    config |= {"model_type": family, "pad_token_id": 1 if family == "roberta" else 0}
    (folder / "config.json").write_text(json.dumps(config))
    model = DynaBertForSequenceClassification.from_pretrained(folder, num_labels=labels)
    return model.eval(), tensors


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("width", WIDTHS)
def test_agrees(recorded, width, depth):
    model, tensors = recorded
    cell = f"w{width:.2f}_d{depth:.2f}"
    names = ("input_ids", "attention_mask", "token_type_ids")
    batch = {name: tensors[name] for name in names}
    subnet = Subnet.from_multipliers(model.config, width, depth)
    with torch.no_grad():
        out = model(**batch, subnet=subnet, output_hidden_states=True)
    assert len(out.hidden_states) == tensors[f"{cell}.n_hidden"].item()
    torch.testing.assert_close(out.logits, tensors[f"{cell}.logits"], rtol=0, atol=1e-4)
    real = batch["attention_mask"].bool()
    want = tensors[f"{cell}.hidden_last"][real]
    torch.testing.assert_close(out.hidden_states[-1][real], want, rtol=0, atol=1e-4)
