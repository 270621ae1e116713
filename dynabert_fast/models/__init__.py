"""Elastic BERT and RoBERTa as Hugging Face models."""

from __future__ import annotations

from dynabert_fast.models.configuration_dynabert import BACKBONES, DynaBertConfig
from dynabert_fast.models.modeling_dynabert import (
    DynaBertForSequenceClassification,
    DynaBertModel,
    PackedSequences,
)

__all__ = [
    "BACKBONES",
    "DynaBertConfig",
    "DynaBertForSequenceClassification",
    "DynaBertModel",
    "PackedSequences",
]
