"""The paper's rule, names that read back, one clear sentence for everything that does not fit."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass

import numpy as np
import pytest

from dynabert_fast.errors import InputError
from dynabert_fast.subnet import DEPTHS, WIDTHS, Subnet, grid


@dataclass
class Config:
    layer_heads: list[int]
    layer_neurons: list[int]


def uniform(layers: int = 12, heads: int = 12, neurons: int = 3072) -> Config:
    return Config([heads] * layers, [neurons] * layers)


BERT = uniform()
MIXED = Config([12, 4, 8], [100, 40, 64])


@pytest.mark.parametrize(
    ("total", "width", "heads", "neurons"),
    [
        (12, 1.0, 12, 3072),
        (12, 0.75, 9, 2304),
        (12, 0.5, 6, 1536),
        (12, 0.25, 3, 768),
        (12, 0.375, 4, 1024),  # 4.5 rounds to even, down
        (12, 0.625, 8, 2048),  # 7.5 rounds to even, up
        (12, 0.125, 2, 512),
        (12, 0.05, 1, 256),
        (16, 0.25, 4, 768),
        (4, 0.625, 2, 1536),
        (6, 0.25, 2, 1024),  # the neurons follow the heads' grid: 2/6, not 0.25
    ],
)
def test_width_rounds_heads_half_to_even_and_neurons_follow(total, width, heads, neurons):
    subnet = Subnet.from_multipliers(uniform(2, total), width)
    assert (subnet.heads, subnet.neurons) == ((heads,) * 2, (neurons,) * 2)


@pytest.mark.parametrize(
    ("total", "depth", "layers"),
    [
        (12, 1.0, tuple(range(12))),
        (12, 0.75, (0, 1, 2, 4, 5, 6, 8, 9, 10)),
        (12, 0.5, (0, 2, 4, 6, 8, 10)),
        (12, 0.25, (0, 4, 8)),
        (6, 0.75, (0, 1, 2, 4)),  # 4.5 layers rounds to even
        (6, 0.5, (0, 2, 4)),
        (4, 0.5, (0, 2)),
        (3, 0.34, (0,)),
        (1, 1.0, (0,)),
    ],
)
def test_depth_keeps_layers_of_the_rule(total, depth, layers):
    assert Subnet.from_multipliers(uniform(total), depth=depth).layers == layers


def test_every_depth_keeps_ascending_layers_in_range():
    for total in (1, 2, 3, 5, 6, 12, 24, 48):
        for percent in range(1, 101):
            if round(percent / 100 * total):
                Subnet.from_multipliers(uniform(total), depth=percent / 100).check(uniform(total))


def test_layers_of_unlike_widths_are_cut_each_by_the_rule():
    subnet = Subnet.from_multipliers(MIXED, width=0.5)
    assert (subnet.heads, subnet.neurons) == ((6, 2, 4), (50, 20, 32))
    assert Subnet.full(MIXED).heads == (12, 4, 8)
    assert Subnet.full(MIXED).neurons == (100, 40, 64)


@pytest.mark.parametrize(
    ("subnet", "name"),
    [
        (Subnet.full(BERT), "w1.00-d1.00"),
        (Subnet.from_multipliers(BERT, 0.5, 0.75), "w0.50-d0.75"),
        (Subnet.from_multipliers(BERT, 0.375, 0.5), "w0.375-d0.50"),
        (Subnet.from_multipliers(BERT, 1, 1), "w1.00-d1.00"),
        (Subnet.from_extents(BERT, [0, 2], [12, 6], [3072, 768]), "l0+2-h12+6-n3072+768"),
        (Subnet.from_extents(BERT, [11], [1], [1]), "l11-h1-n1"),
    ],
    ids=str,
)
def test_name_reads_back(subnet, name):
    assert str(subnet) == repr(subnet) == name
    again = Subnet.parse(BERT, name)
    assert again == subnet
    assert str(again) == name


def test_equal_extents_are_equal_and_hash_alike_whatever_built_them():
    rule = Subnet.from_multipliers(BERT, 0.5, 0.5)
    explicit = Subnet.from_extents(BERT, rule.layers, rule.heads, rule.neurons)
    assert rule == explicit
    assert hash(rule) == hash(explicit)
    assert (rule.width, rule.depth) == (0.5, 0.5)
    assert (explicit.width, explicit.depth) == (None, None)
    assert rule != Subnet.from_multipliers(BERT, 0.25, 0.5)
    assert len({rule, explicit, Subnet.full(BERT)}) == 2


def test_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Subnet.full(BERT).width = 0.5


def test_integers_of_any_kind_are_one_key():
    plain = Subnet((0, 1), (2, 3), (4, 5))
    for given in (np.arange, lambda a, b: list(range(a, b))):
        assert Subnet(given(0, 2), given(2, 4), given(4, 6)) == plain
        assert hash(Subnet(given(0, 2), given(2, 4), given(4, 6))) == hash(plain)
    for bad in ([1.0], 1, ["1"], None):
        with pytest.raises(InputError, match="heads of a sub-network must be a sequence of int"):
            Subnet((0,), bad, (1,))


def test_lists_become_tuples():
    subnet = Subnet.from_extents(BERT, [0], [1], [2])
    assert (subnet.layers, subnet.heads, subnet.neurons) == ((0,), (1,), (2,))


def test_grid_is_depth_outer_width_inner_descending():
    names = [str(s) for s in grid(BERT)]
    assert names == [f"w{w:.2f}-d{d:.2f}" for d in (1, 0.75, 0.5) for w in (1, 0.75, 0.5, 0.25)]
    assert (WIDTHS, DEPTHS) == ((1.0, 0.75, 0.5, 0.25), (1.0, 0.75, 0.5))


@pytest.mark.parametrize(
    ("config", "widths", "depths"),
    [
        (uniform(2, 2, 64), (1, 0.75, 0.5), (1, 0.75, 0.5)),
        (uniform(2, 1, 64), (1, 0.75), (1, 0.75, 0.5)),
        (uniform(1, 4, 64), (1, 0.75, 0.5, 0.25), (1, 0.75)),
        (uniform(4, 4, 3), (1, 0.75, 0.5), (1, 0.75, 0.5)),
        (Config([4, 2], [64, 64]), (1, 0.75, 0.5), (1, 0.75, 0.5)),
    ],
    ids=["two heads", "one head", "one layer", "three neurons", "one layer of two heads"],
)
def test_the_default_grid_is_what_fits_of_the_papers(config, widths, depths):
    assert list(map(str, grid(config))) == list(map(str, grid(config, widths, depths)))
    assert {s.depth for s in grid(config, widths=(1,))} == set(depths)
    assert {s.width for s in grid(config, depths=(1,))} == set(widths)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"widths": WIDTHS}, "width must keep 1 to 1 heads, got 0.5 (0 heads); choose widths"),
        ({"depths": DEPTHS}, "depth must keep 1 to 1 layers, got 0.5 (0 layers); choose depths"),
    ],
)
def test_multipliers_that_are_given_must_fit(given, message):
    with pytest.raises(InputError) as error:
        grid(uniform(1, 1, 64), **given)
    assert message in str(error.value)


def test_grid_sorts_and_drops_duplicates():
    names = [str(s) for s in grid(BERT, widths=(0.5, 1, 0.5), depths=(0.5, 0.75))]
    assert names == ["w1.00-d0.75", "w0.50-d0.75", "w1.00-d0.50", "w0.50-d0.50"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Subnet.from_multipliers(BERT, 0.0), "width must be in (0, 1], got 0.0"),
        (lambda: Subnet.from_multipliers(BERT, -0.5), "width must be in (0, 1], got -0.5"),
        (lambda: Subnet.from_multipliers(BERT, 1.01), "width must be in (0, 1], got 1.01"),
        (lambda: Subnet.from_multipliers(BERT, float("nan")), "width must be in (0, 1], got nan"),
        (
            lambda: Subnet.from_multipliers(BERT, "0.5"),
            "width must be a number in (0, 1], got str",
        ),
        (
            lambda: Subnet.from_multipliers(BERT, 1, None),
            "depth must be a number in (0, 1], got NoneType",
        ),
        (
            lambda: Subnet.from_multipliers(BERT, np.ones(99)),
            "width must be a number in (0, 1], got ndarray",
        ),
        (lambda: Subnet.from_multipliers(BERT, 1, 0), "depth must be in (0, 1], got 0"),
        (lambda: Subnet.from_multipliers(BERT, 1, 2), "depth must be in (0, 1], got 2"),
        (
            lambda: Subnet.from_multipliers(BERT, 0.02),
            "width must keep 1 to 12 heads, got 0.02 (0 heads)",
        ),
        (
            lambda: Subnet.from_multipliers(BERT, 1, 0.04),
            "depth must keep 1 to 12 layers, got 0.04 (0 layers)",
        ),
        (
            lambda: Subnet.from_multipliers(uniform(neurons=3), 0.25),
            "width must keep 1 to 3 neurons, got 0.25 (0 neurons)",
        ),
        (
            lambda: Subnet.from_extents(BERT, 0, 4, 64),
            "layers of a sub-network must be a sequence of integers, got 0",
        ),
        (
            lambda: Subnet.from_extents(BERT, [0], [4], None),
            "neurons of a sub-network must be a sequence of integers, got None",
        ),
        (
            lambda: Subnet.from_extents(BERT, [0, 1], [12], [3072, 3072]),
            "heads and neurons for each; got 2 layers, 1 heads, 2 neurons",
        ),
        (lambda: Subnet.from_extents(BERT, [], [], []), "one layer or more"),
        (
            lambda: Subnet.from_extents(BERT, [1, 1], [1, 1], [1, 1]),
            "layers must be strictly ascending, got [1, 1]",
        ),
        (
            lambda: Subnet.from_extents(BERT, [2, 1], [1, 1], [1, 1]),
            "layers must be strictly ascending, got [2, 1]",
        ),
        (lambda: Subnet.from_extents(BERT, [12], [1], [1]), "layers must be in 0 to 11, got 12"),
        (lambda: Subnet.from_extents(BERT, [-1], [1], [1]), "layers must be in 0 to 11, got -1"),
        (
            lambda: Subnet.from_extents(MIXED, [1], [5], [1]),
            "heads of layer 1 must be in 1 to 4, got 5",
        ),
        (
            lambda: Subnet.from_extents(MIXED, [2], [0], [1]),
            "heads of layer 2 must be in 1 to 8, got 0",
        ),
        (
            lambda: Subnet.from_extents(MIXED, [0], [1], [101]),
            "neurons of layer 0 must be in 1 to 100, got 101",
        ),
        (lambda: Subnet.parse(BERT, "half"), "written like w0.50-d0.75"),
        (lambda: Subnet.parse(BERT, "w0.5"), "got 'w0.5'"),
        (lambda: Subnet.parse(BERT, "w0.50-d0.75 "), "got 'w0.50-d0.75 '"),
        (lambda: Subnet.parse(BERT, "l0-h1"), "got 'l0-h1'"),
        (lambda: Subnet.parse(BERT, "w0.01-d1.00"), "got 0.01 (0 heads)"),
        (lambda: Subnet.parse(BERT, "l0+1-h1-n1+1"), "got 2 layers, 1 heads, 2 neurons"),
        (lambda: grid(BERT, widths=()), "at least one width and one depth"),
        (lambda: grid(BERT, depths=()), "at least one width and one depth"),
        (lambda: grid(BERT, widths=(1, 0.02)), "got 0.02 (0 heads)"),
    ],
)
def test_what_does_not_fit_is_one_clear_sentence(build, message):
    with pytest.raises(InputError) as error:
        build()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_check_refuses_a_subnet_of_another_model():
    with pytest.raises(InputError, match="heads of layer 0 must be in 1 to 4, got 12"):
        Subnet.full(BERT).check(uniform(heads=4))


def test_is_a_leaf_without_torch():
    code = "import sys, dynabert_fast.subnet; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
