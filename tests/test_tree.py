"""What a tree of sub-networks computes, with rows that are the paths that led to them."""

from __future__ import annotations

import itertools
import random

import pytest

from dynabert_fast.errors import InputError
from dynabert_fast.subnet import Subnet
from dynabert_fast.tree import SubnetTree


def subnet(*steps):
    """Of (layer, heads, neurons) for each kept layer."""
    return Subnet(*(tuple(values) for values in zip(*steps, strict=True)))


def path(one):
    """What a sub-network computes, from the first layer to the last."""
    return tuple(zip(one.layers, one.heads, one.neurons, strict=True))


def prefixes(subnets):
    """Each beginning that some of them have, the empty one too."""
    return {path(s)[:count] for s in subnets for count in range(len(s.layers) + 1)}


def uniform(layers, heads, neurons):
    return subnet(*((layer, heads, neurons) for layer in layers))


def run(tree):
    """Output 0 and that of each level, cut into pieces; then the rows at the ends.

    A row is the list of layers, with their extents, that it went through.
    """
    outputs = [[[()]]]

    def join(sources):
        return [row for output, piece in sources for row in outputs[output][piece]]

    for level in tree.levels:
        rows = join(level.sources)
        # One row for each node, or the extents would meet others' rows.
        assert len(rows) == len(level.heads) == len(level.neurons) == sum(level.pieces)
        own = zip([level.layer] * len(rows), level.heads, level.neurons, strict=True)
        rows = iter([(*row, step) for row, step in zip(rows, own, strict=True)])
        outputs.append([list(itertools.islice(rows, count)) for count in level.pieces])
    return outputs, join(tree.ends)


def check(subnets):
    """All that holds for every tree."""
    tree = SubnetTree(subnets)
    outputs, ends = run(tree)
    assert tree.subnets == tuple(subnets)
    assert [ends[i] for i in tree.order] == [path(s) for s in subnets]

    # Each layer is called once, and each beginning is computed once.
    assert [level.layer for level in tree.levels] == sorted({i for s in subnets for i in s.layers})
    rows = [row for output in outputs for piece in output for row in piece]
    assert len(rows) == len(set(rows)) == 1 + tree.nodes
    assert set(rows) == prefixes(subnets)
    assert len(ends) == len(set(ends)) == len({path(s) for s in subnets})
    assert all(count > 0 for level in tree.levels for count in level.pieces)

    # Hidden states: the input of each layer in the order of the calls, and the last ones.
    ways = [(source, level.layer) for level in tree.levels for source in level.sources]
    ways += [(source, None) for source in tree.ends]
    assert [(edge.source, edge.layer) for edge in tree.edges] == list(dict.fromkeys(ways))
    for edge in tree.edges:
        piece = outputs[edge.source[0]][edge.source[1]]
        assert len(edge.users) == len(piece)
        for row, users in zip(piece, edge.users, strict=True):
            going = [
                i
                for i, s in enumerate(subnets)
                if path(s)[: len(row)] == row and (*s.layers, None)[len(row)] == edge.layer
            ]
            assert list(users) == going
            assert going
    for i, s in enumerate(subnets):
        found = [edge.layer for edge in tree.edges for users in edge.users if i in users]
        assert found == [*s.layers, None]
    return tree


WIDE, NARROW = uniform(range(3), 4, 40), uniform(range(3), 2, 20)
CASES = {
    "one": [WIDE],
    "one layer": [subnet((0, 1, 1))],
    "two widths": [WIDE, NARROW],
    "narrow first": [NARROW, WIDE],
    "two depths": [WIDE, uniform((0, 2), 4, 40)],
    "shallow first": [uniform((0, 2), 4, 40), WIDE],
    "ends where another goes on": [WIDE, uniform((0,), 4, 40), uniform((0, 1), 4, 40)],
    "begins at a later layer": [uniform((2,), 4, 40), WIDE, uniform((1, 2), 2, 20)],
    "nobody keeps the first": [uniform((1, 3), 4, 40), uniform((3,), 4, 40)],
    "nothing in common": [uniform((0,), 4, 40), uniform((1,), 4, 40), uniform((2,), 4, 40)],
    "neurons alone differ": [uniform(range(3), 4, 40), uniform(range(3), 4, 20)],
    "extents that meet again": [
        subnet((0, 4, 40), (1, 2, 20), (2, 4, 40)),
        subnet((0, 4, 40), (1, 1, 10), (2, 4, 40)),
    ],
    "twice": [WIDE, NARROW, WIDE],
    "all the same": [NARROW, NARROW, NARROW],
    "every other node ends": [uniform((0, *more), h, h) for h in (3, 2, 1) for more in ((), (2,))]
    + [uniform((0, 1), 2, 2)],
    "grid": [
        uniform(layers, h, 10 * h)
        for layers in (range(6), (0, 1, 2, 4), (0, 2, 4))
        for h in (4, 3, 2, 1)
    ],
}


@pytest.mark.parametrize("subnets", CASES.values(), ids=CASES.keys())
def test_every_subnet_takes_its_own_way(subnets):
    check(subnets)


def draw(rng):
    """Sub-networks that often begin alike: of few layers, extents and beginnings."""
    extents = [(rng.randint(1, 3), rng.randint(1, 3)) for _ in range(rng.randint(1, 3))]
    total = rng.randint(1, 5)
    found = []
    for _ in range(rng.randint(1, 9)):
        old = path(rng.choice(found)) if found and rng.random() < 0.6 else ()
        steps = list(old[: rng.randint(0, len(old))])
        first = steps[-1][0] + 1 if steps else 0
        steps += [
            (layer, *rng.choice(extents)) for layer in range(first, total) if rng.random() < 0.6
        ]
        found.append(subnet(*(steps or [(rng.randrange(total), *rng.choice(extents))])))
    return found


@pytest.mark.parametrize("seed", range(100))
def test_random_subnets(seed):
    rng = random.Random(seed)
    subnets = draw(rng)
    tree = check(subnets)
    # The order given decides about the order of the results alone.
    mixed = rng.sample(subnets, len(subnets))
    again = SubnetTree(mixed)
    assert (again.levels, again.ends) == (tree.levels, tree.ends)


def test_the_papers_grid_needs_little_more_than_its_deepest():
    tree = check(CASES["grid"])
    # 12 sub-networks of 52 layers: layers 0, 1 and 2 of a width are shared by two depths or more.
    assert sum(len(s.layers) for s in tree.subnets) == 52
    assert [len(level.heads) for level in tree.levels] == [4, 4, 8, 4, 12, 4]
    assert tree.nodes == 36
    # All widths of a depth go on together; only the embeddings are copied one by one.
    assert [len(level.sources) for level in tree.levels] == [4, 1, 2, 1, 3, 1]
    assert [level.pieces for level in tree.levels] == [(4,), (4,), (4, 4), (4,), (8, 4), (4,)]
    # The widest is first: rows of a prefix of the weights stand together.
    assert tree.levels[0].heads == (4, 3, 2, 1)
    assert tree.levels[0].neurons == (40, 30, 20, 10)


def test_one_subnet_is_a_chain():
    tree = SubnetTree([NARROW])
    assert [level.sources for level in tree.levels] == [((0, 0),), ((1, 0),), ((2, 0),)]
    assert all(level.pieces == (1,) for level in tree.levels)
    assert (tree.ends, tree.order) == (((3, 0),), (0,))
    assert [(e.source, e.layer, e.users) for e in tree.edges] == [
        ((0, 0), 0, ((0,),)),
        ((1, 0), 1, ((0,),)),
        ((2, 0), 2, ((0,),)),
        ((3, 0), None, ((0,),)),
    ]


def test_neighbours_go_on_as_one_piece():
    """Rows that go the same way are neither cut nor joined."""
    tree = SubnetTree([uniform(range(3), h, h) for h in (1, 3, 2)])
    assert all(len(level.sources) == 1 for level in tree.levels[1:])
    assert all(level.pieces == (3,) for level in tree.levels)
    assert tree.order == (2, 0, 1)


def test_no_subnet():
    with pytest.raises(InputError, match="at least one sub-network, got none"):
        SubnetTree([])


def test_the_subnets_can_be_read_from_its_text():
    assert repr(SubnetTree([NARROW])) == f"SubnetTree([{NARROW!r}])"
