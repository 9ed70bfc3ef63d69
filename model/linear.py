"""The one linear map of the model: float32 parameters, half-precision arithmetic, float32 weight gradients.

forward   y  = x W'^T            W' is the compute-dtype copy of W, written once a step
backward  dx = dy W'             in the compute dtype
          dW = dy^T x            sums and result in float32, never rounded to the compute dtype
"""

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """A map (..., in) -> (..., out) without a bias.

    `weight` (out, in) is the float32 parameter. In half precision the forward pass reads `compute_weight`, a copy that
    `Llama.refresh_compute_weights` writes; it is not saved with the model.
    """

    def __init__(self, in_features: int, out_features: int, compute_dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        copy = None if compute_dtype == torch.float32 else torch.empty(out_features, in_features, dtype=compute_dtype)
        self.register_buffer("compute_weight", copy, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) of the compute dtype to (..., out)."""
        return linear(x, self.weight, self.compute_weight)


def linear(x: Tensor, weight: Tensor, compute_weight: Tensor | None) -> Tensor:
    """`x @ weight.T`, computed with `compute_weight` where there is one."""
    if compute_weight is None:
        return torch.nn.functional.linear(x, weight)
    return _MixedLinear.apply(x, weight, compute_weight)


class _MixedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, compute_weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, compute_weight)
        return torch.nn.functional.linear(x, compute_weight)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, compute_weight = ctx.saved_tensors
        dx = dy @ compute_weight if ctx.needs_input_grad[0] else None
        dw = _weight_gradient(dy.flatten(0, -2), x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return dx, dw, None


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy^T x (out, in) in float32 from half-precision dy (M, out) and x (M, in)."""
    if dy.device.type != "cpu":  # only cuBLAS writes float32 from half-precision operands
        return torch.mm(dy.T, x, out_dtype=torch.float32)
    return dy.T.float() @ x.float()
