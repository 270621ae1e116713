"""Expand and contract through cuBLASLt (`csrc/cuda/matmul.cpp`), where it is faster than Triton.

Each product is one call of the library: leading dimensions instead of copies, the bias in its
epilogue, the bias' gradient in that of the weight's gradient. It fuses GELU too, but the tanh form:
for the erf form the activation is a kernel of ours behind the product.

Which of the two computes a product is looked up by its sizes in a table that is measured at the
first call with new ones (`dynabert-fast tune` does it ahead of time). With `DYNABERT_FAST_TUNE=0`
nothing is measured, and the library has products of `ROWS_OF_THE_LIBRARY` tokens or more. A
staircase is one launch in Triton, so it is always Triton's.
"""

from __future__ import annotations

import functools
import logging
import re
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynabert_fast.engine.native import cuda_module
from dynabert_fast.errors import InputError
from dynabert_fast.ops.choices import add, exclusive, may_measure, read, table_file
from dynabert_fast.ops.registry import Backend, backends, forced_backend, register

logger = logging.getLogger(__name__)

#: Without a table: products of fewer tokens are bound by the weights' bytes, which Triton reads as
#: fast, and fuses the erf form of GELU. Not measured yet.
ROWS_OF_THE_LIBRARY = 256
#: What cuBLAS recommends for Hopper.
_WORKSPACE_BYTES = 32 << 20

Result = tuple[Tensor, ...] | Tensor


# --- calls of the library -------------------------------------------------------------------------


@functools.cache
def _library() -> str:
    """Where cuBLASLt is, and its version; beside torch's, the wheels' are tried."""
    folder = Path(sysconfig.get_path("purelib"), "nvidia")
    paths = [*folder.glob("cu*/lib/libcublasLt.so.*"), *folder.glob("cublas/lib/libcublasLt.so.*")]
    return cuda_module().load_cublaslt([str(path) for path in sorted(paths, reverse=True)])


_workspaces: dict[tuple[torch.device, int], Tensor] = {}


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _workspace(device: torch.device, stream: int) -> Tensor:
    """Memory for one call at a time of a stream.

    A graph that is being captured gets its own: it may be replayed on another stream.
    """
    key = device, stream
    if not torch.cuda.is_current_stream_capturing() and key in _workspaces:
        return _workspaces[key]
    new = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    if not torch.cuda.is_current_stream_capturing():
        _workspaces[key] = new
    return new


def _address(x: Tensor | None) -> tuple[int, int]:
    """Of the first value, and elements between rows: of a single row, torch may say anything."""
    return (0, 0) if x is None else (x.data_ptr(), max(x.stride(0), x.shape[1]))


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _aligned(bias: Tensor) -> Tensor:
    """Where the library may load 16 bytes at a time: it is not told how a bias lies."""
    bias = bias.contiguous()
    return bias if bias.data_ptr() % 16 == 0 else bias.clone()


def _matmul(
    a: Tensor,
    transpose_a: bool,
    b: Tensor,
    transpose_b: bool,
    out: Tensor,
    epilogue: str = "",
    bias: Tensor | None = None,
    pre: Tensor | None = None,
    tokens_inside: bool = False,
) -> bool:
    """`out^T = op(a^T) op(b^T)` of matrices whose rows are adjacent values; False if it cannot.

    The library counts columns first: to it, each matrix is its own transpose.
    """
    device = out.device
    stream = _stream(device)
    inner = a.shape[1] if transpose_a else a.shape[0]
    workspace = _workspace(device, stream)
    return cuda_module().matmul(
        sizes=(out.shape[1], out.shape[0], inner),
        transposed=(transpose_a, transpose_b),
        a=_address(a),
        b=_address(b),
        d=_address(out),
        bf16=out.dtype == torch.bfloat16,
        epilogue=epilogue,
        bias=0 if bias is None else bias.data_ptr(),
        pre=_address(pre),
        tokens_inside=tokens_inside,
        device=device.index or 0,
        workspace=(workspace.data_ptr(), workspace.numel()),
        stream=stream,
    )


def _pointwise(activation: str, pre: Tensor, grad: Tensor | None, out: Tensor) -> None:
    cuda_module().pointwise(
        bf16=out.dtype == torch.bfloat16,
        activation=activation,
        shape=(out.shape[0], out.shape[1]),
        pre=_address(pre),
        grad=_address(grad),
        out=_address(out),
        stream=_stream(out.device),
    )


def _gradient_of_weight(
    weight: Tensor, left: Tensor, right: Tensor, sums_of_left: bool
) -> tuple[Tensor, Tensor] | None:
    """`left^T right` `[K, D]` and the bias' gradient: the sums of left `[K]` or of right `[D]`.

    left `[T, k]` and right `[T, D]`; what is beyond k is zero.
    """
    k = left.shape[1]
    grad = weight.new_empty(weight.shape)
    grad[k:].zero_()
    bias = weight.new_zeros(weight.shape[0]) if sums_of_left else weight.new_empty(right.shape[1])
    sums = "sums of b" if sums_of_left else "sums of a"
    if _matmul(right, False, left, True, grad[:k], sums, bias, tokens_inside=True):
        return grad, bias
    if not _matmul(right, False, left, True, grad[:k], tokens_inside=True):
        return None
    summed = left if sums_of_left else right
    bias[: summed.shape[1]] = summed.sum(0, dtype=torch.float32)
    return grad, bias


# --- the ops: None where the library has no algorithm ---------------------------------------------


def expand(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    extents: Sequence[int],
    rows: Sequence[int],
    activation: str,
    keep_pre: bool,
) -> Result | None:
    """As `reference.expand`, of one extent."""
    (k,) = extents
    x, weight, bias = _adjacent(x), _adjacent(weight), _aligned(bias)
    out, empty = x.new_empty(x.shape[0], k), x.new_empty(0)
    used = weight[:k]
    if not activation:
        return (out, empty) if _matmul(used, True, x, False, out, "bias", bias) else None
    if activation == "gelu_tanh" and k % 8 == 0:
        pre = torch.empty_like(out) if keep_pre else None
        done = _matmul(used, True, x, False, out, "gelu_tanh", bias, pre)
        return (out, empty if pre is None else pre) if done else None
    if activation == "relu" and not keep_pre:
        return (out, empty) if _matmul(used, True, x, False, out, "relu", bias) else None
    pre = torch.empty_like(out)
    if not _matmul(used, True, x, False, pre, "bias", bias):
        return None
    _pointwise(activation, pre, None, out)
    return out, pre if keep_pre else empty


def expand_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    pre: Tensor,
    extents: Sequence[int],
    rows: Sequence[int],
    activation: str,
    need_x: bool,
    need_weight: bool,
) -> Result | None:
    """As `reference.expand_backward`, of one extent."""
    (k,) = extents
    x, weight, grad = _adjacent(x), _adjacent(weight), _adjacent(grad)[:, :k]
    grad_x = grad_weight = grad_bias = x.new_empty(0)
    if activation:
        inner = grad.new_empty(grad.shape)
        _pointwise(activation, _adjacent(pre)[:, :k], grad, inner)
        grad = inner
    if need_x:
        grad_x = x.new_empty(x.shape)
        if not _matmul(weight[:k], False, grad, False, grad_x):
            return None
    if need_weight:
        found = _gradient_of_weight(weight, grad, x, sums_of_left=True)
        if found is None:
            return None
        grad_weight, grad_bias = found
    return grad_x, grad_weight, grad_bias


def contract(
    x: Tensor, weight_t: Tensor, bias: Tensor, extents: Sequence[int], rows: Sequence[int]
) -> Result | None:
    """As `reference.contract`, of one extent."""
    (k,) = extents
    x, weight_t, bias = _adjacent(x)[:, :k], _adjacent(weight_t), _aligned(bias)
    out = x.new_empty(x.shape[0], weight_t.shape[1])
    return out if _matmul(weight_t[:k], False, x, False, out, "bias", bias) else None


def contract_backward(
    grad: Tensor,
    x: Tensor,
    weight_t: Tensor,
    extents: Sequence[int],
    rows: Sequence[int],
    need_x: bool,
    need_weight: bool,
) -> Result | None:
    """As `reference.contract_backward`, of one extent."""
    (k,) = extents
    grad, x, weight_t = _adjacent(grad), _adjacent(x), _adjacent(weight_t)
    grad_x = grad_weight = grad_bias = x.new_empty(0)
    if need_x:
        grad_x = x.new_empty(x.shape)
        grad_x[:, k:].zero_()
        if not _matmul(weight_t[:k], True, grad, False, grad_x[:, :k]):
            return None
    if need_weight:
        found = _gradient_of_weight(weight_t, x[:, :k], grad, sums_of_left=False)
        if found is None:
            return None
        grad_weight, grad_bias = found
    return grad_x, grad_weight, grad_bias


# --- Triton or the library ------------------------------------------------------------------------

_TRITON, _CUBLASLT = "triton", "cublaslt"
#: Choices of this process by device, op and sizes: found without making a name or a path.
_known: dict[tuple[Any, ...], str] = {}
#: What the library failed with. It is then not asked again, unless it is forced.
_failures: list[str] = []


def cache_file(device: torch.device) -> Path:
    """Where the choices for a card and this version of the library are kept."""
    return table_file("cuda", device, f"cublaslt-{_library().rpartition(' ')[2]}")


def token_bucket(tokens: int) -> int:
    """The tokens that share a choice: the next power of two, at least 16."""
    return max(16, 1 << (tokens - 1).bit_length())


def choose(
    name: str, tokens: int, candidates: dict[str, Callable[[], object]], path: Path, measure: bool
) -> str:
    """The faster of the candidates, from the table or, where allowed, measured now."""
    found = read(path).get(name)
    if found in candidates:
        return found
    default = _CUBLASLT if tokens >= ROWS_OF_THE_LIBRARY else _TRITON
    if not measure:
        return default
    from triton.testing import do_bench

    with exclusive:
        times = {}
        for candidate, run in candidates.items():
            if run() is not None:  # Triton chooses its configuration, the library its algorithm
                times[candidate] = do_bench(run, warmup=5, rep=20, return_mode="median")
        best = add(path, name, min(times, key=lambda c: times[c]), candidates)
    logger.info("%s: %s of %s", name, best, times)
    return best


_OURS = {f.__name__: f for f in (expand, expand_backward, contract, contract_backward)}
#: Where in a call's arguments x, the weight and the extents stand.
_PLACES = {
    "expand": (0, 1, 3),
    "expand_backward": (1, 2, 4),
    "contract": (0, 1, 3),
    "contract_backward": (1, 2, 3),
}


def _forced(name: str, args: Sequence[Any], extents: Sequence[int]) -> Result:
    """By the library, or an error."""
    if len(extents) > 1:
        raise InputError(
            f"the backend 'cuda' computes {name} for one extent, got {len(extents)} row blocks; "
            "'triton' computes them in one launch"
        )
    result = _OURS[name](*args)
    if result is None:
        x = args[_PLACES[name][0]]
        raise InputError(f"cuBLASLt has no algorithm for {name} of {list(x.shape)} {x.dtype}")
    return result


def _faster(name: str, args: Sequence[Any], triton: Callable[..., Any]) -> str:
    """Which of the two computes a call of one extent."""
    x_at, weight_at, extents_at = _PLACES[name]
    x, weight, (extent,) = args[x_at], args[weight_at], args[extents_at]
    flags = [a for a in args[extents_at + 2 :] if isinstance(a, bool | str)]
    key = (token_bucket(x.shape[0]), extent, weight.shape[1], x.dtype, *flags)
    if (found := _known.get((x.device, name, key))) is not None:
        return found
    runs = {_TRITON: lambda: triton(*args), _CUBLASLT: lambda: _OURS[name](*args)}
    found = choose(f"{name} {key}", x.shape[0], runs, cache_file(x.device), may_measure())
    if not torch.cuda.is_current_stream_capturing():
        _known[x.device, name, key] = found
    return found


def _kernel(name: str) -> Callable[..., Any]:
    x_at, _, extents_at = _PLACES[name]

    def call(*args: Any) -> Any:
        device = args[x_at].device
        if not args[x_at].shape[0]:
            return backends()["reference"].kernels[name](*args)
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return on_current(*args)
        with torch.cuda.device(device):  # handles, launches and measurements are the current one's
            return on_current(*args)

    def on_current(*args: Any) -> Any:
        extents = args[extents_at]
        if forced_backend() == "cuda":
            return _forced(name, args, extents)
        triton = backends()["triton"].kernels[name]
        if len(extents) > 1 or _failures:
            return triton(*args)
        result, module = None, cuda_module()
        try:
            if _faster(name, args, triton) == _CUBLASLT:
                result = _OURS[name](*args)
        except (module.MatmulError, module.CudaError) as error:
            _failures.append(str(error))
            logger.warning("%s: %s; Triton computes all products from now on", name, error)
        return triton(*args) if result is None else result

    call.__name__ = name
    return call


def fits(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code built for `architectures` ("80-real,90a") runs on a card."""
    for name in architectures.split(","):
        number = re.match(r"(\d+)(\d)", name)
        assert number is not None
        built = int(number[1]), int(number[2])
        exact = re.match(r"\d+[af]", name) is not None
        if capability == built or (not exact and capability[0] == built[0] and capability > built):
            return True
        if not exact and not name.endswith("-real") and capability > built:
            return True  # the driver compiles it
    return False


def why_not_built(device: torch.device) -> str | None:
    """Why the module `_cuda` has no code for a GPU, `None` where it has."""
    try:
        architectures = cuda_module().architectures
    except InputError as error:
        return f"is not built: {error}"
    capability = torch.cuda.get_device_capability(device)
    if fits(architectures, capability):
        return None
    return (
        f"is built for {architectures}, this GPU is {capability[0]}.{capability[1]}: "
        "name it in TORCH_CUDA_ARCH_LIST and install again"
    )


def why_not(device: torch.device) -> str | None:
    """Why cuBLASLt computes nothing on a GPU, `None` where it does."""
    if (reason := why_not_built(device)) is not None:
        return reason
    try:
        _library()
    except cuda_module().MatmulError as error:
        return f"has no library: {error}"
    return None


def _why_not(kernel: str, device: torch.device, dtype: torch.dtype) -> str | None:
    return why_not(device)


register(
    "cuda",
    Backend(
        kernels={name: _kernel(name) for name in _OURS},
        devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16),
        supports=_why_not,
    ),
)
