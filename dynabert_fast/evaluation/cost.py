"""What a sub-network costs on paper: parameters and operations, from its extents alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynabert_fast.errors import InputError

if TYPE_CHECKING:
    from dynabert_fast.models import DynaBertConfig
    from dynabert_fast.subnet import Subnet


def count_parameters(config: DynaBertConfig, subnet: Subnet) -> int:
    """Count the parameters of a sequence classification model that `subnet` uses.

    Embeddings, layer norms, output biases, pooler and classifier are always whole; a layer of `h`
    heads of size `d` and `k` neurons has `4*h*d*D + 2*k*D` weights. BERT's pooler and classifier
    have the same size as RoBERTa's two-layer head.

    Args:
        config: The model's configuration.
        subnet: The sub-network.

    Raises:
        InputError: The sub-network does not fit the configuration.
    """
    subnet.check(config)
    hidden = config.hidden_size
    norm = 2 * hidden
    rows = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
    total = rows * hidden + norm
    for heads, neurons in zip(subnet.heads, subnet.neurons, strict=True):
        width = _attention_width(config, heads)
        biases = 3 * width + hidden + neurons + hidden
        total += _layer_weights(config, heads, neurons) + biases + 2 * norm
    pooler = hidden * hidden + hidden
    classifier = hidden * config.num_labels + config.num_labels
    return total + pooler + classifier


def count_flops(config: DynaBertConfig, subnet: Subnet, length: int) -> int:
    """Count the floating-point operations of one forward pass over one unpadded sequence.

    A multiply-add counts as 2. Counted are the matrix products: per kept layer
    `2*S*(4*h*d*D + 2*k*D)` for the linears and `4*S*S*h*d` for attention scores and context, then
    pooler and classifier on the first token. Elementwise work, norms and softmax are left out.

    Args:
        config: The model's configuration.
        subnet: The sub-network.
        length: Tokens in the sequence, S, at least 1.

    Raises:
        InputError: `length` is below 1 or the sub-network does not fit the configuration.
    """
    subnet.check(config)
    if length < 1:
        raise InputError(f"length must be at least 1 token, got {length}")
    hidden = config.hidden_size
    multiply_adds = hidden * hidden + hidden * config.num_labels  # pooler, classifier
    for heads, neurons in zip(subnet.heads, subnet.neurons, strict=True):
        multiply_adds += length * _layer_weights(config, heads, neurons)
        multiply_adds += 2 * length * length * _attention_width(config, heads)
    return 2 * multiply_adds


def _layer_weights(config: DynaBertConfig, heads: int, neurons: int) -> int:
    """Entries of the weight matrices of one layer: query, key, value, output, FFN in and out."""
    return (4 * _attention_width(config, heads) + 2 * neurons) * config.hidden_size


def _attention_width(config: DynaBertConfig, heads: int) -> int:
    """Rows of the query of `heads` heads, h*d."""
    return heads * config.head_size
