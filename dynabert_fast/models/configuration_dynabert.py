"""`DynaBertConfig`: a BERT or RoBERTa configuration whose layers may differ in width."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from dynabert_fast.errors import InputError

#: Hugging Face model types that load, and the prefix of their weight names.
BACKBONES = {
    "bert": "bert",
    "roberta": "roberta",
    "xlm-roberta": "roberta",
    "camembert": "roberta",
}

# Where they are not written down. (All other defaults are the same as BERT's.)
_ROBERTA_TOKENS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class DynaBertConfig(PreTrainedConfig):
    """Configuration of an elastic encoder: `BertConfig`'s fields, which mean what they mean there.

    Attributes:
        backbone: Family whose names, position ids and classification head apply, a key of
            `BACKBONES`. Read from the checkpoint's `model_type`.
        head_size: Width d of one attention head; 0 (default) is
            `hidden_size / num_attention_heads`.
        heads_per_layer: Heads of each layer, where layers differ (an exported sub-network);
            default `num_attention_heads` everywhere.
        neurons_per_layer: FFN neurons of each layer, likewise.
    """

    model_type = "dynabert"

    backbone: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    head_size: int = 0
    heads_per_layer: list[int] | None = None
    neurons_per_layer: list[int] | None = None
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    classifier_dropout: float | int | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill `head_size` and refuse what the encoder does not compute."""
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.backbone not in BACKBONES:
            raise InputError(
                f"backbone must be one of {', '.join(BACKBONES)}, got {self.backbone!r}"
            )
        if self.hidden_act not in _ACTIVATIONS:
            raise InputError(
                f"hidden_act must be one of {', '.join(_ACTIVATIONS)}, got {self.hidden_act!r}"
            )
        for name in ("heads_per_layer", "neurons_per_layer"):
            values = getattr(self, name)
            if values is not None and len(values) != self.num_hidden_layers:
                raise InputError(
                    f"{name} must have one entry for each of the {self.num_hidden_layers} layers, "
                    f"got {len(values)}"
                )
        if not self.head_size:
            if self.hidden_size % self.num_attention_heads:
                raise InputError(
                    "hidden_size must be a multiple of num_attention_heads, "
                    f"got {self.hidden_size} and {self.num_attention_heads}"
                )
            self.head_size = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in `PreTrainedConfig`; fields among `kwargs` are checked like the others."""
        own = {name: kwargs.pop(name) for name in cls.__annotations__.keys() & kwargs.keys()}
        return super().from_dict({**config_dict, **own}, **kwargs)

    @property
    def layer_heads(self) -> list[int]:
        """Attention heads of each layer, length L."""
        return self.heads_per_layer or [self.num_attention_heads] * self.num_hidden_layers

    @property
    def layer_neurons(self) -> list[int]:
        """FFN neurons of each layer, length L."""
        return self.neurons_per_layer or [self.intermediate_size] * self.num_hidden_layers

    @property
    def activation(self) -> str:
        """`hidden_act` under the name that `ops.expand` knows."""
        return _ACTIVATIONS[self.hidden_act]

    @property
    def is_roberta(self) -> bool:
        """Whether positions count from the padding id on, and the head is RoBERTa's."""
        return BACKBONES[self.backbone] == "roberta"

    @property
    def max_tokens(self) -> int:
        """Longest sequence that the position embeddings allow."""
        first = (self.pad_token_id or 0) + 1 if self.is_roberta else 0
        return self.max_position_embeddings - first

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a configuration, translating that of a plain BERT or RoBERTa checkpoint.

        Raises:
            InputError: There is no configuration, or it is of another architecture.
        """
        found, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not found:
            raise InputError(
                f"{pretrained_model_name_or_path} holds no config.json, or an empty one; "
                "name a checkpoint's folder"
            )
        return _from_backbone(found, pretrained_model_name_or_path), kwargs


def _from_backbone(found: dict[str, Any], source: Any) -> dict[str, Any]:
    """The configuration as one of ours, or `InputError` where it describes something else."""
    model_type = found.get("model_type")
    if model_type == DynaBertConfig.model_type:
        return found
    allowed = f"allowed are {', '.join(BACKBONES)} and {DynaBertConfig.model_type}"
    if model_type not in BACKBONES:
        raise InputError(f"{source} is a checkpoint of model type {model_type!r}; {allowed}")
    if found.get("is_decoder") or found.get("add_cross_attention"):
        raise InputError(f"{source} is a decoder; {allowed}, as encoders")
    position = found.get("position_embedding_type", "absolute")
    if position != "absolute":
        raise InputError(f"{source} has {position} position embeddings; allowed are absolute ones")
    defaults = _ROBERTA_TOKENS if BACKBONES[model_type] == "roberta" else {}
    ours = {"model_type": DynaBertConfig.model_type, "backbone": model_type}
    return {**defaults, **found, **ours}
