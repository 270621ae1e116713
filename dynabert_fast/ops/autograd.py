"""Gradients and torch registration of the ops: one description of each op serves both.

An op is a forward kernel, a backward kernel and what to save between them. From that description
`Op` makes (1) an eager path that goes straight to the resolved backend and adds an
`autograd.Function` only where a gradient is needed, and (2) `torch.ops.dynabert_fast.*` with shape
functions and autograd, which `torch.compile` and `torch.export` trace.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dynabert_fast.errors import InputError
from dynabert_fast.ops.registry import forced_backend, resolve, use_backend

_NAMESPACE = "dynabert_fast"
_library = torch.library.Library(_NAMESPACE, "DEF")


def _typed(kernel: str, args: Sequence[Any]) -> Tensor:
    """The first floating-point tensor, also in a list: what a backend is chosen by.

    A backward's incoming gradient is passed over: a loss's is wider than what the kernel reads.
    """
    for arg in args[1:] if kernel.endswith("_backward") else args:
        x = arg[0] if isinstance(arg, list) else arg
        if isinstance(x, Tensor) and x.is_floating_point():
            return x
    raise TypeError(f"{kernel} needs a floating-point tensor, got none")


def dispatch(kernel: str, *args: Any) -> Any:
    """Run a kernel on the backend that its first floating-point tensor resolves to.

    Tensors without memory of their own (fake ones, while something is traced) go through torch.
    """
    x = _typed(kernel, args)
    if type(x) not in (Tensor, torch.nn.Parameter):
        return getattr(torch.ops.dynabert_fast, kernel)(*args)
    return resolve(kernel, x.device, x.dtype)(*args)


def _define(kernel: str, schema: str, fake: Callable[..., Any]) -> None:
    """Make `torch.ops.dynabert_fast.<kernel>` with its shape function."""

    def implementation(*args: Any) -> Any:
        x = _typed(kernel, args)
        return resolve(kernel, x.device, x.dtype)(*args)

    _library.define(f"{kernel}{schema}")
    _library.impl(kernel, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{kernel}", fake, lib=_library)


def _call(kernel: str, *args: Any) -> Any:
    """A kernel from inside a backward: traced where tracing, direct where eager."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.dynabert_fast, kernel)(*args)
    return dispatch(kernel, *args)


def _spread(args: Sequence[Any], lists: int) -> tuple[Any, ...]:
    """`args` without lists of tensors, which hide from autograd: their length, then one by one."""
    return len(args[0]), *itertools.chain(*args[:lists]), *args[lists:]


def _gather(spread: Sequence[Any], lists: int) -> tuple[Any, ...]:
    """The arguments that `_spread` took."""
    size, flat = spread[0], spread[1:]
    return *(list(flat[i * size : (i + 1) * size]) for i in range(lists)), *flat[lists * size :]


@dataclass(frozen=True)
class Op:
    """A differentiable op; call it with the forward kernel's arguments for its first output.

    Lists of tensors come first among them, all of one length; their gradients are lists.

    Attributes:
        name: Name of the forward kernel; the backward kernel is `<name>_backward`.
        schemas: torch.library schemas of both kernels.
        fakes: Shape functions of both kernels.
        setup: `(ctx, inputs, output)`: keeps what the backward needs.
        backward: `(ctx, grad) -> gradients`, one per input.
        lists: How many arguments are lists of tensors.
    """

    name: str
    schemas: tuple[str, str]
    fakes: tuple[Callable[..., Any], Callable[..., Any]]
    setup: Callable[[Any, tuple[Any, ...], Any], None]
    backward: Callable[[Any, Tensor], tuple[Any, ...]]
    lists: int = field(init=False)
    function: type[torch.autograd.Function] = field(init=False)

    def __post_init__(self) -> None:
        """Register both kernels and build the eager autograd function."""
        _define(self.name, self.schemas[0], self.fakes[0])
        _define(f"{self.name}_backward", self.schemas[1], self.fakes[1])
        name, setup, backward = self.name, self.setup, self.backward
        lists = self.schemas[0].count("Tensor[]")

        def first_grad_only(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
            return backward(ctx, grad)

        class Eager(torch.autograd.Function):
            # Not `setup_context`: that way takes 14 microseconds more a call.
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                if lists:
                    args = _gather(args, lists)
                output = dispatch(name, *args)
                if isinstance(output, tuple):
                    ctx.mark_non_differentiable(*output[1:])
                ctx.set_materialize_grads(False)
                ctx.forced = forced_backend()
                setup(ctx, args, output)
                return output

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
                if grad is None:
                    return (None,) * len(ctx.needs_input_grad)
                # Autograd may run this in a thread of its own, which does not inherit the choice.
                with use_backend(ctx.forced) if ctx.forced else contextlib.nullcontext():
                    grads = backward(ctx, grad)
                return (None, *_spread(grads, lists)[1:]) if lists else grads

        torch.library.register_autograd(
            f"{_NAMESPACE}::{name}", first_grad_only, setup_context=setup, lib=_library
        )
        object.__setattr__(self, "lists", lists)
        object.__setattr__(self, "function", Eager)

    def __call__(self, *args: Any) -> Tensor:
        """The op's first output; the others are only what its backward needs."""
        flat = _spread(args, self.lists) if self.lists else args
        if torch.compiler.is_compiling():
            output = getattr(torch.ops.dynabert_fast, self.name)(*args)
        elif torch.is_grad_enabled() and any(
            a.requires_grad for a in flat if isinstance(a, Tensor)
        ):
            output = self.function.apply(*flat)
        else:
            output = dispatch(self.name, *args)
        return output[0] if isinstance(output, tuple) else output


def _empty(like: Tensor, shape: Sequence[int], needed: bool = True) -> Tensor:
    return like.new_empty(tuple(shape) if needed else (0,))


def _statistics(x: Tensor) -> Tensor:
    """An uninitialised float32 (float64 for float64) value per row of `[T, D]`."""
    return x.new_empty(x.shape[0], 1, dtype=torch.promote_types(x.dtype, torch.float32))


# --- expand -------------------------------------------------------------------------------------


def _expand_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, extents, rows, activation, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.call = (extents, rows, activation)


def _expand_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: checkpointing unpacks it
    if ctx.call[2] and saved[2].shape[0] != saved[0].shape[0]:
        raise InputError(f"the gradient of {ctx.call[2]} needs its input: call with keep_pre")
    need_x, need_weight = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
    grads = _call("expand_backward", grad.contiguous(), *saved, *ctx.call, need_x, need_weight)
    return *_needed(grads, (need_x, need_weight, need_weight)), None, None, None, None


def _needed(grads: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(g if n else None for g, n in zip(grads, needed, strict=True))


expand = Op(
    "expand",
    (
        "(Tensor x, Tensor weight, Tensor bias, int[] extents, SymInt[] rows, str activation, "
        "bool keep_pre) -> (Tensor, Tensor)",
        "(Tensor grad, Tensor x, Tensor weight, Tensor pre, int[] extents, SymInt[] rows, "
        "str activation, bool need_x, bool need_weight) -> (Tensor, Tensor, Tensor)",
    ),
    (
        lambda x, weight, bias, extents, rows, activation, keep_pre: (
            _empty(x, (x.shape[0], max(extents))),
            _empty(x, (x.shape[0], max(extents)), bool(activation) and keep_pre),
        ),
        lambda grad, x, weight, pre, extents, rows, activation, need_x, need_weight: (
            _empty(x, x.shape, need_x),
            _empty(weight, weight.shape, need_weight),
            _empty(weight, weight.shape[:1], need_weight),
        ),
    ),
    _expand_setup,
    _expand_grad,
)


# --- contract -----------------------------------------------------------------------------------


def _contract_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight_t, _, extents, rows = inputs
    ctx.save_for_backward(x, weight_t)
    ctx.call = (extents, rows)


def _contract_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    need_x, need_weight = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
    grads = _call(
        "contract_backward", grad.contiguous(), *ctx.saved_tensors, *ctx.call, need_x, need_weight
    )
    return *_needed(grads, (need_x, need_weight, need_weight)), None, None


contract = Op(
    "contract",
    (
        "(Tensor x, Tensor weight_t, Tensor bias, int[] extents, SymInt[] rows) -> Tensor",
        "(Tensor grad, Tensor x, Tensor weight_t, int[] extents, SymInt[] rows, bool need_x, "
        "bool need_weight) -> (Tensor, Tensor, Tensor)",
    ),
    (
        lambda x, weight_t, bias, extents, rows: _empty(x, (x.shape[0], weight_t.shape[1])),
        lambda grad, x, weight_t, extents, rows, need_x, need_weight: (
            _empty(x, x.shape, need_x),
            _empty(weight_t, weight_t.shape, need_weight),
            _empty(weight_t, weight_t.shape[1:], need_weight),
        ),
    ),
    _contract_setup,
    _contract_grad,
)


# --- attention ----------------------------------------------------------------------------------


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, offsets, max_length, heads, sequences, head_size, p, seed = inputs
    ctx.save_for_backward(qkv, *output, offsets, seed)
    ctx.call = (max_length, heads, sequences, head_size, p)


def _attention_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *saved, offsets, seed = ctx.saved_tensors
    grad_qkv = _call("attention_backward", grad.contiguous(), *saved, offsets, *ctx.call, seed)
    return grad_qkv, None, None, None, None, None, None, None


attention = Op(
    "attention",
    (
        "(Tensor qkv, Tensor offsets, SymInt max_length, int[] heads, SymInt[] sequences, "
        "int head_size, float p, Tensor? seed) -> (Tensor, Tensor)",
        "(Tensor grad, Tensor qkv, Tensor out, Tensor lse, Tensor offsets, SymInt max_length, "
        "int[] heads, SymInt[] sequences, int head_size, float p, Tensor? seed) -> Tensor",
    ),
    (
        lambda qkv, offsets, max_length, heads, sequences, head_size, p, seed: (
            _empty(qkv, (qkv.shape[0], max(heads) * head_size)),
            _statistics(qkv).expand(-1, max(heads)).contiguous(),
        ),
        lambda grad, qkv, *_: torch.empty_like(qkv),
    ),
    _attention_setup,
    _attention_grad,
)


# --- residual_norm and embed --------------------------------------------------------------------


def _residual_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, _, _, p, seed = inputs
    ctx.save_for_backward(*output[1:], weight, seed)
    ctx.p = p


def _residual_norm_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *saved, seed = ctx.saved_tensors
    grad_x, grad_z, *rest = _call("residual_norm_backward", grad.contiguous(), *saved, ctx.p, seed)
    return grad_z if seed is None else grad_x, grad_z, *rest, None, None, None


residual_norm = Op(
    "residual_norm",
    (
        "(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, float p, Tensor? seed) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        "(Tensor grad, Tensor z, Tensor mean, Tensor rstd, Tensor weight, float p, Tensor? seed) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
    ),
    (
        lambda x, *_: (
            torch.empty_like(x),
            torch.empty_like(x),
            _statistics(x),
            _statistics(x),
        ),
        lambda grad, z, mean, rstd, weight, p, seed: (
            _empty(z, z.shape, seed is not None),
            torch.empty_like(z),
            torch.empty_like(weight),
            torch.empty_like(weight),
        ),
    ),
    _residual_norm_setup,
    _residual_norm_grad,
)


def _embed_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *ids, word, token_type, position, weight, _, _, p, seed = inputs
    ctx.save_for_backward(*ids, *output[1:], weight, seed)
    ctx.call = (word.shape[0], token_type.shape[0], position.shape[0], p)


def _embed_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *saved, seed = ctx.saved_tensors
    grads = _call("embed_backward", grad.contiguous(), *saved, *ctx.call, seed)
    return None, None, None, *grads, None, None, None


embed = Op(
    "embed",
    (
        "(Tensor input_ids, Tensor token_type_ids, Tensor position_ids, Tensor word, "
        "Tensor token_type, Tensor position, Tensor weight, Tensor bias, float eps, float p, "
        "Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor)",
        "(Tensor grad, Tensor input_ids, Tensor token_type_ids, Tensor position_ids, Tensor z, "
        "Tensor mean, Tensor rstd, Tensor weight, SymInt vocabulary, SymInt token_types, "
        "SymInt positions, float p, Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
    (
        lambda input_ids, types, positions, word, *_: (
            _empty(word, (input_ids.shape[0], word.shape[1])),
            _empty(word, (input_ids.shape[0], word.shape[1])),
            _statistics(_empty(word, (input_ids.shape[0], 1))),
            _statistics(_empty(word, (input_ids.shape[0], 1))),
        ),
        lambda grad, ids, types, pos, z, mean, rstd, weight, words, n_types, n_positions, *_: (
            _empty(z, (words, z.shape[1])),
            _empty(z, (n_types, z.shape[1])),
            _empty(z, (n_positions, z.shape[1])),
            torch.empty_like(weight),
            torch.empty_like(weight),
        ),
    ),
    _embed_setup,
    _embed_grad,
)


# --- distillation losses ------------------------------------------------------------------------


def _scalar(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.promote_types(like.dtype, torch.float32))


def _pair_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _soft_cross_entropy_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _call("soft_cross_entropy_backward", grad, *ctx.saved_tensors), None


soft_cross_entropy = Op(
    "soft_cross_entropy",
    (
        "(Tensor student, Tensor teacher) -> Tensor",
        "(Tensor grad, Tensor student, Tensor teacher) -> Tensor",
    ),
    (
        lambda student, teacher: _scalar(student),
        lambda grad, student, teacher: _empty(student, student.shape),
    ),
    _pair_setup,
    _soft_cross_entropy_grad,
)


def _hidden_mse_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    students, teachers, weights = inputs
    ctx.save_for_backward(*students, *teachers)
    ctx.weights = weights


def _hidden_mse_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tensors, pairs = list(ctx.saved_tensors), len(ctx.weights)
    call = tensors[:pairs], tensors[pairs:], ctx.weights
    return _call("hidden_mse_backward", grad, *call), [None] * pairs, None


hidden_mse = Op(
    "hidden_mse",
    (
        "(Tensor[] students, Tensor[] teachers, float[] weights) -> Tensor",
        "(Tensor grad, Tensor[] students, Tensor[] teachers, float[] weights) -> Tensor[]",
    ),
    (
        lambda students, teachers, weights: _scalar(students[0]),
        lambda grad, students, teachers, weights: [_empty(s, s.shape) for s in students],
    ),
    _hidden_mse_setup,
    _hidden_mse_grad,
)
