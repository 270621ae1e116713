from __future__ import annotations

import pytest

from dynabert_fast.subnet import Subnet

# Widths and depths of the grid, and layers that differ; for 4 layers of 4 heads and 40 neurons.
SUBNETS = {
    "w1.00-d1.00": lambda c: Subnet.full(c),
    "w0.75-d0.75": lambda c: Subnet.from_multipliers(c, 0.75, 0.75),
    "w0.25-d1.00": lambda c: Subnet.from_multipliers(c, 0.25),
    "w0.50-d0.50": lambda c: Subnet.from_multipliers(c, 0.5, 0.5),
    "mixed": lambda c: Subnet.from_extents(c, (0, 2, 3), (3, 1, 4), (7, 40, 1)),
    "last layer": lambda c: Subnet.from_extents(c, (3,), (2,), (13,)),
}


@pytest.fixture(params=SUBNETS.values(), ids=SUBNETS.keys())
def subnet_of(request):
    """`subnet_of(config)`: each of the sub-networks above."""
    return request.param
