"""Small random models, padded batches, and an independent computation of any sub-network."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

# Before any Hugging Face import: no test may depend on a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

# Tiny products gain nothing from threads, and wait for them where other work fills the cores.
torch.set_num_threads(1)

# Small and unround, so that a swapped dimension does not go unnoticed: d = 6, D != N.
SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 24,
    "type_vocab_size": 2,
}
FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert")
PAD = {family: 0 if family == "bert" else 1 for family in FAMILIES}
DROPOUT_OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Values large enough that every parameter matters: the usual 0.02 nearly hides attention."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.copy_(noise + 1 if _is_norm_scale(parameter, model) else noise)
    return model.eval()


def _is_norm_scale(parameter: Tensor, model: torch.nn.Module) -> bool:
    norms = (m for m in model.modules() if isinstance(m, torch.nn.LayerNorm))
    return any(parameter is norm.weight for norm in norms)


@pytest.fixture(scope="session")
def sizes() -> dict[str, int]:
    return dict(SIZES)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """`make_model(family="bert", base=False, dtype=float32, seed=0, **config)`: one of ours."""
    from dynabert_fast.models import (
        DynaBertConfig,
        DynaBertForSequenceClassification,
        DynaBertModel,
    )

    def make(family="bert", base=False, dtype=torch.float32, seed=0, **overrides):
        fields = {**SIZES, "num_labels": 3, "pad_token_id": PAD[family], **overrides}
        config = DynaBertConfig(backbone=family, **fields)
        kind = DynaBertModel if base else DynaBertForSequenceClassification
        return randomise(kind(config), seed).to(dtype)

    return make


@pytest.fixture(scope="session")
def make_hf() -> Callable[..., Any]:
    """`make_hf("roberta", "Model", **config)`: one of theirs, a classifier by default."""
    import transformers

    names = {
        "bert": "Bert",
        "roberta": "Roberta",
        "xlm-roberta": "XLMRoberta",
        "camembert": "Camembert",
    }

    def make(family, kind="ForSequenceClassification", dtype=torch.float32, seed=0, **overrides):
        config = getattr(transformers, f"{names[family]}Config")(
            **{**SIZES, "num_labels": 3, **overrides}
        )
        return randomise(getattr(transformers, names[family] + kind)(config), seed).to(dtype)

    return make


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., dict[str, Tensor]]:
    """`make_batch(family, padding)`: inputs of four sequences, one of a single token.

    Padding is "none", "right", "left" or "holes" (padding between real tokens).
    """

    def make(family="bert", padding="right", seed=0, labels=False):
        generator = torch.Generator().manual_seed(seed)
        length, lengths = 11, (11, 1, 7, 4)
        ids = torch.randint(4, SIZES["vocab_size"], (4, length), generator=generator)
        types = torch.randint(0, SIZES["type_vocab_size"], (4, length), generator=generator)
        column = torch.arange(length)
        real = torch.tensor(lengths)[:, None]
        mask = {
            "none": torch.ones(4, length, dtype=torch.bool),
            "right": column < real,
            "left": column >= length - real,
            "holes": (column == 0)
            | (torch.rand(4, length, generator=generator) < 0.5) & (real > 1),
        }[padding].long()
        batch = {
            "input_ids": torch.where(mask == 1, ids, PAD[family]),
            "attention_mask": mask,
            "token_type_ids": types,
        }
        return batch | ({"labels": torch.tensor([2, 0, 1, 1])} if labels else {})

    return make


@pytest.fixture(scope="session")
def dense_forward() -> Callable[..., tuple[Tensor, list[Tensor]]]:
    """Logits and hidden states of a sub-network in padded plain torch, from Hugging Face's weights.

    `dense_forward(state, config, subnet, batch, head_masks=None)`: weights are sliced, the head
    size is kept. It shares no code with the package. `head_masks` `[H]` per kept layer multiply
    the heads' outputs.
    """

    def forward(state, config, subnet, batch, head_masks=None):
        family = "bert" if config.backbone == "bert" else "roberta"
        base = {name.removeprefix(f"{family}."): tensor for name, tensor in state.items()}
        ids, mask, types = (batch[k] for k in ("input_ids", "attention_mask", "token_type_ids"))

        def linear(x, name, rows=None, columns=None):
            return F.linear(x, base[f"{name}.weight"][:rows, :columns], base[f"{name}.bias"][:rows])

        def norm(x, name):
            weight, bias = base[f"{name}.weight"], base[f"{name}.bias"]
            return F.layer_norm(x, x.shape[-1:], weight, bias, config.layer_norm_eps)

        if family == "bert":
            positions = torch.arange(ids.shape[1]).expand_as(ids)
        else:
            real = (ids != config.pad_token_id).long()
            positions = real.cumsum(1) * real + config.pad_token_id
        tables = [("word", ids), ("position", positions), ("token_type", types)]
        x = sum(base[f"embeddings.{name}_embeddings.weight"][index] for name, index in tables)
        hidden = [norm(x, "embeddings.LayerNorm")]
        blocked = (mask == 0)[:, None, None, :]
        for i, layer in enumerate(subnet.layers):
            x, at, heads = hidden[-1], f"encoder.layer.{layer}.", subnet.heads[i]
            rows = heads * config.head_size
            query, key, value = (
                linear(x, f"{at}attention.self.{part}", rows)
                .unflatten(-1, (heads, config.head_size))
                .transpose(1, 2)
                for part in ("query", "key", "value")
            )
            scores = query @ key.mT / config.head_size**0.5
            context = scores.masked_fill(blocked, -1e30).softmax(-1) @ value  # [B, H, S, d]
            if head_masks is not None:
                context = context * head_masks[i][:, None, None]
            context = context.transpose(1, 2).flatten(2)
            y = linear(context, f"{at}attention.output.dense", columns=rows)
            x = norm(y + x, f"{at}attention.output.LayerNorm")
            inner = F.gelu(linear(x, f"{at}intermediate.dense", subnet.neurons[i]))
            y = linear(inner, f"{at}output.dense", columns=subnet.neurons[i])
            hidden.append(norm(y + x, f"{at}output.LayerNorm"))
        first = hidden[-1][torch.arange(len(ids)), mask.argmax(1)]
        dense, out = {
            "bert": ("pooler.dense", "classifier"),
            "roberta": ("classifier.dense", "classifier.out_proj"),
        }[family]
        return linear(linear(first, dense).tanh(), out), hidden

    return forward
