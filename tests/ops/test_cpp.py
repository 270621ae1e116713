"""The C++ backend at sizes where its blocks matter: 6 rows, 64 columns, 96 queries; its threads and
instruction sets; the memory it reads; and that it computes with the weights of now.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dynabert_fast import ops
from dynabert_fast.engine import isas
from dynabert_fast.engine.native import ISA_VARIABLE
from dynabert_fast.ops import cpp
from dynabert_fast.ops.reference import keep_mask

EPS, P = 1e-5, 0.3
SEED = torch.tensor(0x1234_5678_9ABC_DEF0)
ACTIVATIONS = {
    "": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
LOSSES = ("soft_cross_entropy", "hidden_mse")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request) -> torch.dtype:
    return request.param


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- cases: one call of an op each, what plain torch makes of it, and what may be read ------------


@dataclass(frozen=True)
class Case:
    """A call as functions of its float tensors; `active` and `poison` are as for the judge."""

    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    active: Tensor | None = None
    poison: dict[int, Tensor] = field(default_factory=dict)

    def values(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(s, generator=generator, dtype=torch.float64) for s in self.shapes]

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """What no op may read is NaN."""
        nowhere = torch.tensor(False)
        return [
            t.to(dtype).masked_fill(self.poison.get(i, nowhere), float("nan"))
            for i, t in enumerate(self.values())
        ]

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Output, 0 where unspecified, and every gradient."""
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = self.ours(*leaves)
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(out.shape, generator=generator).to(out.dtype)
        grads = torch.autograd.grad(out, leaves, grad)
        active = torch.tensor(True) if self.active is None else self.active
        return [out.detach().masked_fill(~active, 0), *grads]


def on_cpp(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same call, which no other backend may serve; its backward neither."""

    def run(*inputs: Tensor) -> Tensor:
        with ops.use_backend("cpp"):
            return call(*inputs)

    return run


def reach(total: int, columns: int, extent: int | Sequence[int], rows: Sequence[int] | None):
    """`[T, columns]`: whether a column is within its row's extent."""
    if rows is None:
        extents = torch.full((total,), extent)
    else:
        extents = torch.tensor(extent).repeat_interleave(torch.tensor(rows))
    return torch.arange(columns) < extents[:, None]


def largest(extent: int | Sequence[int]) -> int:
    return extent if isinstance(extent, int) else max(extent)


def expand_case(total, hidden, most, extent, rows=None, activation="gelu"):
    k = largest(extent)
    beyond = torch.arange(most) >= k

    def plain(x, weight, bias):
        return ACTIVATIONS[activation](F.linear(x, weight[:k], bias[:k]))

    return Case(
        on_cpp(lambda x, weight, bias: ops.expand(x, weight, bias, extent, rows, activation)),
        plain,
        ((total, hidden), (most, hidden), (most,)),
        reach(total, k, extent, rows),
        {1: beyond[:, None].expand(most, hidden), 2: beyond},
    )


def contract_case(total, hidden, most, extent, rows=None, spare=0):
    k = largest(extent)
    active = reach(total, k + spare, extent, rows)
    return Case(
        on_cpp(lambda x, weight_t, bias: ops.contract(x, weight_t, bias, extent, rows)),
        lambda x, weight_t, bias: torch.addmm(bias, x.masked_fill(~active, 0)[:, :k], weight_t[:k]),
        ((total, k + spare), (most, hidden), (hidden,)),
        None,
        {0: ~active, 1: (torch.arange(most) >= k)[:, None].expand(most, hidden)},
    )


def attention_case(lengths, head_size, most, heads, sequences=None, p=0.0):
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    blocks = [heads] if sequences is None else heads
    counts = [len(lengths)] if sequences is None else sequences
    spans, at = [], 0  # of each sequence: first row, length, heads, first row in its block
    for h, count in zip(blocks, counts, strict=True):
        bounds = offsets[at : at + count + 1].tolist()
        spans += [(a, b - a, h, a - bounds[0]) for a, b in itertools.pairwise(bounds)]
        at += count
    total, width = sum(lengths), max(blocks) * head_size
    per_row = [h for _, _, h, _ in spans]

    def ours(qkv):
        longest = max(lengths)
        return ops.attention(qkv, offsets, longest, head_size, heads, sequences, p, SEED)

    def plain(qkv):
        pieces = []
        for start, length, h, first in spans:
            rows = qkv[start : start + length, : h * 3 * head_size]
            q, k, v = rows.unflatten(1, (h, 3, head_size)).permute(2, 1, 0, 3)
            if p:
                mask_rows = torch.arange(first, first + length)[:, None]
                columns = (torch.arange(h) << 16)[:, None, None] + torch.arange(length)
                keep = keep_mask(SEED, mask_rows, columns, p).to(qkv.dtype) / (1 - p)
                context = ((q @ k.mT * head_size**-0.5).softmax(-1) * keep) @ v
            else:
                context = F.scaled_dot_product_attention(q, k, v)
            context = context.transpose(0, 1).flatten(1)
            pieces.append(F.pad(context, (0, width - h * head_size)))
        return torch.cat(pieces)

    columns = most * 3 * head_size
    return Case(
        on_cpp(ours),
        plain,
        ((total, columns),),
        reach(total, width, [h * head_size for h in per_row], lengths),
        {0: ~reach(total, columns, [h * 3 * head_size for h in per_row], lengths)},
    )


def kept(total, hidden, p):
    """Dropout's mask of a `[T, D]`, scaled."""
    if not p:
        return torch.ones(())
    return keep_mask(SEED, torch.arange(total)[:, None], torch.arange(hidden), p) / (1 - p)


def norm_case(total, hidden, p=0.0):
    mask = kept(total, hidden, p)

    def plain(x, residual, weight, bias):
        return F.layer_norm(x * mask.to(x.dtype) + residual, [hidden], weight, bias, EPS)

    shapes = (total, hidden), (total, hidden), (hidden,), (hidden,)
    return Case(on_cpp(lambda *t: ops.residual_norm(*t, EPS, p, SEED)), plain, shapes)


def embed_case(total, hidden, p=0.0, vocabulary=53):
    """Every word is looked up several times where there are tokens enough."""
    generator = torch.Generator().manual_seed(2)
    sizes = vocabulary, 2, max(total, 5)
    ids = [torch.randint(0, size, (total,), generator=generator) for size in sizes]
    mask = kept(total, hidden, p)

    def plain(word, token_type, position, weight, bias):
        tables = word, token_type, position
        z = sum(F.embedding(i, table) for i, table in zip(ids, tables, strict=True))
        return F.layer_norm(z, [hidden], weight, bias, EPS) * mask.to(z.dtype)

    shapes = *((size, hidden) for size in sizes), (hidden,), (hidden,)
    return Case(on_cpp(lambda *t: ops.embed(*ids, *t, EPS, p, SEED)), plain, shapes)


def loss_case(name, *shape):
    """By whichever backend serves."""
    teacher = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(3)).double()

    def plain(student):
        wide = torch.promote_types(student.dtype, torch.float32)
        target, student = teacher.to(student.dtype).to(wide), student.to(wide)
        if name == "hidden_mse":
            return F.mse_loss(student, target)
        return F.cross_entropy(student, target.softmax(-1))

    op = getattr(ops, name)
    return Case(lambda student: op(student, teacher.to(student.dtype)), plain, (shape,))


def table(make, sizes, **choices):
    """A case for each tuple of arguments and each choice of the named ones."""
    return {
        f"{make.__name__} {size} {' '.join(map(str, chosen))}": partial(
            make, *size, **dict(zip(choices, chosen, strict=True))
        )
        for size in sizes
        for chosen in itertools.product(*choices.values())
    }


TOKENS, HIDDEN = (1, 2, 37, 200), (64, 67, 130)
# Of one extent: tokens, hidden size, K, extent. Then with the rows of each block.
PRODUCTS = [
    (1, 64, 200, 200),
    (1, 67, 65, 64),
    (2, 130, 130, 129),
    (37, 67, 200, 65),
    (200, 64, 64, 63),
    (200, 130, 200, 1),
    (200, 67, 200, (200, 129, 64, 1), (63, 65, 1, 71)),
    (37, 130, 130, (3, 130), (20, 17)),
    (200, 64, 130, (130, 66, 65), (0, 200, 0)),
]
# Lengths, head size, heads stored, heads used, sequences of each block.
ATTENTION = [
    *(
        (lengths, head_size, 3, 2)
        for lengths in ((1,), (63,), (65, 1), (130, 2), (200, 63, 1, 97))
        for head_size in (16, 32, 64, 17)
    ),
    ((130, 63, 1, 65), 17, 3, (3, 1), (1, 3)),
    ((63, 200, 65, 1), 32, 4, (4, 3, 2, 1), (1, 1, 0, 2)),
]
LOSSES = [
    (name, *shape)
    for name in ("soft_cross_entropy", "hidden_mse")
    for shape in ((1, 1), (37, 130), (200, 3))
]
CASES = {
    **table(expand_case, PRODUCTS, activation=ACTIVATIONS),
    **table(contract_case, PRODUCTS, spare=(0, 3)),
    **table(attention_case, ATTENTION, p=(0.0, P)),
    **table(norm_case, itertools.product(TOKENS, HIDDEN), p=(0.0, P)),
    **table(embed_case, itertools.product(TOKENS, HIDDEN), p=(0.0, P)),
    **table(loss_case, LOSSES),
}
STAIRS = (200, 129, 64, 1), (33, 31, 1, 32)
# One of each kind, for what is asked of all of them.
FEW = {
    "expand": partial(expand_case, 37, 67, 200, 129),
    "expand staircase": partial(expand_case, 97, 64, 200, *STAIRS, activation="gelu_tanh"),
    "expand relu": partial(expand_case, 7, 130, 65, 65, activation="relu"),
    "contract": partial(contract_case, 37, 130, 200, 129, spare=3),
    "contract staircase": partial(contract_case, 97, 67, 200, *STAIRS),
    "attention": partial(attention_case, (130, 1, 65), 64, 3, 2),
    "attention staircase": partial(attention_case, (130, 1, 65), 17, 3, (3, 1), (1, 2), p=P),
    "residual_norm": partial(norm_case, 97, 67, p=P),
    "embed": partial(embed_case, 97, 67, p=P),
    "soft_cross_entropy": partial(loss_case, "soft_cross_entropy", 97, 65),
    "hidden_mse": partial(loss_case, "hidden_mse", 97, 67),
}


@pytest.fixture(params=FEW)
def case(request) -> Case:
    return FEW[request.param]()


def assert_same_bits(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        what = f"gradient of input {i - 1}" if i else "output"
        assert (g.dtype, g.shape) == (w.dtype, w.shape), what
        assert g.isfinite().all(), f"{what} is not finite"
        assert torch.equal(g, w), f"{what} differs by {(g - w).abs().max():.2e}"


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_torch(judge, name):
    case = CASES[name]()
    judge(case.ours, case.plain, case.values(), case.active, case.poison)


@pytest.mark.parametrize("isa", isas())
def test_every_instruction_set_agrees_with_torch(judge, monkeypatch, case, isa):
    monkeypatch.setenv(ISA_VARIABLE, isa)
    judge(case.ours, case.plain, case.values(), case.active, case.poison)


def test_the_instruction_set_is_read_at_every_call(monkeypatch):
    case = FEW["expand"]()
    case.run(case.inputs(torch.float32))
    monkeypatch.setenv(ISA_VARIABLE, "sse2")
    with pytest.raises(ValueError, match=f"one of {', '.join(isas())} .* got sse2"):
        case.run(case.inputs(torch.float32))


# --- bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", isas())
def test_any_number_of_threads_and_any_repetition_give_the_same_bits(monkeypatch, case, dtype, isa):
    monkeypatch.setenv(ISA_VARIABLE, isa)
    inputs = case.inputs(dtype)
    with threads(1):
        want = case.run(inputs)
    for count in (1, 2, 3, 5, 2):
        with threads(count):
            assert_same_bits(case.run(inputs), want)


def test_recording_for_gradients_changes_no_bit(case, dtype):
    inputs = case.inputs(dtype)
    (want, *_) = case.run(inputs)
    active = torch.tensor(True) if case.active is None else case.active
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_same_bits([case.ours(*inputs).masked_fill(~active, 0)], [want])


def parts_of(total: int) -> Iterator[slice]:
    """Single rows and runs of rows, at the edges of tiles and not."""
    for first, count in ((0, 1), (5, 1), (6, 2), (64, 1), (61, 7), (90, total - 90)):
        yield slice(first, first + count)


@pytest.mark.parametrize("k", [1, 64, 129, 200])
@pytest.mark.parametrize("op", ["expand", "contract"])
def test_a_row_does_not_depend_on_its_mates(randn, dtype, op, k):
    call = on_cpp(partial(ops.expand, activation="gelu") if op == "expand" else ops.contract)
    x, weight, bias = (
        t.to(dtype)
        for t in (
            (randn(97, 67), randn(200, 67), randn(200))
            if op == "expand"
            else (randn(97, 200), randn(200, 67), randn(67))
        )
    )
    whole = call(x, weight, bias, k)
    for rows in parts_of(97):
        assert_same_bits([call(x[rows], weight, bias, k)], [whole[rows]])
        # Beside rows of other extents, wider and narrower.
        mates = [200, k, 3], [rows.start, rows.stop - rows.start, 97 - rows.stop]
        assert_same_bits([call(x, weight, bias, *mates)[rows, : whole.shape[1]]], [whole[rows]])


@pytest.mark.parametrize("head_size", [17, 64])
def test_a_sequence_does_not_depend_on_its_mates(randn, dtype, head_size):
    lengths = 1, 130, 2, 63, 97
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    qkv = randn(sum(lengths), 3 * 3 * head_size).to(dtype)
    call = on_cpp(ops.attention)
    whole = call(qkv, offsets, 130, head_size, 2)
    stairs = call(qkv, offsets, 130, head_size, (3, 2, 1), (1, 3, 1))
    for b, length in enumerate(lengths):
        rows = slice(offsets[b], offsets[b + 1])
        alone = call(qkv[rows], torch.tensor([0, length]), length, head_size, 2)
        assert_same_bits([alone], [whole[rows]])
        if 1 <= b <= 3:
            assert_same_bits([stairs[rows, : 2 * head_size]], [alone])


def test_a_normalised_row_does_not_depend_on_its_mates(randn, dtype):
    x, residual = randn(97, 67).to(dtype), randn(97, 67).to(dtype)
    weight, bias = randn(67).to(dtype), randn(67).to(dtype)
    call = on_cpp(ops.residual_norm)
    whole = call(x, residual, weight, bias, EPS)
    for rows in parts_of(97):
        assert_same_bits([call(x[rows], residual[rows], weight, bias, EPS)], [whole[rows]])


# --- memory ---------------------------------------------------------------------------------------


def _within(t: Tensor) -> Tensor:
    """A prefix of something longer and wider."""
    place = tuple(slice(0, n) for n in t.shape)
    around = t.new_full([n + 5 for n in t.shape], float("nan"))
    around[place] = t
    return around[place]


def _across(t: Tensor) -> Tensor:
    """Neighbours in a row are not neighbours in memory."""
    return (
        t.t().contiguous().t() if t.dim() == 2 else torch.stack((t, t.mul(float("nan"))), 1)[:, 0]
    )


def _at_an_odd_place(t: Tensor) -> Tensor:
    around = t.new_full((t.numel() + 2,), float("nan"))
    around[1:-1] = t.flatten()
    return around[1:-1].view(t.shape)


def _every_other_row(t: Tensor) -> Tensor:
    around = t.new_full((2 * t.shape[0], *t.shape[1:]), float("nan"))
    around[::2] = t
    return around[::2]


@pytest.mark.parametrize("view", [_within, _across, _at_an_odd_place, _every_other_row])
def test_views_are_read_as_their_copies(case, dtype, view):
    inputs = case.inputs(dtype)
    want = case.run(inputs)
    for i, t in enumerate(inputs):
        seen = view(t)
        assert seen.shape == t.shape
        assert_same_bits(case.run([*inputs[:i], seen, *inputs[i + 1 :]]), want)
    assert_same_bits(case.run([view(t) for t in inputs]), want)


@pytest.mark.parametrize("name", ["expand", "contract", "residual_norm"])
def test_one_row_repeated_without_memory_of_its_own(dtype, name):
    case = FEW[name]()
    x, *rest = case.inputs(dtype)
    rows = x[:1].expand_as(x)
    assert_same_bits(case.run([rows, *rest]), case.run([rows.contiguous(), *rest]))


@pytest.mark.parametrize("name", ["expand", "contract", "attention", "residual_norm", "embed"])
def test_an_incoming_gradient_may_be_a_view(dtype, name):
    case = FEW[name]()
    leaves = [t.requires_grad_() for t in case.inputs(dtype)]
    out = case.ours(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    want = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    for view in (_within, _across, _at_an_odd_place):
        got = torch.autograd.grad(out, leaves, view(grad), retain_graph=True)
        assert_same_bits([out, *got], [out, *want])
    summed = torch.autograd.grad(out.sum(), leaves, retain_graph=True)  # one number, expanded
    ones = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert_same_bits([out, *summed], [out, *ones])


@pytest.mark.xfail(reason="they take torch's default type")
def test_row_statistics_are_float32_whatever_torchs_default_is():
    """The native code writes floats: half a type's memory would overflow."""
    x, weight = torch.ones(5, 12), torch.ones(12)
    offsets, before = torch.tensor([0, 2, 5]), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        statistics = [
            *cpp.residual_norm(x, x, weight, weight, EPS, 0.0, None)[2:],
            *cpp.embed(*[torch.arange(5)] * 3, x, x, x, weight, weight, EPS, 0.0, None)[2:],
            cpp.attention(x, offsets, 3, [1], [2], 4, 0.0, None)[1],
            cpp.attention(x, offsets, 3, [1, 1], [1, 1], 4, 0.0, None)[1],
        ]
    finally:
        torch.set_default_dtype(before)
    assert [t.dtype for t in statistics] == 6 * [torch.float32]


# --- callers and processes ------------------------------------------------------------------------


def run_at_once(*jobs: Callable[[], None]) -> None:
    """Every job in a thread of its own, started together; raises what one of them raises."""
    barrier, errors = threading.Barrier(len(jobs)), []

    def work(job: Callable[[], None]) -> None:
        try:
            barrier.wait(timeout=60)
            job()
        except BaseException as error:
            errors.append(error)
            raise

    workers = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("count", [1, 2])
def test_callers_at_once(dtype, count):
    """All on the same tensors, each beginning with another op."""
    cases = [make() for make in FEW.values()]
    inputs = [case.inputs(dtype) for case in cases]
    with threads(1):
        wants = [case.run(given) for case, given in zip(cases, inputs, strict=True)]

    def job(first: int) -> None:
        torch.set_num_threads(count)  # of OpenMP: each thread has its own number
        for i in range(2 * len(cases)):
            which = (first + i) % len(cases)
            assert_same_bits(cases[which].run(inputs[which]), wants[which])

    with threads(count):
        run_at_once(*(partial(job, first) for first in range(0, len(cases), 3)))


def test_callers_with_different_numbers_of_threads_at_once():
    case = FEW["expand staircase"]()
    inputs = case.inputs(torch.float32)
    want = case.run(inputs)

    def job(count: int) -> None:
        torch.set_num_threads(count)
        for _ in range(10):
            assert_same_bits(case.run(inputs), want)

    with threads(1):
        run_at_once(*(partial(job, count) for count in (1, 2, 3)))


FORK = """
import os
import torch
from dynabert_fast import ops

x, weight, bias = torch.randn(97, 64), torch.randn(130, 64), torch.randn(130)
qkv, offsets = torch.randn(97, 3 * 64), torch.tensor([0, 30, 97])


def run():
    with ops.use_backend("cpp"), torch.no_grad():
        context = ops.attention(qkv, offsets, 67, 64, 1)
        return ops.expand(context, weight, bias, 129, activation="gelu")


def in_a_child(threads):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(threads)
        os._exit(0 if torch.equal(run(), want) else 1)
    assert os.waitpid(child, 0)[1] == 0


torch.set_num_threads(1)
want = run()
in_a_child(1)
in_a_child(2)
torch.set_num_threads(2)
assert torch.equal(run(), want)
in_a_child(1)
assert torch.equal(run(), want)
"""


def test_a_forked_process():
    """As a DataLoader's workers: with one thread, or where the parent never used more.

    A child that inherits more than one hangs in torch's own products too: GNU OpenMP's threads
    are not there after a fork.
    """
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    subprocess.run(
        [sys.executable, "-c", FORK], env=os.environ | {"PYTHONPATH": path}, timeout=60, check=True
    )
