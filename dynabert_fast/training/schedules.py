"""Which sub-networks a training step takes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dynabert_fast.errors import InputError
from dynabert_fast.subnet import Subnet

Kind = Literal["grid", "sandwich", "random"]
KINDS: tuple[Kind, ...] = ("grid", "sandwich", "random")


@dataclass(frozen=True)
class Schedule:
    """Which of a stage's sub-networks each step trains.

    Attributes:
        kind: `grid`: all of them in every step (the paper). `sandwich`: the largest, the smallest
            and `count` others drawn at random (Yu and Huang 2019, arXiv 1903.05134). `random`: the
            largest, the smallest and `count` that have the layers of one of them and in each layer
            the width of another: widths that differ from layer to layer.
        count: How many are drawn; not used by `grid`.
    """

    kind: Kind = "grid"
    count: int = 2

    def __post_init__(self) -> None:
        """Refuse what is no schedule."""
        if self.kind not in KINDS:
            raise InputError(f"schedule must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.count < 0:
            raise InputError(f"a schedule draws 0 or more sub-networks, got {self.count}")

    def choose(self, subnets: Sequence[Subnet], seed: int, step: int) -> tuple[Subnet, ...]:
        """The sub-networks of a step: a function of the arguments, the same in every process."""
        if self.kind == "grid":
            return tuple(subnets)
        rng = random.Random(f"{seed} {step}")
        by_size = sorted(subnets, key=_size)
        ends = list(dict.fromkeys((by_size[-1], by_size[0])))
        others = [s for s in subnets if s not in ends]
        if self.kind == "sandwich":
            return *ends, *rng.sample(others, min(self.count, len(others)))
        return *ends, *(_blend(subnets, rng) for _ in range(self.count))


def _size(subnet: Subnet) -> tuple[int, int]:
    """What sub-networks are ordered by: heads and neurons are cut alike."""
    return sum(subnet.neurons), sum(subnet.heads)


def _blend(subnets: Sequence[Subnet], rng: random.Random) -> Subnet:
    """The layers of one, in each the extents of any that keeps it."""
    layers = rng.choice(subnets).layers
    extents = []
    for layer in layers:
        found = [
            (s.heads[i], s.neurons[i])
            for s in subnets
            for i, own in enumerate(s.layers)
            if own == layer
        ]
        extents.append(rng.choice(found))
    return Subnet(layers, tuple(h for h, _ in extents), tuple(n for _, n in extents))
