"""The matrices of the model, and what belongs to each: its copy in the compute dtype, and where its gradients are summed."""

import torch
from torch import Tensor, nn

from kernels import Ops
from kernels.linear import linear


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
