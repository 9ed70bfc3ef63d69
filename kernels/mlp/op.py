"""The whole feed-forward in one kernel each way, where the model is narrow: a row of it fits beside its weights' blocks.

Forward, of rows x of D columns, with W_gu (2F, D), gate first, and W_d (D, F):

    gate, up = x W_gate^T, x W_up^T
    y   = silu(gate) · up                   silu(g) = g · σ(g)
    out = y W_d^T

Backward:

    dy    = dout W_d
    dgate = dy · up · (s + gate · s · (1 − s)),  s = σ(gate)
    dup   = dy · gate · s
    dx    = dgate W_gate + dup W_up
    dW_gu = [dgate, dup]^T x,  dW_d = dout^T y      by the library's products

A program keeps BLOCK_M rows and walks through F in blocks: of each block it multiplies twice, and between the two products gate,
up and y, or their gradients, never leave the multiprocessor but to be kept. Apart, three passes forward and three backward read
them again: y for the second product, gate and up for SwiGLU, dy for its backward, dgate and dup for dx.

All between the products is float32; y, dgate and dup are rounded to the dtype of x once, for the next one.

Saved: x, and gate and up, rounded, with the two of a pair side by side, as the forward kernel's accumulator holds them. y is made
again from those in the backward pass, where dW_d needs it.

Bytes for M rows in e bytes an element, weights not counted:

                    read                     written                          together      apart
    forward         x                        gate, up, out                    2 e M (D+F)   2 e M (D+3F)
    backward        dout, gate, up           dgate, dup, y, dx                e M (2D+5F)   e M (2D+8F)
    dW_gu, dW_d     x, dgate, dup, dout, y                                    e M (2D+3F)   the same
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels import grammar
from kernels.grammar import MLP_WIDEST
from kernels.launch import (
    INTERPRETED,
    KERNEL_DTYPES,
    REFERENCE_DTYPES,
    check_first_derivative,
    check_tensor,
    check_usable,
    machine_of,
    target_at,
)
from kernels.linear import linear, weight_gradient
from kernels.mlp.backward import _mlp_backward
from kernels.mlp.forward import _mlp
from kernels.swiglu import swiglu_torch

MACHINES = ("sm_90", "sm_100")
"""Where products are so fast beside memory that what is saved of memory counts. On others they take most of the time, and a
library's are left to it; no GPU has timed either."""

_any_rows = INTERPRETED
"""The interpreter is for checking as well."""


def mlp_serves(x: Tensor, hidden_dim: int) -> bool:
    """Whether the kernels are meant for these rows, this width and this machine: `kernels.grammar.mlp_serves`, or `on_any_rows`.

    Raises as the kernels do where they are meant for all but the machine, and that can run none.
    """
    dim = x.shape[-1]
    if _any_rows:
        return dim <= MLP_WIDEST
    if not grammar.mlp_serves(dim, hidden_dim, x.numel() // dim, x.element_size()):
        return False
    check_usable("mlp", x.device)
    return machine_of_device(x.device) in MACHINES


# Dynamo, which can't trace a query of the device, makes this call and keeps what it returns.
@torch.compiler.assume_constant_result
def machine_of_device(device: torch.device) -> str:
    """`machine_of` half precision on a device that kernels run on."""
    return machine_of(torch.bfloat16.itemsize, target_at(device))


@contextlib.contextmanager
def on_any_rows() -> Iterator[None]:
    """Inside, they serve whatever they can compute: for checks, which are smaller than what the kernels are meant for."""
    global _any_rows
    before, _any_rows = _any_rows, True
    try:
        yield
    finally:
        _any_rows = before


# ----------------------------------------------------------------------------------------------------------- torch twin


def mlp_torch(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    compute_weights: tuple[Tensor | None, Tensor | None] = (None, None),
    gradient_sums: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """`swiglu(x @ gate_up_weight.T) @ down_weight.T`, by the products and SwiGLU in turn.

    x: (..., D). gate_up_weight: (2F, D), gate first. down_weight: (D, F). Weights float32, or the dtype of x.
    compute_weights: both in the dtype of x, where there are copies. gradient_sums: both float32, to which in half precision the
    gradients of the weights are added in autograd's stead, where they are given.
    Returns (..., D) in the dtype of x. Raises ValueError on anything else.
    """
    _check(x, gate_up_weight, down_weight, compute_weights, gradient_sums, REFERENCE_DTYPES)
    gate_up = linear(x, gate_up_weight, compute_weights[0], gradient_sums[0])
    return linear(swiglu_torch(gate_up), down_weight, compute_weights[1], gradient_sums[1])


def _check(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    compute_weights: tuple[Tensor | None, Tensor | None],
    gradient_sums: tuple[Tensor | None, Tensor | None],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    check_tensor("mlp", "x", x, dtypes=dtypes)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"mlp: x has shape {tuple(x.shape)}, wanted (..., D) with D at least 1")
    check_tensor("mlp", "down_weight", down_weight, (x.shape[-1], "F"), (torch.float32, x.dtype), x.device)
    hidden_dim = down_weight.shape[1]
    if hidden_dim == 0:
        raise ValueError(f"mlp: down_weight has shape {tuple(down_weight.shape)}, wanted (D, F) with F at least 1")
    shapes = (2 * hidden_dim, x.shape[-1]), tuple(down_weight.shape)
    check_tensor("mlp", "gate_up_weight", gate_up_weight, shapes[0], (torch.float32, x.dtype), x.device)
    for name, pair, dtype in (
        ("compute_weights", compute_weights, x.dtype),
        ("gradient_sums", gradient_sums, torch.float32),
    ):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            came = f"{len(pair)} of them" if isinstance(pair, tuple | list) else f"a {type(pair).__name__}"
            raise ValueError(
                f"mlp: {name} is {came}, wanted a pair of tensors or None: of gate_up_weight, of down_weight"
            )
        for i, tensor in enumerate(pair):
            if tensor is not None:
                check_tensor("mlp", f"{name}[{i}]", tensor, shapes[i], (dtype,), x.device)


# ------------------------------------------------------------------------------------------------------------- autograd


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, gate_up_weight, down_weight, gate_up_copy, down_copy, gate_up_sum, down_sum, keep: bool
    ) -> Tensor:
        out, gate_up = _mlp(x, gate_up_copy, down_copy, keep)
        ctx.save_for_backward(x, gate_up_copy, down_copy, gate_up)
        ctx.sums = gate_up_sum, down_sum  # not saved: autograd would refuse them for having changed since
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
        check_first_derivative("mlp")
        x, gate_up_copy, down_copy, gate_up = ctx.saved_tensors
        needs_dx, needs_gate_up, needs_down, *_ = ctx.needs_input_grad
        dgate_up, y, dx = _mlp_backward(dout, gate_up_copy, down_copy, gate_up)
        d_gate_up = weight_gradient(dgate_up, x, ctx.sums[0]) if needs_gate_up else None
        d_down = weight_gradient(dout, y, ctx.sums[1]) if needs_down else None
        return dx if needs_dx else None, d_gate_up, d_down, None, None, None, None, None


def mlp_triton(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    compute_weights: tuple[Tensor | None, Tensor | None] = (None, None),
    gradient_sums: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """`mlp_torch` by Triton kernels, but for float64 and where D is too wide: `mlp_serves` says where it is meant to be called."""
    _check(x, gate_up_weight, down_weight, compute_weights, gradient_sums, KERNEL_DTYPES)
    if x.shape[-1] > MLP_WIDEST:
        raise ValueError(f"mlp: x has shape {tuple(x.shape)}, wanted (..., D) with D at most {MLP_WIDEST}")
    check_usable("mlp", x.device)
    weights = gate_up_weight, down_weight
    copies = [w.detach().to(x.dtype) if c is None else c for w, c in zip(weights, compute_weights, strict=True)]
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights))
    return _Mlp.apply(x, *weights, *copies, *gradient_sums, keep)
