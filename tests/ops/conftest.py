"""Row-block cases and the judge that the tests of all ops share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

#: The `K` that `ROW_BLOCKS` fit; prime, as is every other size of these tests.
MOST = 11


@dataclass(frozen=True)
class RowBlocks:
    """Extents of row blocks, as arguments of an op and as a mask."""

    extent: int | tuple[int, ...]
    rows: tuple[int, ...] | None
    total: int

    @property
    def largest(self) -> int:
        return self.extent if isinstance(self.extent, int) else max(self.extent)

    def active(self, columns: int) -> Tensor:
        """`[T, columns]`: whether a column is within its row's extent."""
        if self.rows is None:
            extents = torch.full((self.total,), self.extent)
        else:
            extents = torch.tensor(self.extent).repeat_interleave(torch.tensor(self.rows))
        return torch.arange(columns) < extents[:, None]


ROW_BLOCKS = {
    "one extent": RowBlocks(5, None, 7),
    "full": RowBlocks(MOST, None, 7),
    "one column": RowBlocks(1, None, 7),
    "one token": RowBlocks(3, None, 1),
    "no token": RowBlocks(5, None, 0),
    "staircase": RowBlocks((11, 7, 3, 1), (3, 2, 5, 3), 13),
    "staircase below K": RowBlocks((7, 2), (2, 3), 5),
    "zero-row blocks": RowBlocks((11, 5, 5, 2), (0, 4, 0, 3), 7),
    "ascending": RowBlocks((2, 11), (3, 4), 7),
    "one block in a list": RowBlocks((4,), (7,), 7),
    "no token in any block": RowBlocks((4, 2), (0, 0), 0),
}


@pytest.fixture(autouse=True)
def nan_in_new_memory():
    """What an op allocates and does not write is NaN, not a zero that happened to be there."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=ROW_BLOCKS.values(), ids=ROW_BLOCKS.keys())
def blocks(request) -> RowBlocks:
    return request.param


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16], ids=str)
def dtype(request) -> torch.dtype:
    return request.param


@dataclass
class Judge:
    """Error at most twice that of plain torch in the same type, against plain torch in float64.

    `ours` and `plain` are functions of the same tensors, given in float64 and cast to `dtype`.
    `plain` must not depend on what `ours` may not read. `poison` maps an input's index to a mask of
    entries that are NaN for `ours` and 0 for `plain`; `active` masks the specified part of the
    output, beyond which the incoming gradient is NaN.
    """

    dtype: torch.dtype

    def __call__(
        self,
        ours: Callable[..., Tensor],
        plain: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        active: Tensor | None = None,
        poison: dict[int, Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """Compare the output and every gradient; returns the gradients of `ours`."""
        poison = poison or {}
        rounded = [t.to(self.dtype) for t in inputs]
        zeroed = [t.masked_fill(poison[i], 0) if i in poison else t for i, t in enumerate(rounded)]
        poisoned = [
            t.masked_fill(poison[i], float("nan")) if i in poison else t
            for i, t in enumerate(rounded)
        ]
        truth = _run(plain, [t.double() for t in zeroed], active, 0.0)
        same_type = _run(plain, zeroed, active, 0.0)
        got = _run(ours, poisoned, active, float("nan"))
        assert got[0].dtype == same_type[0].dtype
        for i, (g, s, t) in enumerate(zip(got, same_type, truth, strict=True)):
            what = "output" if i == 0 else f"gradient of input {i - 1}"
            assert g.shape == t.shape, what
            assert g.dtype == s.dtype, what
            if t.numel():
                self._compare(g.double(), s.double(), t, what)
        return got[1:]

    def _compare(self, got: Tensor, same_type: Tensor, truth: Tensor, what: str) -> None:
        assert got.isfinite().all(), f"{what} is not finite"
        # A few units in the last place. Float64 has no better judge: there, of its rounding errors.
        ulps = 100 if self.dtype == torch.float64 else 2
        slack = ulps * torch.finfo(self.dtype).eps * truth.abs().max()
        error, allowed = (x.sub(truth).abs().max() for x in (got, same_type))
        assert error <= 2 * allowed + slack, f"{what}: error {error:.2e}, torch's {allowed:.2e}"


def _run(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], active: Tensor | None, beyond: float
) -> list[Tensor]:
    """Output and gradients under a fixed incoming gradient, the output zeroed where unspecified."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    detached = out.detach()
    if active is not None:
        grad, detached = grad.masked_fill(~active, beyond), detached.masked_fill(~active, 0)
    return [detached, *torch.autograd.grad(out, leaves, grad)]


@pytest.fixture
def judge(dtype) -> Judge:
    return Judge(dtype)


@pytest.fixture
def randn() -> Callable[..., Tensor]:
    """Float64 noise from a fixed seed; each call goes on in the stream."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def seed() -> Tensor:
    return torch.tensor(0x1234_5678_9ABC_DEF0)
