"""Hugging Face weight names and layouts, to and from ours. Both directions only move numbers.

Ours (H heads of size d, N neurons, hidden size D; one head or neuron = one contiguous row block):

    attention.qkv.weight [H, 3, d, D]   attention.qkv.bias [H, 3, d]
    attention.out.weight_t [H * d, D]   attention.out.bias [D]
    ffn.up.weight [N, D]                ffn.up.bias [N]
    ffn.down.weight_t [N, D]            ffn.down.bias [D]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from dynabert_fast.errors import InputError
from dynabert_fast.models.configuration_dynabert import BACKBONES, DynaBertConfig

State = dict[str, Tensor]

#: Prefix of the encoder inside a model with a head.
BASE = "dynabert"

# (theirs, ours) of tensors that are stored alike, and of those that are stored transposed.
_SAME = (
    ("attention.output.dense.bias", "attention.out.bias"),
    ("attention.output.LayerNorm.weight", "attention.norm.weight"),
    ("attention.output.LayerNorm.bias", "attention.norm.bias"),
    ("intermediate.dense.weight", "ffn.up.weight"),
    ("intermediate.dense.bias", "ffn.up.bias"),
    ("output.dense.bias", "ffn.down.bias"),
    ("output.LayerNorm.weight", "ffn.norm.weight"),
    ("output.LayerNorm.bias", "ffn.norm.bias"),
)
_TRANSPOSED = (
    ("attention.output.dense.weight", "attention.out.weight_t"),
    ("output.dense.weight", "ffn.down.weight_t"),
)
_EMBEDDINGS = (
    ("embeddings.word_embeddings.weight", "embeddings.word.weight"),
    ("embeddings.position_embeddings.weight", "embeddings.position.weight"),
    ("embeddings.token_type_embeddings.weight", "embeddings.token_type.weight"),
    ("embeddings.LayerNorm.weight", "embeddings.norm.weight"),
    ("embeddings.LayerNorm.bias", "embeddings.norm.bias"),
)
_QKV = ("query", "key", "value")
_THEIRS = re.compile(
    r"_embeddings\.weight$|\.LayerNorm\.|\.attention\.self\.|\.(intermediate|output)\.dense\."
)
_LAYER = re.compile(r"(encoder\.layer\.\d+\.)(.+)")
# Pre-training heads and index buffers, which a sequence model has no use for.
_UNUSED = re.compile(r"(cls|lm_head|qa_outputs)\.|(.*\.)?embeddings\.position_ids$")


def is_huggingface(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are Hugging Face's, and not ours."""
    return any(_THEIRS.search(f".{name}") for name in state)


def from_huggingface(state: Mapping[str, Tensor], config: DynaBertConfig, with_head: bool) -> State:
    """Our names and layouts for a Hugging Face state dict of this family.

    Args:
        state: Tensors of a base model, of a sequence classifier or of a pre-training model.
        config: Configuration of the checkpoint.
        with_head: Whether the target has a classification head: names get the prefix `dynabert.`
            and RoBERTa's `classifier.dense` becomes the pooler. Otherwise heads are left out.

    Returns:
        A new dict. Names that no rule knows are kept as they are.
    """
    prefix = BACKBONES[config.backbone] + "."
    base: State = {}
    head: State = {}
    has_prefix = any(name.startswith(prefix) for name in state)
    for name, tensor in state.items():
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if _UNUSED.match(name):
            continue
        if name.startswith("classifier."):
            head[name] = tensor
        elif has_prefix and not name.startswith(prefix):
            head[name] = tensor  # unknown: reported by the loader
        else:
            base[name.removeprefix(prefix)] = tensor
    base = _base_from_huggingface(base, config)
    if not with_head:
        return base
    if config.is_roberta and "classifier.dense.weight" in head:
        for kind in ("weight", "bias"):
            base[f"pooler.dense.{kind}"] = head.pop(f"classifier.dense.{kind}")
            head[f"classifier.{kind}"] = head.pop(f"classifier.out_proj.{kind}")
    return {f"{BASE}.{name}": tensor for name, tensor in base.items()} | head


def _base_from_huggingface(state: Mapping[str, Tensor], config: DynaBertConfig) -> State:
    embeddings, same, transposed = dict(_EMBEDDINGS), dict(_SAME), dict(_TRANSPOSED)
    converted: State = {}
    for name, tensor in state.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            converted[embeddings.get(name, name)] = tensor
        elif match[2] in same:
            converted[match[1] + same[match[2]]] = tensor
        elif match[2] in transposed:
            converted[match[1] + transposed[match[2]]] = tensor.t().contiguous()
        elif match[2].startswith("attention.self.query."):
            kind = match[2].rpartition(".")[2]
            names = [f"{match[1]}attention.self.{part}.{kind}" for part in _QKV]
            converted[f"{match[1]}attention.qkv.{kind}"] = _stack_heads(
                state, names, config.head_size
            )
        elif not match[2].startswith("attention.self."):
            converted[name] = tensor
    return converted


def _stack_heads(state: Mapping[str, Tensor], names: list[str], head_size: int) -> Tensor:
    """`[H, 3, d, ...]` of the query's, key's and value's `[H * d, ...]`."""
    if missing := [name for name in names if name not in state]:
        raise InputError(f"the checkpoint lacks {missing[0]}; copy or save it again")
    parts = [state[name] for name in names]
    rows = [len(part) for part in parts]
    if len(set(rows)) > 1 or rows[0] % head_size:
        raise InputError(
            f"{names[0]}, its key and its value must have equally many rows, a multiple of the "
            f"head size {head_size}, got {rows}; the configuration is of another checkpoint"
        )
    return torch.stack([part.unflatten(0, (-1, head_size)) for part in parts], 1)


def to_huggingface(state: Mapping[str, Tensor], config: DynaBertConfig) -> State:
    """Hugging Face's names and layouts for a state dict of ours; inverts `from_huggingface`."""
    with_head = any(name.startswith(f"{BASE}.") for name in state)
    prefix = BACKBONES[config.backbone] + "." if with_head else ""
    embeddings, same, transposed = (
        {ours: theirs for theirs, ours in names} for names in (_EMBEDDINGS, _SAME, _TRANSPOSED)
    )
    converted: State = {}
    for name, tensor in state.items():
        bare = name.removeprefix(f"{BASE}.")
        match = _LAYER.fullmatch(bare)
        if match is None:
            if with_head and config.is_roberta:
                bare = bare.replace("classifier.", "classifier.out_proj.")
                bare = bare.replace("pooler.dense.", "classifier.dense.")
            in_base = not bare.startswith("classifier.")
            converted[(prefix if in_base else "") + embeddings.get(bare, bare)] = tensor
        elif match[2] in same:
            converted[prefix + match[1] + same[match[2]]] = tensor
        elif match[2] in transposed:
            converted[prefix + match[1] + transposed[match[2]]] = tensor.t().contiguous()
        else:  # attention.qkv.weight [H, 3, d, D] or .bias [H, 3, d]
            kind = match[2].rpartition(".")[2]
            for part, rows in zip(_QKV, tensor.unbind(1), strict=True):
                theirs = f"{prefix}{match[1]}attention.self.{part}.{kind}"
                converted[theirs] = rows.flatten(0, 1).contiguous()
    return converted


def read_checkpoint(source: str, variant: str | None = None, **hub: Any) -> State:
    """All tensors of a checkpoint folder or hub id: safetensors or PyTorch files, sharded or not.

    Args:
        source: Folder or hub id.
        variant: Of the files' names: `model.<variant>.safetensors`.
        **hub: `cache_dir`, `revision`, `token`, `local_files_only`, ... of `cached_file`.

    Raises:
        InputError: No weights are there, or a file cannot be read.
    """
    for single, index in (
        (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME),
        (WEIGHTS_NAME, WEIGHTS_INDEX_NAME),
    ):
        if path := _find(source, _variant(single, variant), hub):
            return _read_tensors(Path(path))
        if path := _find(source, _variant(index, variant), hub):
            return _read_shards(source, Path(path), hub)
    names = (_variant(name, variant) for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME))
    raise InputError(
        f"{source} holds no weights; allowed are {' or '.join(names)}, whole or sharded"
    )


def _variant(name: str, variant: str | None) -> str:
    """A file's name with the variant before its ending, as `save_pretrained` writes it."""
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def _find(source: str, name: str, hub: dict[str, Any]) -> str | None:
    return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)


def _read_shards(source: str, index: Path, hub: dict[str, Any]) -> State:
    import json

    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (KeyError, ValueError) as error:
        raise InputError(f"{index} cannot be read ({error}); copy or save it again") from error
    state: State = {}
    for name in names:
        path = _find(source, name, hub)
        if path is None:
            raise InputError(f"{source} lacks {name}, which {index.name} names; copy it again")
        state |= _read_tensors(Path(path))
    return state


def _read_tensors(path: Path) -> State:
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            # Copied out of the memory map: mapped weights would change with the file, and lie at
            # addresses for which a BLAS may round differently than for the model that was saved.
            return {name: tensor.clone() for name, tensor in load_file(path).items()}
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{path} cannot be read ({reason}); copy or save it again") from error
