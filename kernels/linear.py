"""The linear map: float32 parameters, half-precision arithmetic, float32 weight gradients. Its products are a library's.

forward   y  = x W'^T            W' is the compute-dtype copy of W, written once a step
backward  dx = dy W'             in the compute dtype
          dW = dy^T x            sums and result in float32, never rounded to the compute dtype

In half precision dW goes straight to where a training step sums its gradients: the product adds to what is there, and no dW is
written, read and added in a pass of its own. In float32 autograd adds it.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.launch import NAMESPACE, check_first_derivative

HALF = (torch.bfloat16, torch.float16)


def linear(x: Tensor, weight: Tensor, compute_weight: Tensor | None, gradient_sum: Tensor | None = None) -> Tensor:
    """`x @ weight.T` in the dtype of x; in half precision the gradient of weight is float32, or added to `gradient_sum`, if given.

    compute_weight: weight in the dtype of x, where there is a copy. weight itself may be in half precision, as FSDP gathers it.
    """
    if compute_weight is None:
        if x.dtype == weight.dtype and x.dtype not in HALF:
            return torch.nn.functional.linear(x, weight)
        compute_weight = weight.detach().to(x.dtype)
    return _MixedLinear.apply(x, weight, compute_weight, gradient_sum)


class _MixedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, compute_weight: Tensor, gradient_sum: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, compute_weight)
        ctx.gradient_sum = gradient_sum  # not saved: autograd would refuse it for having changed since
        return torch.nn.functional.linear(x, compute_weight)

    @staticmethod
    def backward(ctx, dy: Tensor):
        check_first_derivative("linear")  # compute_weight is not the parameter
        x, compute_weight = ctx.saved_tensors
        dx = dy @ compute_weight if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = weight_gradient(dy, x, ctx.gradient_sum)
        return dx, dw, None, None


def weight_gradient(dy: Tensor, x: Tensor, gradient_sum: Tensor | None) -> Tensor | None:
    """dy^T x (out, in) of dy (..., out) and x (..., in) in one dtype, at least in float32.

    In half precision it is added to `gradient_sum`, if given, and None is returned.
    """
    dy_t, x = dy.reshape(-1, dy.shape[-1]).T, x.reshape(-1, x.shape[-1])
    if x.dtype not in HALF:
        return dy_t @ x
    if gradient_sum is None:
        return _product(dy_t, x)
    add_product(gradient_sum, dy_t, x)
    return None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b (M, N) in float32 throughout, of half-precision a (M, K) and b (K, N)."""
    if a.device.type == "cpu":  # only cuBLAS writes float32 from half-precision operands
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


# Opaque to torch.compile, which would take it apart into a product and an addition.
@torch.library.custom_op(f"{NAMESPACE}::add_product", mutates_args=("total",))
def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b, of half-precision a (M, K) and b (K, N), to `total` (M, N) float32, in place and in float32 throughout."""
    if a.device.type == "cpu":
        total.addmm_(a.float(), b.float())
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


@register_flop_formula(torch.ops.triton_llama.add_product)
def _flops(total_shape, a_shape, b_shape, *_, **__) -> int:
    """For `torch.utils.flop_counter`: 2 M N K."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]
