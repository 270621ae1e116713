"""Which sub-networks a step takes: a function of the seed and the step alone."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from dynabert_fast.errors import InputError
from dynabert_fast.models import DynaBertConfig
from dynabert_fast.subnet import Subnet, grid
from dynabert_fast.training import Schedule

CONFIG = DynaBertConfig(
    num_hidden_layers=6, num_attention_heads=4, intermediate_size=40, hidden_size=8
)
GRID = grid(CONFIG)
LARGEST, SMALLEST = GRID[0], GRID[-1]
# Not in the grid's order, of layers that are not all alike.
ODD = [
    Subnet.from_extents(CONFIG, (1, 4), (2, 4), (40, 3)),
    Subnet.from_extents(CONFIG, (0, 1, 4, 5), (4, 3, 1, 1), (7, 8, 9, 10)),
    Subnet.from_extents(CONFIG, (2,), (1,), (2,)),
    Subnet.from_extents(CONFIG, (0, 1, 2, 3), (4, 4, 4, 4), (40, 40, 40, 40)),
]
SETS = {"grid": GRID, "backwards": GRID[::-1], "odd": ODD, "one": [LARGEST]}


@pytest.fixture(params=SETS.values(), ids=SETS.keys())
def subnets(request):
    return request.param


@pytest.mark.parametrize("seed", [0, 7])
def test_grid_is_all_in_order(subnets, seed):
    for step in (0, 5):
        assert Schedule().choose(subnets, seed, step) == tuple(subnets)


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("kind", ["sandwich", "random"])
def test_the_ends_are_always_there(kind, count):
    for name, subnets in SETS.items():
        ends = {"odd": (ODD[3], ODD[2]), "one": (LARGEST,)}.get(name, (LARGEST, SMALLEST))
        for step in range(20):
            found = Schedule(kind, count).choose(subnets, 3, step)
            assert found[: len(ends)] == ends
            drawn = found[len(ends) :]
            most = len(subnets) - len(ends) if kind == "sandwich" else count
            assert len(drawn) == min(count, most)


def test_sandwich_draws_each_other_once_at_most_and_none_more_than_others():
    counts = Counter()
    for step in range(600):
        drawn = Schedule("sandwich", 4).choose(GRID, 1, step)[2:]
        assert len(set(drawn)) == 4
        assert not {LARGEST, SMALLEST} & set(drawn)
        assert all(s.width is not None for s in drawn)  # which choose their teachers
        counts.update(drawn)
    assert set(counts) == set(GRID[1:-1])
    assert all(170 < count < 310 for count in counts.values())  # 240 expected, deviation 12


def test_more_than_there_are():
    found = Schedule("sandwich", 100).choose(GRID, 1, 0)
    assert sorted(map(str, found)) == sorted(map(str, GRID))


def test_random_has_the_layers_of_one_and_the_widths_of_all(subnets):
    layers, widths, mixed = Counter(), Counter(), 0
    for step in range(200):
        for one in Schedule("random", 3).choose(subnets, 1, step)[-3:]:
            one.check(CONFIG)
            assert one.layers in {s.layers for s in subnets}
            widths.update(zip(one.layers, one.heads, one.neurons, strict=True))
            layers[one.layers] += 1
            mixed += len(set(one.heads)) > 1
    assert set(layers) == {s.layers for s in subnets}
    assert set(widths) == {
        own for s in subnets for own in zip(s.layers, s.heads, s.neurons, strict=True)
    }
    assert mixed > 300 or len(subnets) == 1


@pytest.mark.parametrize("kind", ["sandwich", "random"])
def test_a_step_is_drawn_from_its_number_alone(kind):
    """So a resumed run goes on as it would have, and every process draws the same."""
    schedule = Schedule(kind, 3)
    want = [schedule.choose(GRID, 42, step) for step in range(30)]
    random.seed(0)
    for step in (17, 3, 29, 0):
        random.random()
        assert Schedule(kind, 3).choose(list(GRID), 42, step) == want[step]
    assert len(set(want)) > 25
    assert [schedule.choose(GRID, 43, step) for step in range(30)] != want
    state = random.getstate()
    schedule.choose(GRID, 42, 1)
    assert random.getstate() == state  # others' numbers are left alone


def test_draws_do_not_change_with_the_version():
    """A checkpoint may be resumed by a later one."""
    found = Schedule("sandwich", 3).choose(GRID, 42, 5)
    assert [str(s) for s in found] == [
        *("w1.00-d1.00", "w0.25-d0.50"),
        *("w0.50-d0.75", "w1.00-d0.50", "w0.25-d1.00"),
    ]
    found = Schedule("random", 1).choose(GRID, 42, 5)
    assert found[-1].heads == (2, 1, 2, 3)


@pytest.mark.parametrize(
    ("kind", "count", "message"),
    [
        ("all", 2, "must be one of grid, sandwich, random, got 'all'"),
        ("sandwich", -1, "draws 0 or more sub-networks, got -1"),
    ],
)
def test_bad_schedules_are_refused(kind, count, message):
    with pytest.raises(InputError, match=message):
        Schedule(kind, count)
