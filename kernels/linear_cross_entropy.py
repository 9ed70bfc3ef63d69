"""The loss head: a linear map to the vocabulary and the cross entropy of it, never holding the logits of the whole batch.

Forward, for each row n that is not ignored, with z_n = W h_n in float32:
    loss_n = logsumexp_v(z_nv) - z_n[target_n]
    loss   = sum_n loss_n  [ / number of rows that are not ignored ]
Backward, with p_n = softmax(z_n), g the upstream gradient and c = g [ / number of rows that are not ignored ]:
    dz_n = p_n - onehot(target_n)      0 for ignored rows; not yet scaled: divided by N it would round to 0 in float16
    dh_n = c * (dz_n W)
    dW   = c * sum_n dz_n^T h_n        accumulated in float32

The gradients are formed in the forward pass, while a chunk's logits are there, and scaled by c in the backward pass.
Saved: dh (N, D) in hidden's dtype and dW (V, D) in float32. A call that needs no gradient computes none.
"""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum")

# Logits held at a time, in bytes of float32.
CHUNK_BYTES = 256 * 2**20


def check_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str, dtypes=DTYPES) -> None:
    """Raise ValueError, naming the argument, unless shapes, dtypes and devices are those of `linear_cross_entropy`."""
    op = "linear_cross_entropy"
    if hidden.ndim != 2:
        raise ValueError(f"{op}: hidden must have shape (N, D), got {tuple(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}, wanted (V, D) with D of hidden {tuple(hidden.shape)}"
        )
    if targets.ndim != 1 or targets.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"{op}: targets has shape {tuple(targets.shape)}, wanted (N,) with N of hidden {tuple(hidden.shape)}"
        )
    if hidden.dtype not in dtypes:
        raise ValueError(f"{op}: hidden has dtype {hidden.dtype}, wanted one of {', '.join(map(str, dtypes))}")
    if weight.dtype not in (hidden.dtype, torch.float32):
        raise ValueError(
            f"{op}: weight has dtype {weight.dtype}, wanted that of hidden ({hidden.dtype}) or torch.float32"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"{op}: targets has dtype {targets.dtype}, wanted torch.int64")
    for name, x in (("weight", weight), ("targets", targets)):
        if x.device != hidden.device:
            raise ValueError(f"{op}: {name} is on {x.device}, hidden is on {hidden.device}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction is {reduction!r}, wanted one of {', '.join(map(repr, REDUCTIONS))}")


def chunk_rows(vocab_size: int) -> int:
    """Rows of hidden whose float32 logits fit CHUNK_BYTES; at least one."""
    return max(1, CHUNK_BYTES // (4 * max(1, vocab_size)))


def linear_cross_entropy_torch(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Cross entropy of `hidden @ weight.T`, in nats.

    hidden: (N, D). weight: (V, D), of hidden's dtype or float32 (then used in hidden's dtype, its gradient float32).
    targets: (N,) int64, in [0, V) or `ignore_index`. reduction: "mean" over targets that are not ignored, or "sum".
    Returns a 0-d float32; 0 with zero gradients where all targets are ignored. float64 is accepted as the reference of tests.
    """
    check_linear_cross_entropy(hidden, weight, targets, reduction, dtypes=(*DTYPES, torch.float64))
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss_sum, count = _LossHead.apply(hidden, weight, targets, ignore_index, needs_grad)
    return loss_sum / count.clamp(min=1) if reduction == "mean" else loss_sum


class _LossHead(torch.autograd.Function):
    """Sum of the losses and the number of targets that count; the mean is taken outside, where autograd scales for us."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, needs_grad: bool):
        used_weight = weight.to(hidden.dtype)
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        loss_sum = torch.zeros((), dtype=accumulate, device=hidden.device)
        dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_grad else None
        dweight = torch.zeros_like(weight, dtype=accumulate) if needs_grad else None
        rows = chunk_rows(weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            h, target = hidden[start : start + rows], targets[start : start + rows]
            valid = target != ignore_index
            index = torch.where(valid, target, 0).unsqueeze(1)  # [rows, 1]
            logits = (h @ used_weight.T).to(accumulate)
            log_p = torch.log_softmax(logits, dim=-1)
            target_log_p = log_p.gather(1, index)
            loss_sum = loss_sum - torch.where(valid, target_log_p.squeeze(1), 0.0).sum()
            if needs_grad:
                dlogits = log_p.exp_()
                dlogits.scatter_(1, index, target_log_p.exp() - 1)
                dlogits = torch.where(valid.unsqueeze(1), dlogits, 0.0).to(hidden.dtype)
                dhidden[start : start + rows] = dlogits @ used_weight
                dweight += _matmul_float32(dlogits.T, h, accumulate)
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        count = (targets != ignore_index).sum()
        ctx.mark_non_differentiable(count)
        return loss_sum.to(torch.float32) if accumulate == torch.float32 else loss_sum, count

    @staticmethod
    def backward(ctx, grad: Tensor, _count_grad):
        dhidden, dweight = ctx.saved_tensors
        # Scaled in float32: a GradScaler's 65536 is infinity in float16.
        dhidden = (dhidden.to(dweight.dtype) * grad).to(dhidden.dtype)
        dweight = (dweight * grad).to(ctx.weight_dtype)
        return dhidden, dweight, None, None, None


def _matmul_float32(a: Tensor, b: Tensor, accumulate: torch.dtype) -> Tensor:
    """A @ b without rounding the sums to half precision: cuBLAS can write float32, the CPU multiplies upcast operands."""
    if a.dtype == accumulate:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=accumulate)
    return a.to(accumulate) @ b.to(accumulate)
