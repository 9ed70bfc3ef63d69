"""Liger-Kernel's ops, under the signatures of `kernels.Ops`: an optional peer, `pip install '.[bench]'`.

https://github.com/linkedin/Liger-Kernel, 0.8.5 or newer. Each is called with the defaults that Liger itself calls it with
in a Llama; some of them write into what they are given: rope and rms_norm into the upstream gradients, the loss head into the
gradients that it saved. Liger's rope takes q and k, and makes dense copies of the slices of a packed product; its gradients are
put together by autograd. Both are in its time, as they are in that of whoever calls it in such a model.
"""

import importlib.util
from collections.abc import Callable

from torch import Tensor


def installed() -> bool:
    """Whether it is there; this does not import it."""
    return importlib.util.find_spec("liger_kernel") is not None


def ops() -> dict[str, Callable]:
    """Each op that Liger has, by our name for it."""
    from liger_kernel.ops import (
        LigerFusedAddRMSNormFunction,
        LigerFusedGateUpSiLUMulFunction,
        LigerFusedLinearCrossEntropyFunction,
        LigerRMSNormFunction,
        LigerRopeFunction,
    )

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return LigerRMSNormFunction.apply(x, weight, eps)

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps)

    def rope(qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        heads = qkv.unflatten(-1, (n_heads + 2 * n_kv_heads, -1))
        q, k, v = heads.split((n_heads, n_kv_heads, n_kv_heads), dim=2)
        q, k = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin, None, 1, q.shape[-1])
        return q.transpose(1, 2), k.transpose(1, 2), v

    def swiglu(gate_up: Tensor) -> Tensor:
        rows = gate_up.flatten(0, -2)  # of more dimensions it returns a gradient of another shape
        return LigerFusedGateUpSiLUMulFunction.apply(rows).unflatten(0, gate_up.shape[:-1])

    def linear_cross_entropy(
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int = -100,
        reduction: str = "mean",
        compute_weight: Tensor | None = None,
        gradient_sum: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        weight = weight.to(hidden.dtype)  # it multiplies one dtype; the gradient goes back through the cast
        # bias and class weights: none; z-loss and label smoothing: 0
        loss, *_ = LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, targets, None, None, ignore_index, 0.0, 0.0, reduction
        )
        return loss

    return {
        "rms_norm": rms_norm,
        "add_rms_norm": add_rms_norm,
        "rope": rope,
        "swiglu": swiglu,
        "linear_cross_entropy": linear_cross_entropy,
    }
