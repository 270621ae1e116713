"""Expand and contract through cuBLASLt: what is asked of the library, on a CPU, by a stand-in that
multiplies what it is pointed at; where there is a GPU, by the library."""

from __future__ import annotations

import ctypes
import json

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dynabert_fast import ops
from dynabert_fast.errors import InputError
from dynabert_fast.ops import choices, cuda, registry
from dynabert_fast.ops.registry import Backend

D = 13


def at(address: int, columns: int, rows: int, stride: int, dtype: torch.dtype) -> Tensor:
    """A row-major matrix `[rows, columns]` in memory: the library's `[columns, rows]`."""
    count = (rows - 1) * stride + columns
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided((rows, columns), (stride, 1))


class Library:
    """The module `_cuda`, of CPU tensors."""

    architectures = "80-real,90a-real"
    MatmulError = CudaError = RuntimeError
    #: Epilogues for which it has no algorithm.
    lacks: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def load_cublaslt(self, paths):
        return "stand-in, version 130000"

    def matmul(self, **call) -> bool:
        if call["epilogue"] in self.lacks:
            return False
        self.calls.append(call)
        (m, n, k), (transpose_a, transpose_b) = call["sizes"], call["transposed"]
        dtype = torch.bfloat16 if call["bf16"] else torch.float16
        left = at(call["a"][0], *((k, m) if transpose_a else (m, k)), call["a"][1], dtype).double()
        right = at(call["b"][0], *((n, k) if transpose_b else (k, n)), call["b"][1], dtype).double()
        left, right = left.T if transpose_a else left, right.T if transpose_b else right
        out = right @ left  # of transposes: [n, k] [k, m]
        epilogue = call["epilogue"]
        if epilogue in ("bias", "relu", "gelu_tanh"):
            out = out + at(call["bias"], m, 1, m, dtype).double()
        if call["pre"][0]:
            assert epilogue == "gelu_tanh"
            assert call["pre"][1] % 8 == 0
            at(call["pre"][0], m, n, call["pre"][1], dtype).copy_(out)
        if epilogue == "gelu_tanh":
            out = F.gelu(out, approximate="tanh")
        if epilogue == "relu":
            out = out.relu()
        if epilogue == "sums of a":
            at(call["bias"], m, 1, m, dtype).copy_(left.sum(0))
        if epilogue == "sums of b":
            at(call["bias"], n, 1, n, dtype).copy_(right.sum(1))
        at(call["d"][0], m, n, call["d"][1], dtype).copy_(out)
        return True

    def pointwise(self, bf16, activation, shape, pre, grad, out, stream) -> None:
        dtype = torch.bfloat16 if bf16 else torch.float16
        x = at(pre[0], shape[1], shape[0], pre[1], dtype).double().requires_grad_()
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        with torch.enable_grad():
            y = x.relu() if activation == "relu" else F.gelu(x, approximate=approximate)
        if grad[0]:
            given = at(grad[0], shape[1], shape[0], grad[1], dtype).double()
            (y,) = torch.autograd.grad(y, x, given)
        at(out[0], shape[1], shape[0], out[1], dtype).copy_(y.detach())


@pytest.fixture
def library(monkeypatch) -> Library:
    """The backend `cuda` on the CPU, with the stand-in."""
    stand_in = Library()
    monkeypatch.setattr(cuda, "cuda_module", lambda: stand_in)
    monkeypatch.setattr(cuda, "_stream", lambda device: 0)
    monkeypatch.setattr(cuda, "_workspace", lambda device, stream: torch.empty(0))
    before = registry._backends["cuda"]
    registry.register("cuda", Backend(kernels=before.kernels))
    yield stand_in
    registry.register("cuda", before)


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def dtype(request) -> torch.dtype:
    return request.param


def inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def plain_activation(name: str, x: Tensor) -> Tensor:
    if name.startswith("gelu"):
        return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
    return x.relu() if name == "relu" else x


@pytest.mark.parametrize("lacks", [(), ("sums of a", "sums of b")], ids=["all", "no sums"])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("extent", [16, 8, 5, 1])
@pytest.mark.parametrize("tokens", [7, 1, 0])
def test_expand(library, judge, activation, extent, tokens, lacks):
    library.lacks = lacks
    x, weight, bias = inputs((tokens, D), (16, D), (16,))

    def ours(x, w, b):
        with ops.use_backend("cuda"):
            return ops.expand(x, w, b, extent, None, activation)

    judge(ours, lambda x, w, b: plain_activation(activation, F.linear(x, w[:extent], b[:extent])),
          [x, weight, bias])  # fmt: skip
    assert bool(library.calls) == (tokens > 0)


@pytest.mark.parametrize("lacks", [(), ("sums of a", "sums of b")], ids=["all", "no sums"])
@pytest.mark.parametrize("extent", [11, 8, 1])
@pytest.mark.parametrize("tokens", [7, 1, 0])
def test_contract(library, judge, extent, tokens, lacks):
    library.lacks = lacks
    x, weight, bias = inputs((tokens, 11), (11, D), (D,))

    def ours(x, w, b):
        with ops.use_backend("cuda"):
            return ops.contract(x, w, b, extent)

    beyond = torch.arange(11).expand(tokens, 11) >= extent
    judge(ours, lambda x, w, b: x[:, :extent] @ w[:extent] + b, [x, weight, bias],
          poison={0: beyond})  # fmt: skip


def test_views_are_not_copied(library, dtype):
    """Leading dimensions instead: x is a part of a wider matrix, and so is the weight's prefix."""
    wide, weight, bias = (t.to(dtype) for t in inputs((5, 40), (16, D), (16,)))
    with ops.use_backend("cuda"), torch.no_grad():
        ops.expand(wide[:, 8 : 8 + D], weight, bias, 6)
        ops.contract(wide[:, 8:24], weight, wide[0, :D].contiguous(), 6)
    (expanded, contracted) = library.calls
    assert expanded["b"] == (wide[:, 8:].data_ptr(), 40)
    assert expanded["a"] == (weight.data_ptr(), D)
    assert contracted["b"] == (wide[:, 8:].data_ptr(), 40)


def test_one_row_and_a_bias_anywhere(library):
    """Of one row torch may give any stride; the library would refuse one below the row."""
    x = torch.randn(D, 1, dtype=torch.bfloat16).t()
    assert x.stride() == (1, 1)
    weight, biases = torch.randn(8, D, dtype=torch.bfloat16), torch.randn(9, dtype=torch.bfloat16)
    with ops.use_backend("cuda"):
        out = ops.expand(x, weight, biases[1:], 8)
    (call,) = library.calls
    assert call["b"][1] == D
    assert call["bias"] % 16 == 0
    with ops.use_backend("reference"):
        torch.testing.assert_close(out, ops.expand(x, weight, biases[1:], 8))


def test_a_graph_has_a_workspace_of_its_own(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(cuda, "_workspaces", {})
    capturing = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    eager = cuda._workspace(device, 7)
    assert cuda._workspace(device, 7) is eager
    capturing.append(True)
    assert cuda._workspace(device, 7) is not eager
    capturing.clear()
    assert cuda._workspace(device, 7) is eager


def test_fused_epilogues(library):
    """The library's GELU is the tanh form: it stands in for no other."""
    x, weight, bias = (t.bfloat16() for t in inputs((5, D), (16, D), (16,)))
    found = {}
    for activation in ops.ACTIVATIONS:
        with ops.use_backend("cuda"), torch.no_grad():
            ops.expand(x, weight, bias, 16, None, activation)
        found[activation] = library.calls[-1]["epilogue"]
    assert found == {"": "bias", "gelu": "bias", "gelu_tanh": "gelu_tanh", "relu": "relu"}


def test_a_staircase_is_refused_where_it_is_forced(library):
    x, weight, bias = (t.bfloat16() for t in inputs((5, D), (16, D), (16,)))
    with ops.use_backend("cuda"), pytest.raises(InputError, match="one extent, got 2 row blocks"):
        ops.expand(x, weight, bias, [16, 8], [2, 3])


def test_without_an_algorithm(library):
    library.lacks = ("bias",)
    x, weight, bias = (t.bfloat16() for t in inputs((5, D), (16, D), (16,)))
    with ops.use_backend("cuda"), pytest.raises(InputError, match="no algorithm for expand"):
        ops.expand(x, weight, bias, 16)


@pytest.fixture
def unforced(library, monkeypatch, tmp_path):
    """Calls are the library's or Triton's by the table; Triton's are counted, in plain torch."""
    calls: list[str] = []

    def triton(name):
        def run(*args):
            calls.append(name)
            return registry._backends["reference"].kernels[name](*args)

        return run

    before = registry._backends["triton"]
    registry.register("triton", Backend(kernels={n: triton(n) for n in cuda._OURS}))
    monkeypatch.setattr(cuda, "cache_file", lambda device: tmp_path / "choices.json")
    monkeypatch.setattr(cuda, "_failures", [])
    monkeypatch.setattr(cuda, "_known", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("DYNABERT_FAST_TUNE", "0")
    yield calls
    registry.register("triton", before)


@pytest.mark.parametrize(("tokens", "theirs"), [(7, 1), (300, 0)])
def test_by_default_the_library_has_the_larger_products(library, unforced, tokens, theirs):
    x, weight, bias = (t.bfloat16() for t in inputs((tokens, D), (16, D), (16,)))
    with torch.no_grad():
        ops.expand(x, weight, bias, 8)
    assert unforced.count("expand") == theirs
    assert len(library.calls) == 1 - theirs


def test_a_staircase_is_tritons(library, unforced):
    x, weight, bias = (t.bfloat16() for t in inputs((600, D), (16, D), (16,)))
    with torch.no_grad():
        ops.expand(x, weight, bias, [16, 8], [300, 300])
    assert unforced == ["expand"]
    assert library.calls == []


def test_a_library_that_fails_is_not_asked_again(library, unforced, monkeypatch, caplog):
    def fail(**call):
        raise library.MatmulError("cublasLtMatmul failed with cuBLAS status 14")

    monkeypatch.setattr(library, "matmul", fail)
    x, weight, bias = (t.bfloat16() for t in inputs((300, D), (16, D), (16,)))
    with torch.no_grad():
        for _ in range(2):
            ops.expand(x, weight, bias, 8)
        assert unforced == ["expand", "expand"]
        assert [r.getMessage() for r in caplog.records if r.name == cuda.logger.name] == [
            "expand: cublasLtMatmul failed with cuBLAS status 14; "
            "Triton computes all products from now on"
        ]
        with ops.use_backend("cuda"), pytest.raises(library.MatmulError):
            ops.expand(x, weight, bias, 8)


def test_choices_are_measured_once_and_kept(tmp_path, monkeypatch):
    import triton.testing

    times = {"fast": 1.0, "slow": 2.0}
    asked = []

    def do_bench(run, **_):
        asked.append(run())
        return times[asked[-1]]

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    path = tmp_path / "cuda" / "card.json"
    candidates = {"triton": lambda: "slow", "cublaslt": lambda: "fast"}
    assert cuda.choose("expand a", 16, candidates, path, measure=False) == "triton"
    assert cuda.choose("expand a", 4096, candidates, path, measure=False) == "cublaslt"
    assert asked == []
    assert cuda.choose("expand a", 16, candidates, path, measure=True) == "cublaslt"
    assert cuda.choose("expand a", 16, candidates, path, measure=True) == "cublaslt"
    assert asked == ["slow", "fast"]
    assert json.loads(path.read_text()) == {"expand a": "cublaslt"}
    choices.read.cache_clear()
    assert cuda.choose("expand a", 16, candidates, path, measure=False) == "cublaslt"
    none = {"triton": lambda: "slow", "cublaslt": lambda: None}
    assert cuda.choose("expand b", 4096, none, path, measure=True) == "triton"


@pytest.mark.parametrize(
    ("architectures", "capability", "good"),
    [
        ("80-real,90a-real", (8, 0), True),
        ("80-real,90a-real", (8, 9), True),
        ("80-real,90a-real", (9, 0), True),
        ("80-real,90a-real", (10, 0), False),
        ("80-real,90a-real", (12, 0), False),
        ("80", (10, 0), True),
        ("90a", (10, 0), False),
        ("86-real", (8, 0), False),
        ("100-real", (10, 3), True),
    ],
)
def test_which_cards_an_architecture_is_for(architectures, capability, good):
    assert cuda.fits(architectures, capability) == good


def test_says_why_it_is_not_there(monkeypatch):
    def absent():
        raise InputError("the CUDA module is not available (no _cuda)")

    monkeypatch.setattr(cuda, "cuda_module", absent)
    reason = cuda._why_not("expand", torch.device("cuda"), torch.bfloat16)
    assert reason == "is not built: the CUDA module is not available (no _cuda)"


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("width", [1.0, 0.75, 0.5, 0.25])
@pytest.mark.parametrize("tokens", [1, 37, 128, 513])
def test_the_library_itself(dtype, activation, width, tokens):
    """BERT-base's feed-forward block and all gradients, against float64."""
    device, hidden, neurons = "cuda", 768, 3072
    shapes = (tokens, hidden), (neurons, hidden), (neurons,), (neurons, hidden), (hidden,)
    scales = 1, 0.03, 0.1, 0.03, 0.1
    k = int(width * neurons)
    exact = [t * s for t, s in zip(inputs(*shapes), scales, strict=True)]
    rounded = [t.to(dtype) for t in exact]

    def plain(x, up, up_bias, down, down_bias):
        inner = plain_activation(activation, F.linear(x, up[:k], up_bias[:k]))
        return inner @ down[:k] + down_bias

    def ours(x, up, up_bias, down, down_bias):
        inner = ops.expand(x, up, up_bias, k, None, activation)
        return ops.contract(inner, down, down_bias, k)

    def run(function, tensors, forced=None):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        with ops.use_backend(forced or "reference"):
            out = function(*leaves)
            return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    want = run(plain, [t.double() for t in rounded])
    usual = run(plain, [t.to(device) for t in rounded])
    got = run(ours, [t.to(device) for t in rounded], "cuda")
    for g, u, w in zip(got, usual, want, strict=True):
        slack = 2 * torch.finfo(dtype).eps * w.abs().max()
        allowed = 2 * (u.cpu().double() - w).abs().max() + slack
        assert (g.cpu().double() - w).abs().max() <= allowed
