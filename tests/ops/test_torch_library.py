"""The ops as `torch.ops.dynabert_fast.*`: schemas, shape functions, compile and export."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.library import opcheck

from dynabert_fast import ops
from dynabert_fast.errors import InputError
from dynabert_fast.ops import reference

D = 6
OFFSETS = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
SEED = torch.tensor(11)
IDS = torch.arange(9) % 5, torch.arange(9) % 2, torch.arange(9) % 7
TEACHER = torch.linspace(-1, 1, 27).view(9, 3)


def _reached(out):
    """Of a staircase's output, what is specified."""
    return torch.cat([out[:4].flatten(), out[4:, :3].flatten()])


# As the model calls them, with one extent; then with a staircase. Inputs are float tensors.
CASES = {
    "expand": (lambda x, w, b: ops.expand(x, w, b, 3, activation="gelu"), [(9, D), (5, D), (5,)]),
    "expand staircase": (
        lambda x, w, b: _reached(ops.expand(x, w, b, [5, 3], [4, 5])),
        [(9, D), (5, D), (5,)],
    ),
    "contract": (lambda x, w, b: ops.contract(x, w, b, 3), [(9, 4), (5, D), (D,)]),
    "contract staircase": (
        lambda x, w, b: ops.contract(x, w, b, [4, 1], [4, 5]),
        [(9, 4), (5, D), (D,)],
    ),
    "attention": (
        lambda x: ops.attention(x, OFFSETS, 5, 2, 3, p=0.25, seed=SEED),
        [(9, 18)],
    ),
    "attention staircase": (
        lambda x: ops.attention(x, OFFSETS, 5, 2, [3, 1], [2, 1])[:4],
        [(9, 18)],
    ),
    "residual_norm": (
        lambda x, r, w, b: ops.residual_norm(x, r, w, b, 1e-5, 0.25, SEED),
        [(9, D), (9, D), (D,), (D,)],
    ),
    "embed": (
        lambda word, kind, position, w, b: ops.embed(
            *IDS, word, kind, position, w, b, 1e-5, 0.25, SEED
        ),
        [(5, D), (2, D), (7, D), (D,), (D,)],
    ),
    "soft_cross_entropy": (lambda s: ops.soft_cross_entropy(s, TEACHER), [(9, 3)]),
    "soft_cross_entropy of a view": (
        lambda s: ops.soft_cross_entropy(s.t(), TEACHER),
        [(3, 9)],
    ),
    "hidden_mse": (lambda s: ops.hidden_mse(s, TEACHER), [(9, 3)]),
    "hidden_mse of many pairs": (
        lambda s, t: ops.hidden_mse([s, t.t()], [TEACHER, TEACHER[:4]], [0.5, -2.0]),
        [(9, 3), (3, 4)],
    ),
}


def leaves(shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def value_and_gradients(function, inputs):
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]


@pytest.mark.parametrize("name", CASES)
def test_compiled_in_one_graph_equals_eager(name):
    function, shapes = CASES[name]
    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    want = value_and_gradients(function, leaves(shapes))
    got = value_and_gradients(compiled, leaves(shapes))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0)


def test_compiled_without_gradients_equals_eager():
    function, shapes = CASES["expand"]
    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves(shapes)), function(*leaves(shapes)))


def recorded_calls(dtype):
    """Every kernel with the arguments that a forward and backward of the cases give it."""
    calls = []

    def recording(kernel):
        def run(*args):
            calls.append((kernel, args))
            return reference.KERNELS[kernel](*args)

        return run

    from dynabert_fast.ops import registry

    backend = registry.Backend({name: recording(name) for name in reference.KERNELS})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_backends", {"reference": backend})
        patch.setattr(registry, "_resolved", {})
        for function, shapes in CASES.values():
            inputs = [t.detach().to(dtype).requires_grad_() for t in leaves(shapes)]
            function(*inputs).float().square().sum().backward()
    return calls


KERNEL_NAMES = sorted(reference.KERNELS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", KERNEL_NAMES)
def test_schema_and_shape_function_tell_the_truth(kernel, dtype):
    calls = [args for name, args in recorded_calls(dtype) if name == kernel]
    assert calls
    checks = ["test_schema", "test_faketensor"]
    if not kernel.endswith("_backward"):
        checks.append("test_autograd_registration")
    for args in calls:
        opcheck(getattr(torch.ops.dynabert_fast, kernel).default, args, test_utils=checks)


@pytest.mark.parametrize(("cases"), ["expand", "attention"])
def test_traces_with_dynamic_shapes(cases):
    function, shapes = CASES[cases]
    if cases == "expand":
        torch.compiler.reset()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
        for tokens in (9, 4, 17):
            inputs = [(tokens, D), *shapes[1:]]
            want = value_and_gradients(function, leaves(inputs))
            got = value_and_gradients(compiled, leaves(inputs))
            for g, w in zip(got, want, strict=True):
                torch.testing.assert_close(g, w)
    else:
        opcheck(
            torch.ops.dynabert_fast.attention.default,
            (leaves(shapes)[0], OFFSETS, 5, [3], [3], 2, 0.0, None),
            test_utils=["test_aot_dispatch_dynamic"],
        )


class Block(nn.Module):
    """What a layer is made of, with its extents fixed."""

    def __init__(self):
        super().__init__()
        shapes = {"qkv": (18, D), "qkv_bias": (18,), "out": (6, D), "out_bias": (D,)}
        generator = torch.Generator().manual_seed(1)
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator)
            setattr(self, name, nn.Parameter(value))

    def forward(self, x, offsets):
        qkv = ops.expand(x, self.qkv, self.qkv_bias, 12)
        context = ops.attention(qkv, offsets, 5, 2, 2)
        y = ops.contract(context, self.out, self.out_bias, 4)
        return ops.residual_norm(y, x, self.out_bias, self.out_bias, 1e-5)


def test_exports():
    block, x = Block(), torch.randn(9, D, generator=torch.Generator().manual_seed(2))
    program = torch.export.export(block, (x, OFFSETS))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {f"dynabert_fast.{op}.default" for op in ("expand", "attention", "contract")} <= names
    torch.testing.assert_close(program.module()(x, OFFSETS), block(x, OFFSETS))


def test_gradients_flow_through_the_registered_ops():
    """Also outside compile, where the package itself takes the shorter way."""
    x, weight, bias = leaves([(9, D), (5, D), (5,)])
    out, _ = torch.ops.dynabert_fast.expand(x, weight, bias, [3], [9], "gelu", True)
    got = torch.autograd.grad(out.square().sum(), (x, weight, bias))
    want = value_and_gradients(CASES["expand"][0], leaves([(9, D), (5, D), (5,)]))[1:]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_a_second_derivative_is_refused():
    x, weight, bias = leaves([(9, D), (5, D), (5,)])
    out = ops.expand(x, weight, bias, 3, activation="gelu").square().sum()
    (first,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_an_activation_without_its_input_has_no_gradient():
    x, weight, bias = torch.ones(4, D, requires_grad=True), torch.ones(5, D), torch.ones(5)
    out, _ = torch.ops.dynabert_fast.expand(x, weight, bias, [5], [4], "gelu", False)
    with pytest.raises(InputError, match="the gradient of gelu needs its input"):
        out.sum().backward()
