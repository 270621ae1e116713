"""Rewiring: sort heads and neurons by importance, so that every narrower model is a prefix.

Hou et al. 2020, section 3.1. Importance is a first-order estimate of how much the loss changes when
a head or a neuron is removed, from real gradients on a development set. Sorting permutes parameters
and leaves the function unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dynabert_fast import ops
from dynabert_fast.errors import InputError
from dynabert_fast.subnet import Subnet

if TYPE_CHECKING:
    from dynabert_fast.models import DynaBertForSequenceClassification

FILE_NAME = "rewiring.safetensors"

Accumulation = Literal["per_batch", "running"]


@dataclass(frozen=True)
class Rewiring:
    """Importance of every head and neuron, and the order that the weights are stored in.

    Heads and neurons are numbered as in the checkpoint before its first rewiring.

    Attributes:
        head_importance: Per layer `[H]`, float32.
        neuron_importance: Per layer `[N]`, float32.
        head_order: Per layer `[H]`, int64: the original number of the head now at each place.
        neuron_order: Per layer `[N]`, int64, likewise.
        accumulation: How batches were summed, see `measure_importance`.
        batches: Number of batches that were summed.
    """

    head_importance: tuple[Tensor, ...]
    neuron_importance: tuple[Tensor, ...]
    head_order: tuple[Tensor, ...]
    neuron_order: tuple[Tensor, ...]
    accumulation: str
    batches: int

    def save(self, directory: str | Path) -> None:
        """Write `rewiring.safetensors` into a checkpoint folder."""
        from safetensors.torch import save_file

        tensors = {
            f"{name}.{layer}": tensor.cpu().contiguous()
            for name in _TENSORS
            for layer, tensor in enumerate(getattr(self, name))
        }
        about = {"accumulation": self.accumulation, "batches": self.batches}
        metadata = {"format": "pt", "rewiring": json.dumps(about)}
        save_file(tensors, Path(directory) / FILE_NAME, metadata=metadata)

    @classmethod
    def load(cls, source: str, **hub: Any) -> Self | None:
        """Read it from a checkpoint folder or hub id; `None` if the checkpoint was never rewired.

        Raises:
            InputError: The file is there and cannot be read.
        """
        from safetensors import SafetensorError, safe_open
        from transformers.utils import cached_file

        path = cached_file(source, FILE_NAME, _raise_exceptions_for_missing_entries=False, **hub)
        if path is None:
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["rewiring"])
                layers = len(list(file.keys())) // len(_TENSORS)
                tensors = {
                    name: tuple(file.get_tensor(f"{name}.{i}") for i in range(layers))
                    for name in _TENSORS
                }
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}); rewire again") from error
        return cls(
            tensors["head_importance"],
            tensors["neuron_importance"],
            tensors["head_order"],
            tensors["neuron_order"],
            **about,
        )

    def describe(self, widths: Iterable[float] = (0.75, 0.5, 0.25)) -> str:
        """A table: each layer's heads in stored order, and the importance that each width keeps."""
        widths, title = list(widths), "heads, most important first"
        stored = [" ".join(map(str, order.tolist())) for order in self.head_order]
        wide = max(len(title), *map(len, stored))
        lines = [
            f"importance summed over {self.batches} batches ({self.accumulation}); "
            "heads in stored order, numbered as before rewiring; share of importance kept by width",
            "  ".join(["layer", f"{title:<{wide}}", *(f"w{w:.2f}".ljust(23) for w in widths)]),
        ]
        shares = zip(stored, self.head_importance, self.neuron_importance, strict=True)
        for layer, (order, heads, neurons) in enumerate(shares):
            one = SimpleNamespace(layer_heads=[len(heads)], layer_neurons=[len(neurons)])
            kept = []
            for width in widths:
                subnet = Subnet.from_multipliers(one, width)
                kept.append(
                    f"{_share(heads, subnet.heads[0]):4.0%} heads "
                    f"{_share(neurons, subnet.neurons[0]):4.0%} neurons"
                )
            lines.append("  ".join([f"{layer:5d}", f"{order:<{wide}}", *kept]))
        return "\n".join(line.rstrip() for line in lines)


_TENSORS = ("head_importance", "neuron_importance", "head_order", "neuron_order")


def _share(importance: Tensor, count: int) -> float:
    """Share of the summed importance in the `count` largest entries."""
    ordered = importance.double().sort(descending=True).values
    return float(ordered[:count].sum() / ordered.sum().clamp(min=1e-30))


def measure_importance(
    model: DynaBertForSequenceClassification,
    batches: Iterable[dict[str, Tensor]],
    accumulation: Accumulation = "per_batch",
    progress: bool = True,
) -> Rewiring:
    """Measure importance on labelled batches, with the model in evaluation mode.

    Head h: `|dL/dm_h|` for an all-ones mask m on the heads' outputs. The output projection is
    linear in the masked outputs, so `dL/dm_h = <W_out[h], dL/dW_out[h]>`: weight gradients
    say it all.
    Neuron j: `|<W1[j], dL/dW1[j]> + b1[j] dL/db1[j]| + |<W2[:, j], dL/dW2[:, j]>|`.

    Args:
        model: A sequence classifier, of a view the whole model; left as it was.
        batches: Keyword arguments of the model with `labels`, on the model's device.
        accumulation: `per_batch` sums magnitudes of each batch's gradients (the paper's way);
            `running` sums magnitudes of the gradients accumulated so far (the released code, which
            never reset them).
        progress: Show a progress bar.

    Returns:
        Importance and the descending order by it, not yet applied (see `rewire`).

    Raises:
        InputError: `accumulation` is unknown, there is no labelled batch, or a loss is not finite.
    """
    if accumulation not in ("per_batch", "running"):
        raise InputError(f"accumulation must be per_batch or running, got {accumulation!r}")
    layers = model.dynabert.encoder.layer
    watched = [p for layer in layers for p in _watched(layer)]
    required = {p: p.requires_grad for p in model.parameters()}
    modes = [(module, module.training) for module in model.modules()]
    heads = [torch.zeros(h, device=model.device) for h in model.config.layer_heads]
    neurons = [torch.zeros(n, device=model.device) for n in model.config.layer_neurons]
    count = 0
    model.eval().requires_grad_(False)
    try:
        for parameter in watched:
            parameter.requires_grad_(True)
        total: list[Tensor] | None = None
        for batch in tqdm(batches, desc="importance", disable=not progress):
            if "labels" not in batch:
                raise InputError(
                    f"batch {count} has no labels; importance needs a labelled data set"
                )
            with torch.enable_grad():
                loss = model(**batch, subnet=Subnet.full(model.config)).loss
            if not loss.isfinite():
                raise InputError(
                    f"the loss of batch {count} is {loss.item()}; fine-tune the model first"
                )
            gradients = list(torch.autograd.grad(loss, watched))
            if total is not None and accumulation == "running":
                gradients = [t + g for t, g in zip(total, gradients, strict=True)]
            total = gradients
            _add_importance(layers, gradients, heads, neurons)
            count += 1
    finally:
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)
        for module, training in modes:
            module.training = training
    if count == 0:
        raise InputError("importance needs at least one labelled batch, got none")
    return Rewiring(
        tuple(h.cpu() for h in heads),
        tuple(n.cpu() for n in neurons),
        tuple(h.cpu().argsort(descending=True, stable=True) for h in heads),
        tuple(n.cpu().argsort(descending=True, stable=True) for n in neurons),
        accumulation,
        count,
    )


def _watched(layer: Any) -> tuple[nn.Parameter, ...]:
    """The parameters whose gradients say the importance of a layer's heads and neurons."""
    up = layer.ffn.up
    return layer.attention.out.weight_t, up.weight, up.bias, layer.ffn.down.weight_t


def _add_importance(
    layers: nn.ModuleList, gradients: list[Tensor], heads: list[Tensor], neurons: list[Tensor]
) -> None:
    """Add one batch's magnitudes to each layer's sums."""
    with torch.no_grad():
        for i, layer in enumerate(layers):
            pairs = list(zip(_watched(layer), gradients[4 * i : 4 * i + 4], strict=True))
            if add := _kernel(pairs[0][0]):
                add(heads[i], *pairs[0])
                add(neurons[i], *pairs[1], *pairs[2])
                add(neurons[i], *pairs[3])
                continue
            out, up, up_bias, down = (p.float() * g.float() for p, g in pairs)
            heads[i] += out.view(len(heads[i]), -1).sum(-1).abs()
            neurons[i] += (up.sum(-1) + up_bias).abs() + down.sum(-1).abs()


def _kernel(weight: Tensor) -> Callable[..., None] | None:
    """What adds up products of such weights with their gradients in one pass, where there is it."""
    triton = ops.backends()["triton"]
    if ops.forced_backend() not in (None, "triton"):
        return None
    if triton.reason_against("add_importance", weight.device, weight.dtype):
        return None
    return triton.kernels["add_importance"]


@torch.no_grad()
def rewire(model: DynaBertForSequenceClassification, importance: Rewiring) -> None:
    """Sort the model's heads and neurons, in place; its function does not change.

    The importance is recorded as `model.rewiring` and saved with the checkpoint. A model that was
    rewired before keeps the numbering it had before its first rewiring.

    Args:
        model: The model that the importance was measured on.
        importance: From `measure_importance`.

    Raises:
        InputError: The importance was measured on a model of other extents.
    """
    given = [
        (len(h), len(n))
        for h, n in zip(importance.head_order, importance.neuron_order, strict=True)
    ]
    wanted = list(zip(model.config.layer_heads, model.config.layer_neurons, strict=True))
    if given != wanted:
        raise InputError(
            f"importance is of layers with (heads, neurons) {given}, the model has {wanted}"
        )
    for layer, heads, neurons in zip(
        model.dynabert.encoder.layer, importance.head_order, importance.neuron_order, strict=True
    ):
        heads, neurons = heads.to(model.device), neurons.to(model.device)
        attention: Any = layer.attention
        ffn: Any = layer.ffn
        for parameter in (attention.qkv.weight, attention.qkv.bias):
            parameter.copy_(parameter[heads])
        out = attention.out.weight_t.view(len(heads), -1, model.config.hidden_size)
        out.copy_(out[heads])
        for parameter in (ffn.up.weight, ffn.up.bias, ffn.down.weight_t):
            parameter.copy_(parameter[neurons])
    model.rewiring = importance if model.rewiring is None else _compose(model.rewiring, importance)


def _compose(before: Rewiring, now: Rewiring) -> Rewiring:
    """`now`, measured on weights in `before`'s order, in the numbering from before both."""

    def back(values: tuple[Tensor, ...], orders: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(
            torch.empty_like(v).scatter_(0, order, v)
            for v, order in zip(values, orders, strict=True)
        )

    def chain(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(a[b] for a, b in zip(first, second, strict=True))

    return Rewiring(
        back(now.head_importance, before.head_order),
        back(now.neuron_importance, before.neuron_order),
        chain(before.head_order, now.head_order),
        chain(before.neuron_order, now.neuron_order),
        now.accumulation,
        now.batches,
    )
