from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from dynabert_fast.errors import InputError
from dynabert_fast.evaluation import count_flops, count_parameters
from dynabert_fast.models import DynaBertConfig, DynaBertForSequenceClassification
from dynabert_fast.subnet import Subnet, grid

SIZES = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 37,
    "num_labels": 3,
}
FAMILIES = {
    "bert": (BertForSequenceClassification, BertConfig, {"type_vocab_size": 2}),
    "roberta": (
        RobertaForSequenceClassification,
        RobertaConfig,
        {"type_vocab_size": 1, "pad_token_id": 1},
    ),
}


def tiny_config(backbone: str) -> DynaBertConfig:
    return DynaBertConfig(backbone=backbone, **SIZES, **FAMILIES[backbone][2])


PUBLISHED = [  # width, depth, parameters in millions, GFLOPs at length 128: BERT-base, 2 labels
    pytest.param(1.0, 1.0, "109.5", "22.3", id="w1.00-d1.00"),
    pytest.param(1.0, 0.5, "67.0", "11.2", id="w1.00-d0.50"),
    pytest.param(0.5, 1.0, "67.0", "11.2", id="w0.50-d1.00"),
    pytest.param(0.5, 0.5, "45.7", "5.6", id="w0.50-d0.50"),
    pytest.param(0.25, 0.5, "35.1", "2.8", id="w0.25-d0.50"),
]


@pytest.mark.parametrize(("width", "depth", "millions", "gflops"), PUBLISHED)
def test_published_figures_of_bert_base(
    width: float, depth: float, millions: str, gflops: str
) -> None:
    config = DynaBertConfig(num_labels=2)
    subnet = Subnet.from_multipliers(config, width, depth)
    assert f"{count_parameters(config, subnet) / 1e6:.1f}" == millions
    assert f"{count_flops(config, subnet, 128) / 1e9:.1f}" == gflops


def test_exact_numbers_of_bert_base() -> None:
    config = DynaBertConfig(num_labels=2)
    assert count_parameters(config, Subnet.full(config)) == 109_483_778
    assert count_flops(config, Subnet.full(config), 128) == 22_348_434_432


@pytest.mark.parametrize("backbone", FAMILIES)
def test_whole_model_counts_like_transformers(backbone: str) -> None:
    config = tiny_config(backbone)
    model_class, config_class, extra = FAMILIES[backbone]
    plain = model_class(config_class(**SIZES, **extra, attn_implementation="eager")).eval()
    full = Subnet.full(config)
    assert count_parameters(config, full) == sum(p.numel() for p in plain.parameters())
    length = 11
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        plain(input_ids=torch.full((1, length), 5))
    assert count_flops(config, full, length) == counter.get_total_flops()


@pytest.mark.parametrize("backbone", FAMILIES)
def test_parameters_are_those_of_the_sliced_model(backbone: str) -> None:
    config = tiny_config(backbone)
    model = DynaBertForSequenceClassification(config)
    uneven = Subnet.from_extents(config, layers=(0, 3), heads=(1, 4), neurons=(40, 7))
    for subnet in (*grid(config), uneven):
        sliced = sum(p.numel() for p in model.extract(subnet).parameters())
        assert count_parameters(config, subnet) == sliced, subnet


def test_an_extracted_model_counts_as_its_subnet() -> None:
    config = tiny_config("bert")
    subnet = Subnet.from_extents(config, layers=(0, 3), heads=(1, 4), neurons=(40, 7))
    own = DynaBertForSequenceClassification(config).extract(subnet).config
    assert count_parameters(own, Subnet.full(own)) == count_parameters(config, subnet)
    assert count_flops(own, Subnet.full(own), 9) == count_flops(config, subnet, 9)


def test_bad_input() -> None:
    config = tiny_config("bert")
    with pytest.raises(InputError, match="length must be at least 1 token, got 0"):
        count_flops(config, Subnet.full(config), 0)
    too_wide = Subnet((0,), (5,), (40,))
    for count in (
        lambda: count_flops(config, too_wide, 8),
        lambda: count_parameters(config, too_wide),
    ):
        with pytest.raises(InputError, match="heads of layer 0 must be in 1 to 4, got 5"):
            count()
