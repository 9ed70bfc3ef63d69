"""The one linear map of the model: float32 parameters, half-precision arithmetic, float32 weight gradients.

forward   y  = x W'^T            W' is the compute-dtype copy of W, written once a step
backward  dx = dy W'             in the compute dtype
          dW = dy^T x            sums and result in float32, never rounded to the compute dtype

In half precision dW goes straight to where a training step sums its gradients: the product adds to what is there, and no dW is
written, read and added in a pass of its own. In float32 autograd adds it.
"""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from kernels import Ops
from kernels.launch import NAMESPACE, check_first_derivative


class Weight(nn.Module):
    """A matrix of the model: a float32 parameter, and what belongs to it.

    Attributes:
        weight: (out, in) float32, the parameter.
        compute_weight: (out, in) in the compute dtype, what the forward pass reads: a copy that `Llama.refresh_compute_weights`
            writes and that is not saved with the model. None in float32, and where the weight is read as it is.
        gradient_sum: (out, in) float32, where a trainer sums the gradients of a step, `weight.grad`'s memory; what
            computes the gradient may add it there in autograd's stead, in the passes of a trainer and in no other: only a
            trainer keeps `weight.grad` where it is. None where there is no trainer.
    """

    def __init__(self, out_features: int, in_features: int, copy_dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        copy = None if copy_dtype == torch.float32 else torch.empty(out_features, in_features, dtype=copy_dtype)
        self.register_buffer("compute_weight", copy, persistent=False)
        self.gradient_sum: Tensor | None = None

    def bind(self, copy: Tensor | None, gradient_sum: Tensor) -> None:
        """Let the copy live, and the gradients be summed, where these tensors are; copy is None where there is none."""
        assert (copy is None) == (self.compute_weight is None)
        self.compute_weight = copy
        self.gradient_sum = gradient_sum

    def __getstate__(self) -> dict:
        """What a copy of the model is made from: what is bound is a trainer's, and stays with this one."""
        state = self.__dict__ | {"gradient_sum": None}
        if self.compute_weight is not None:
            state["_buffers"] = self._buffers | {"compute_weight": self.compute_weight.clone()}
        return state


class Head(Weight):
    """The output head of its own, where it is not tied to the embedding."""

    def forward(self, ops: Ops, hidden: Tensor, *loss) -> Tensor:
        """As `read_out`."""
        return read_out(self, ops, hidden, *loss)


def read_out(
    matrix: Weight,
    ops: Ops,
    hidden: Tensor,
    targets: Tensor | None = None,
    reduction: str = "mean",
    scale: Tensor | None = None,
) -> Tensor:
    """Logits (B, T, V) float32 of hidden (B, T, dim), or their loss where targets are given: as in `Llama.forward`."""
    if targets is None:
        return linear(hidden, matrix.weight, matrix.compute_weight).float()
    return ops.linear_cross_entropy(
        hidden.flatten(0, 1),
        matrix.weight,
        targets.flatten(),
        reduction=reduction,
        compute_weight=matrix.compute_weight,
        gradient_sum=None if scale is None else matrix.gradient_sum,
        scale=scale,
    )


class Linear(Weight):
    """A map (..., in) -> (..., out) without a bias. In half precision a trainer's pass adds its gradient to `gradient_sum`."""

    def __init__(self, in_features: int, out_features: int, copy_dtype: torch.dtype):
        super().__init__(out_features, in_features, copy_dtype)

    def forward(self, x: Tensor, to_sum: bool = False) -> Tensor:
        """(..., in) of the compute dtype to (..., out). to_sum: the gradient may go to `gradient_sum`, past autograd."""
        return linear(x, self.weight, self.compute_weight, self.gradient_sum if to_sum else None)


class Embedding(Weight):
    """The matrix whose rows are looked up, and which a tied head reads as well.

    Attributes:
        looked_up_gradient_sum: the memory of `gradient_sum` as a tensor of another storage, for the look-up's gradient. The
            head adds its own in the forward pass, the look-up in the backward pass: of one tensor that both change torch.compile
            makes two copies a pass. No graph touches it through both.
    """

    looked_up_gradient_sum: Tensor | None = None

    def forward(self, ops: Ops, tokens: Tensor, compute_dtype: torch.dtype, to_sum: bool = False) -> Tensor:
        """The rows of tokens (B, T) int64: (B, T, dim) of compute_dtype. to_sum: as in `Linear`."""
        gradient_sum = self.looked_up_gradient_sum if to_sum else None
        return ops.embedding(tokens, self.weight, compute_dtype, self.compute_weight, gradient_sum)

    def bind(self, copy: Tensor | None, gradient_sum: Tensor) -> None:
        """As `Weight.bind`."""
        super().bind(copy, gradient_sum)
        on_meta = gradient_sum.device.type == "meta"  # no memory to share
        self.looked_up_gradient_sum = gradient_sum if on_meta else torch.from_dlpack(gradient_sum)

    def __getstate__(self) -> dict:
        """As `Weight.__getstate__`."""
        return super().__getstate__() | {"looked_up_gradient_sum": None}


def linear(x: Tensor, weight: Tensor, compute_weight: Tensor | None, gradient_sum: Tensor | None = None) -> Tensor:
    """`x @ weight.T` in the dtype of x; in half precision the gradient of weight is float32, or added to `gradient_sum`, if given.

    compute_weight: weight in the dtype of x, where there is a copy. weight itself may be in half precision, as FSDP gathers it.
    """
    if compute_weight is None:
        if x.dtype == weight.dtype == torch.float32:
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
            dy_t, x = dy.flatten(0, -2).T, x.flatten(0, -2)
            if ctx.gradient_sum is None:
                dw = _product(dy_t, x)
            else:
                add_product(ctx.gradient_sum, dy_t, x)
        return dx, dw, None, None


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
