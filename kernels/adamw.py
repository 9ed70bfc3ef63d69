"""AdamW (Loshchilov and Hutter, 2017, arXiv:1711.05101) over all parameters of a model at once, in place.

Parameters p, gradients g and the two moments m and v lie in flat buffers. Update t = 1, 2, ..., with f = `factor`, which
takes off the scale of the loss and clips:

    m ← m + (1 − β1) (f g − m)                 m̂ = m / (1 − β1^t)
    v ← v + (1 − β2) ((f g)² − v)              v̂ = v / (1 − β2^t)
    p ← p − lr (weight_decay p + m̂ / (√v̂ + ε))         weight_decay: of the first n_decayed elements only

and, in the same pass, p rounded to the compute dtype for the elements that the next forward pass reads in it. What
changes from update to update is read on the device: nothing waits for the host, and a captured CUDA graph stays right.
Where `skip` is 1 everything stays as it is, t included.

Two launches: one program counts the update and computes 1 − β^t in float64 (in float32, 1 − 0.999 alone is wrong by 1e-5
of itself); all others then share the elements, in float32. Moments and decay are increments, not m β1 + (1 − β1) g or
p (1 − lr weight_decay): the rounding of β1 and of a number next to 1 would bend every update the same way.

Bytes an element, with copies of e bytes, each read and written once:

    read p, g, m, v     written p, m, v and the copy     together 28 + e
"""

import torch
from torch import Tensor

from kernels.launch import (
    INTERPRETED,
    Launch,
    Target,
    ceil_div,
    check_tensor,
    check_usable,
    device_of,
    register_op,
    target_of,
    tl,
    triton,
    warps_for,
    wrap_triton,
)

# ----------------------------------------------------------------------------------------------------------- torch twin


def adamw_torch(
    values: Tensor,
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copies: Tensor | None,
    step: Tensor,
    lr: Tensor,
    factor: Tensor,
    skip: Tensor,
    *,
    n_decayed: int,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One update, in place: of values, exp_avg, exp_avg_sq, copies and step; gradients stay as they are.

    values, gradients, exp_avg, exp_avg_sq: (N,) float32, dense. copies: (C,) bfloat16 or float16 with C at most N, the
    first C values rounded to nearest even; None for none. step: updates made before; lr: learning rate; factor: the
    gradients are multiplied by it; skip: 1 to leave everything unchanged, else 0; all four 0-d float32.
    n_decayed: how many elements, from the first on, decay by `weight_decay`. This twin takes float64 too, of all
    but the copies. Raises ValueError on anything else.
    """
    _check(
        values,
        gradients,
        exp_avg,
        exp_avg_sq,
        copies,
        step,
        lr,
        factor,
        skip,
        n_decayed,
        (torch.float32, torch.float64),
    )
    go = skip == 0
    step += go
    gradients = gradients * factor
    m = exp_avg + (1 - beta1) * (gradients - exp_avg)
    v = exp_avg_sq + (1 - beta2) * (gradients.square() - exp_avg_sq)
    t = step.double()
    change = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)
    change[:n_decayed] += weight_decay * values[:n_decayed]
    for old, new in ((values, values - lr * change), (exp_avg, m), (exp_avg_sq, v)):
        old.copy_(torch.where(go, new, old))
    if copies is not None:
        copies.copy_(torch.where(go, values[: copies.numel()].to(copies.dtype), copies))


def _check(
    values: Tensor,
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copies: Tensor | None,
    step: Tensor,
    lr: Tensor,
    factor: Tensor,
    skip: Tensor,
    n_decayed: int,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    check_tensor("adamw", "values", values, ("N",), dtypes)
    buffers = {"gradients": gradients, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, tensor in buffers.items():
        check_tensor("adamw", name, tensor, tuple(values.shape), (values.dtype,), values.device)
    for name, tensor in {"step": step, "lr": lr, "factor": factor, "skip": skip}.items():
        check_tensor("adamw", name, tensor, (), dtypes, values.device)
    if copies is not None:
        check_tensor("adamw", "copies", copies, ("C",), (torch.bfloat16, torch.float16), values.device)
        if copies.numel() > values.numel():
            raise ValueError(f"adamw: copies has {copies.numel()} elements, wanted at most {values.numel()}, as values")
    for name, tensor in {"values": values, **buffers, "copies": copies}.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"adamw: {name} has stride {tensor.stride(0)}, wanted a dense tensor")
    if not 0 <= n_decayed <= values.numel():
        raise ValueError(f"adamw: n_decayed is {n_decayed}, wanted 0 to {values.numel()}, the elements of values")


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _one_minus_power(BETA: tl.constexpr, t):
    """1 − BETA^t, computed in float64."""
    beta = tl.full((), BETA, tl.float64)
    return 1 - tl.exp(tl.log(beta) * t.to(tl.float64))


@triton.jit
def _adamw_count_kernel(step_ptr, skip_ptr, corrections_ptr, BETA1: tl.constexpr, BETA2: tl.constexpr):
    """One program: counts the update, and leaves what turns m and √v into m̂ and √v̂."""
    if tl.load(skip_ptr) == 0:
        t = tl.load(step_ptr) + 1
        tl.store(step_ptr, t)
        tl.store(corrections_ptr, (1 / _one_minus_power(BETA1, t)).to(tl.float32))
        tl.store(corrections_ptr + 1, (1 / tl.sqrt(_one_minus_power(BETA2, t))).to(tl.float32))


@triton.jit
def _elements(program, BLOCK_N: tl.constexpr):
    """Indices of the elements of a program: int64, [BLOCK_N]."""
    return program.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)


# The interpreter's stores cut bfloat16 off where a GPU's round.
ROUND_BFLOAT16 = tl.constexpr(INTERPRETED)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """Float32 to `dtype`, to nearest even."""
    if ROUND_BFLOAT16 and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _adamw_update_kernel(
    values_ptr,
    gradients_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    copies_ptr,
    lr_ptr,
    factor_ptr,
    skip_ptr,
    corrections_ptr,
    n_elements,
    n_decayed,
    n_copied,
    WEIGHT_DECAY: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    if tl.load(skip_ptr) == 0:
        cols = _elements(tl.program_id(0), BLOCK_N)
        mask = cols < n_elements
        p = tl.load(values_ptr + cols, mask, other=0.0)
        g = tl.load(gradients_ptr + cols, mask, other=0.0) * tl.load(factor_ptr)
        m = tl.load(exp_avg_ptr + cols, mask, other=0.0)
        v = tl.load(exp_avg_sq_ptr + cols, mask, other=0.0)
        m += (1 - BETA1) * (g - m)
        v += (1 - BETA2) * (g * g - v)
        m_hat = m * tl.load(corrections_ptr)
        root_v_hat = tl.sqrt(v) * tl.load(corrections_ptr + 1)
        decay = tl.where(cols < n_decayed, WEIGHT_DECAY, 0.0)
        p -= tl.load(lr_ptr) * (decay * p + m_hat / (root_v_hat + EPS))
        tl.store(values_ptr + cols, p, mask)
        tl.store(exp_avg_ptr + cols, m, mask)
        tl.store(exp_avg_sq_ptr + cols, v, mask)
        if copies_ptr is not None:
            tl.store(copies_ptr + cols, _rounded(p, copies_ptr.dtype.element_ty), cols < n_copied)


# --------------------------------------------------------------------------------------------------------------- launch


def adamw_launch(n_elements: int, target: Target) -> Launch:
    """Tiles of 2048 elements, 8 a thread: 16 bytes of a half-precision copy, twice 16 of float32."""
    block_n = 2048
    return Launch((ceil_div(n_elements, block_n),), {"BLOCK_N": block_n}, warps_for(block_n, 8, target))


def _nothing(*arguments) -> None:
    pass


# Registered although it has no gradient: what counts and times the ops of a step sees it as one of them.
@register_op(fake=_nothing, mutates=("values", "exp_avg", "exp_avg_sq", "copies", "step"))
def _adamw(
    values: Tensor,
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copies: Tensor | None,
    step: Tensor,
    lr: Tensor,
    factor: Tensor,
    skip: Tensor,
    n_decayed: int,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    corrections = torch.empty(2, dtype=torch.float32, device=values.device)
    launch = adamw_launch(values.numel(), target_of(values))
    with device_of(values):
        wrap_triton(_adamw_count_kernel)[(1,)](
            step_ptr=step,
            skip_ptr=skip,
            corrections_ptr=corrections,
            BETA1=beta1,
            BETA2=beta2,
            num_warps=1,
            num_stages=1,
        )
        if values.numel():
            wrap_triton(_adamw_update_kernel)[launch.grid](
                values_ptr=values,
                gradients_ptr=gradients,
                exp_avg_ptr=exp_avg,
                exp_avg_sq_ptr=exp_avg_sq,
                copies_ptr=copies,
                lr_ptr=lr,
                factor_ptr=factor,
                skip_ptr=skip,
                corrections_ptr=corrections,
                n_elements=values.numel(),
                n_decayed=n_decayed,
                n_copied=0 if copies is None else copies.numel(),
                WEIGHT_DECAY=weight_decay,
                BETA1=beta1,
                BETA2=beta2,
                EPS=eps,
                **launch.options,
            )


def adamw_triton(
    values: Tensor,
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copies: Tensor | None,
    step: Tensor,
    lr: Tensor,
    factor: Tensor,
    skip: Tensor,
    *,
    n_decayed: int,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """`adamw_torch` by Triton kernels, but for float64."""
    _check(values, gradients, exp_avg, exp_avg_sq, copies, step, lr, factor, skip, n_decayed, (torch.float32,))
    check_usable("adamw", values.device)
    hyperparameters = (n_decayed, weight_decay, beta1, beta2, eps)
    _adamw(values, gradients, exp_avg, exp_avg_sq, copies, step, lr, factor, skip, *hyperparameters)
