"""`SubnetTree`: sub-networks that run on the same batch, and what they have in common.

Two sub-networks share their layers from the first one on, for as long as they keep the same ones at
the same extents: a prefix tree, whose root is the embeddings. Each model layer is one call, with a
row block for each of the tree's nodes in that layer. Like `Subnet` a leaf module without torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from dynabert_fast.errors import InputError
from dynabert_fast.subnet import Subnet

#: Which output, and which piece of it: output 0 is that of the embeddings, i + 1 that of level i.
Source = tuple[int, int]


@dataclass(frozen=True)
class Level:
    """One call of a model layer, with a row block (a copy of the batch's tokens) for each node.

    Attributes:
        layer: The model's layer.
        heads: Of each node.
        neurons: Of each node.
        sources: Pieces of earlier outputs that, one behind the other, are its input.
        pieces: Nodes in each of the pieces that later levels cut its output into.
    """

    layer: int
    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    sources: tuple[Source, ...]
    pieces: tuple[int, ...]


@dataclass(frozen=True)
class Edge:
    """A piece of an output, where it goes, and for whom: a hidden state of several sub-networks.

    Attributes:
        source: The piece.
        layer: The layer whose input it is; `None` where it is a last hidden state.
        users: For each node in the piece, the sub-networks (by index) that go this way.
    """

    source: Source
    layer: int | None
    users: tuple[tuple[int, ...], ...]


class SubnetTree:
    """What a set of sub-networks computes on one batch, each part once.

    Pass it as `subnet` to a model: all of `subnets` then run on every sequence of the batch, and
    outputs have a leading dimension of one entry for each of them.

    Args:
        subnets: One or more, in any order; one may be there twice.

    Attributes:
        subnets: The same as a tuple.
        levels: The calls, in order.
        ends: Pieces that hold the last hidden states.
        order: For each sub-network, which of the nodes in `ends` (counted through) is its own.
        edges: Hidden states: for each level's input, in order, then the last ones; each piece once
            for each layer that it goes to.

    Raises:
        InputError: There is no sub-network.
    """

    def __init__(self, subnets: Sequence[Subnet]) -> None:
        self.subnets = tuple(subnets)
        if not self.subnets:
            raise InputError("a tree needs at least one sub-network, got none")
        # For each level: its layer, the (heads, neurons) and the parent of each node.
        found: list[tuple[int, list[tuple[int, int]], list[int]]] = []
        where = [(0, 0)] * len(self.subnets)  # (output, node) that each sub-network has reached
        users: dict[tuple[int, int, int | None], list[int]] = {}  # output, node, next layer
        inputs: list[list[tuple[int, int]]] = []  # of each level, and of the end: (output, node)
        extents = [
            dict(zip(s.layers, zip(s.heads, s.neurons, strict=True), strict=True))
            for s in self.subnets
        ]
        for layer in sorted({layer for s in self.subnets for layer in s.layers}):
            going = [i for i, own in enumerate(extents) if layer in own]
            # Parents that lie together stay together; of one parent's children the widest is first.
            keys = sorted(
                {(where[i], extents[i][layer]) for i in going},
                key=lambda key: (key[0], -key[1][0], -key[1][1]),
            )
            for i in going:
                users.setdefault((*where[i], layer), []).append(i)
            inputs.append([parent for parent, _ in keys])
            found.append((layer, [own for _, own in keys], []))
            place = {key: node for node, key in enumerate(keys)}
            for i in going:
                where[i] = len(found), place[where[i], extents[i][layer]]
        last = sorted(set(where))
        for i, at in enumerate(where):
            users.setdefault((*at, None), []).append(i)
        inputs.append(last)
        self.order = tuple(last.index(at) for at in where)

        runs = [list(_runs(nodes)) for nodes in inputs]
        sizes = [1, *(len(own) for _, own, _ in found)]
        cuts = [{0, size} for size in sizes]
        for output, first, count in itertools.chain.from_iterable(runs):
            cuts[output] |= {first, first + count}
        starts = [sorted(points)[:-1] for points in cuts]
        pieces = [tuple(b - a for a, b in itertools.pairwise(sorted(points))) for points in cuts]

        def sources(of: list[tuple[int, int, int]]) -> tuple[Source, ...]:
            return tuple(
                (output, piece)
                for output, first, count in of
                for piece, start in enumerate(starts[output])
                if first <= start < first + count
            )

        self.levels = tuple(
            Level(
                layer,
                tuple(heads for heads, _ in own),
                tuple(neurons for _, neurons in own),
                sources(runs[i]),
                pieces[i + 1],
            )
            for i, (layer, own, _) in enumerate(found)
        )
        self.ends = sources(runs[-1])
        edges: dict[tuple[Source, int | None], Edge] = {}
        ways = [(level.layer, level.sources) for level in self.levels]
        for to, pieces_of in [*ways, (None, self.ends)]:
            for output, piece in pieces_of:
                first = starts[output][piece]
                nodes = range(first, first + pieces[output][piece])
                edge = Edge(
                    (output, piece), to, tuple(tuple(users[output, node, to]) for node in nodes)
                )
                edges[edge.source, to] = edge
        self.edges = tuple(edges.values())

    @property
    def nodes(self) -> int:
        """How many times a layer is computed over the batch's tokens."""
        return sum(len(level.heads) for level in self.levels)

    def __repr__(self) -> str:
        return f"SubnetTree({list(self.subnets)})"


def _runs(nodes: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(output, first node, count) of neighbours that lie one behind the other in one output."""
    runs: list[tuple[int, int, int]] = []
    for output, node in nodes:
        if runs and runs[-1][0] == output and sum(runs[-1][1:]) == node:
            runs[-1] = output, runs[-1][1], runs[-1][2] + 1
        else:
            runs.append((output, node, 1))
    return runs
