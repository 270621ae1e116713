"""`Subnet`: which layers a sub-network keeps, and how many heads and neurons each of them uses.

A leaf module without torch: the cache key, command-line flag, request field and table column of a
sub-network are all this one frozen value.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Protocol

from dynabert_fast.errors import InputError

#: The multipliers of the paper's grid (Hou et al. 2020, section 3), largest first.
WIDTHS = (1.0, 0.75, 0.5, 0.25)
DEPTHS = (1.0, 0.75, 0.5)

_MULTIPLIERS = re.compile(r"w(?P<width>\d+(?:\.\d+)?)-d(?P<depth>\d+(?:\.\d+)?)")
_EXTENTS = re.compile(
    r"l(?P<layers>\d+(?:\+\d+)*)-h(?P<heads>\d+(?:\+\d+)*)-n(?P<neurons>\d+(?:\+\d+)*)"
)


class ElasticConfig(Protocol):
    """What a `Subnet` needs to know of a model: the full extents of each layer."""

    @property
    def layer_heads(self) -> Sequence[int]:
        """Attention heads of each layer, length L."""

    @property
    def layer_neurons(self) -> Sequence[int]:
        """FFN neurons of each layer, length L."""


@dataclass(frozen=True, repr=False)
class Subnet:
    """A sub-network: a rule of loop bounds over one set of weights, never a copy of them.

    Attributes:
        layers: Indices of the kept layers, strictly ascending.
        heads: Attention heads that each kept layer uses: the first `heads[i]` of layer `layers[i]`.
        neurons: FFN neurons that each kept layer uses, likewise.
        width: Width multiplier it was built from, `None` for explicit extents. Not compared.
        depth: Depth multiplier it was built from, `None` for explicit extents. Not compared.
    """

    layers: tuple[int, ...]
    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    width: float | None = field(default=None, compare=False)
    depth: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Lists and numpy's integers become tuples of int: equal sub-networks are one key."""
        for name in ("layers", "heads", "neurons"):
            object.__setattr__(self, name, _integers(name, getattr(self, name)))

    @classmethod
    def from_multipliers(
        cls, config: ElasticConfig, width: float = 1.0, depth: float = 1.0
    ) -> Subnet:
        """Build a sub-network by the paper's rule.

        A layer of `H` heads and `N` neurons keeps `h = round(H * width)` heads (Python's round:
        half to even) and `int(h / H * N)` neurons; of `L` layers, `floor(i / depth)` is kept for
        every `i` in `range(round(depth * L))`.

        Args:
            config: The model's configuration.
            width: Multiplier in (0, 1] for heads and neurons.
            depth: Multiplier in (0, 1] for layers.

        Raises:
            InputError: A multiplier is outside (0, 1], or leaves no head or no layer.
        """
        for name, value in (("width", width), ("depth", depth)):
            if not issubclass(type(value), Real):  # mypy takes what is one to compare with nothing
                raise InputError(f"{name} must be a number in (0, 1], got {type(value).__name__}")
            if not 0 < value <= 1:  # also refuses NaN
                raise InputError(f"{name} must be in (0, 1], got {value}")
        total = len(config.layer_heads)
        kept = round(depth * total)
        if kept < 1:
            raise InputError(
                f"depth must keep 1 to {total} layers, got {depth} (0 layers); "
                "choose depths that do"
            )
        layers = tuple(math.floor(i / depth) for i in range(kept))
        heads, neurons = [], []
        for layer in layers:
            all_heads = config.layer_heads[layer]
            h = round(all_heads * width)
            if h < 1:
                raise InputError(
                    f"width must keep 1 to {all_heads} heads, got {width} (0 heads); "
                    "choose widths that do"
                )
            n = int(h / all_heads * config.layer_neurons[layer])
            if n < 1:
                raise InputError(
                    f"width must keep 1 to {config.layer_neurons[layer]} neurons, "
                    f"got {width} (0 neurons); choose widths that do"
                )
            heads.append(h)
            neurons.append(n)
        return cls(layers, tuple(heads), tuple(neurons), float(width), float(depth))

    @classmethod
    def from_extents(
        cls,
        config: ElasticConfig,
        layers: Sequence[int],
        heads: Sequence[int],
        neurons: Sequence[int],
    ) -> Subnet:
        """Build a sub-network from explicit per-layer extents (heterogeneous widths).

        Args:
            config: The model's configuration.
            layers: Kept layers, strictly ascending, each in `[0, L)`.
            heads: One entry per kept layer, in `[1, H]`.
            neurons: One entry per kept layer, in `[1, N]`.

        Raises:
            InputError: The three lengths differ, or an entry is out of its range.
        """
        subnet = cls(layers, heads, neurons)  # type: ignore[arg-type]  # they become tuples
        subnet.check(config)
        return subnet

    @classmethod
    def full(cls, config: ElasticConfig) -> Subnet:
        """The whole model."""
        return cls.from_multipliers(config)

    @classmethod
    def parse(cls, config: ElasticConfig, text: str) -> Subnet:
        """Read what `str(subnet)` writes: `"w0.50-d0.75"` or `"l0+2-h12+6-n3072+768"`.

        Raises:
            InputError: The text has neither form, or its values do not fit the model.
        """
        if match := _MULTIPLIERS.fullmatch(text):
            return cls.from_multipliers(config, float(match["width"]), float(match["depth"]))
        if match := _EXTENTS.fullmatch(text):
            parts = ([int(v) for v in match[k].split("+")] for k in ("layers", "heads", "neurons"))
            return cls.from_extents(config, *parts)
        raise InputError(
            f"a sub-network is written like w0.50-d0.75 or l0+2-h12+6-n3072+768 "
            f"(layers, heads, neurons), got {text!r}"
        )

    def check(self, config: ElasticConfig) -> None:
        """Raise `InputError` unless every extent exists in the model that `config` describes."""
        total = len(config.layer_heads)
        if not self.layers or not len(self.layers) == len(self.heads) == len(self.neurons):
            raise InputError(
                "a sub-network needs one layer or more, and heads and neurons for each; got "
                f"{len(self.layers)} layers, {len(self.heads)} heads, {len(self.neurons)} neurons"
            )
        if any(b <= a for a, b in zip(self.layers, self.layers[1:], strict=False)):
            raise InputError(f"layers must be strictly ascending, got {list(self.layers)}")
        for layer, heads, neurons in zip(self.layers, self.heads, self.neurons, strict=True):
            if not 0 <= layer < total:
                raise InputError(f"layers must be in 0 to {total - 1}, got {layer}")
            for name, value, most in (
                ("heads", heads, config.layer_heads[layer]),
                ("neurons", neurons, config.layer_neurons[layer]),
            ):
                if not 1 <= value <= most:
                    raise InputError(f"{name} of layer {layer} must be in 1 to {most}, got {value}")

    def __str__(self) -> str:
        """The name: `w0.50-d0.75`, or the extents where no multipliers are known."""
        if self.width is not None and self.depth is not None:
            return f"w{_number(self.width)}-d{_number(self.depth)}"
        parts = (self.layers, self.heads, self.neurons)
        return "-".join(
            key + "+".join(map(str, values)) for key, values in zip("lhn", parts, strict=True)
        )

    __repr__ = __str__


def grid(
    config: ElasticConfig,
    widths: Sequence[float] | None = None,
    depths: Sequence[float] | None = None,
) -> tuple[Subnet, ...]:
    """Every width at every depth: depth outer, width inner, both descending (the training order).

    Args:
        config: The model's configuration.
        widths: Width multipliers; default those of `WIDTHS` that keep a head and a neuron.
        depths: Depth multipliers; default those of `DEPTHS` that keep a layer.

    Raises:
        InputError: A list is empty or a multiplier does not fit the model.
    """
    if widths is None:
        widths = [width for width in WIDTHS if _fits(config, width=width)]
    if depths is None:
        depths = [depth for depth in DEPTHS if _fits(config, depth=depth)]
    if not widths or not depths:
        raise InputError("a grid needs at least one width and one depth, got none")
    return tuple(
        Subnet.from_multipliers(config, width, depth)
        for depth in sorted(set(depths), reverse=True)
        for width in sorted(set(widths), reverse=True)
    )


def _fits(config: ElasticConfig, width: float = 1.0, depth: float = 1.0) -> bool:
    try:
        Subnet.from_multipliers(config, width, depth)
    except InputError:
        return False
    return True


def _integers(name: str, given: Any) -> tuple[int, ...]:
    try:
        return tuple(map(operator.index, given))
    except TypeError:
        raise InputError(
            f"{name} of a sub-network must be a sequence of integers, got {given!r}"
        ) from None


def _number(value: float) -> str:
    """Two decimals at least, more only where two would not read back as the same number."""
    text = f"{value:.2f}"
    return text if float(text) == value else repr(value)
