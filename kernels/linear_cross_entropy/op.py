"""The loss head: a linear map to the vocabulary and the cross entropy of it, never holding the logits of the whole batch.

Forward, for each row n that is not ignored, with z_n = W h_n:

    loss_n = logsumexp_v(z_nv) − z_n[target_n]
    loss   = Σ_n loss_n  [ / number of rows that are not ignored ]

Backward, with p_n = softmax(z_n), g the upstream gradient and c = g [ / number of rows that are not ignored ]:

    dz_n = p_n − onehot(target_n)      0 for ignored rows; not scaled by c, which would round it to 0 in float16
    dh_n = c (W^T dz_n)
    dW   = c Σ_n dz_n h_n^T            summed in float32

The gradients are formed in the forward pass, while a chunk's logits are there, and scaled by c in the backward pass. A
call that needs no gradient forms none. Saved: W^T dz (N, D) and Σ dz h^T (V, D), both float32 and rounded once, after c.

A training step knows g before the forward pass and says so (`scale`). Then c dz is what is written over the logits (float16 aside,
for the reason above), the products give the gradients themselves, that of hidden in its dtype, and dW is added where the step sums
its gradients (`gradient_sum`): no pass over them is left. Saved: the gradient of hidden.

Chunks are rows of hidden, few and large, from N, V and a memory budget, and such that their products fill the multiprocessors (see
`tiled_chunk_rows`). The products are torch's (cuBLAS); in between one Triton kernel reads each row of logits twice, up to V 8192
once, and writes dz over it. Logits are in hidden's dtype, as in a linear layer without this fusion; everything between them and
dz is float32. In float16 dz is held times 2^14, because a probability of 1e-7 is below float16's normal numbers and |dz| <= 1.

For e bytes an element of hidden, in C chunks, padding aside, with r = 2 readings of a row (1 up to V 8192):

                       FLOPs      bytes
    forward, alone     2 N D V    e (N D + C V D) + (1 + r) e N V         logits written, and read
    with gradients     6 N D V    e (2 N D + 2 C V D) + (4 + r) e N V     dz written, and read by two products
                                  + 4 N D + (8 C − 4) V D                 W^T dz; Σ dz h^T, which every chunk but the first reads
    backward           N D + V D  (4 + e) N D + 8 V D                     (4 + e) V D where weight has e bytes
    with scale and     6 N D V    e (2 N D + 2 C V D) + (4 + r) e N V     all there is: the backward pass moves nothing
    gradient_sum                  + e N D + 8 C V D

Memory beyond the arguments, at its largest, for a chunk of R rows:

    forward    4 (N D + V D) + e R V + 4 N      + e V D where a float32 weight has no copy in hidden's dtype
    backward   4 (N D + V D) + e N D            + e V D for a weight of e bytes, + 4 V D where the graph is retained
    with scale and gradient_sum    e N D + e R V + 4 N

A float32 gradient is multiplied by c in place, unless its graph is retained, since nobody else can see it. At N 8192, D
2048, V 128256 in bfloat16, R is 1664 and by these formulas they are 1.54 and 1.15 GB (1.68 for a bfloat16 weight,
whose gradient is rounded beside the sum). With scale and gradient_sum R is 4096, half the chunks, and they are 1.08 GB.
`F.cross_entropy(hidden @ weight.T, targets)` holds three tensors of the size of the logits when it differentiates
log-softmax: 6.30 GB.
"""

import torch
from torch import Tensor

from kernels.launch import KERNEL_DTYPES, REFERENCE_DTYPES, check_first_derivative, check_usable
from kernels.linear_cross_entropy.chunked import TritonLossHead, chunk_rows

REDUCTIONS = ("mean", "sum")

# ----------------------------------------------------------------------------------------------------------- torch twin


def linear_cross_entropy_torch(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    compute_weight: Tensor | None = None,
    gradient_sum: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Cross entropy of `hidden @ weight.T`, in nats.

    hidden: (N, D). weight: (V, D), of hidden's dtype or float32 (then used in hidden's dtype, its gradient float32).
    targets: (N,) int64, in [0, V) or `ignore_index`. reduction: "mean" over targets that are not ignored, or "sum".
    compute_weight: (V, D) in hidden's dtype, a copy of weight that is read in its stead, so that a float32 weight is not
    cast by every call. It gets no gradient; weight does.
    gradient_sum: (V, D) float32, dense, the memory of `weight.grad`. scale: 0-d float32, the very tensor with which the loss's
    `backward` will be called, and once. Given both, an op may add the gradient of weight to gradient_sum by itself, in the forward
    pass already, and give autograd none; backward raises if another gradient comes. This twin needs neither.
    Returns a 0-d float32; 0 with zero gradients where all targets are ignored. float64 is accepted as the reference of tests.
    """
    _check(hidden, weight, targets, reduction, compute_weight, gradient_sum, scale, REFERENCE_DTYPES)
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss_sum, count = _TorchLossHead.apply(hidden, weight, targets, ignore_index, compute_weight, needs_grad)
    return loss_sum / count.clamp(min=1) if reduction == "mean" else loss_sum


class _TorchLossHead(torch.autograd.Function):
    """Sum of the losses and the number of targets that count; the mean is taken outside, where autograd scales for us."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        compute_weight: Tensor | None,
        needs_grad: bool,
    ):
        used_weight = weight.to(hidden.dtype) if compute_weight is None else compute_weight
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        loss_sum = torch.zeros((), dtype=accumulate, device=hidden.device)
        dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_grad else None
        dweight = torch.zeros_like(weight, dtype=accumulate) if needs_grad else None
        rows = chunk_rows(hidden.shape[0], weight.shape[0], accumulate.itemsize)
        classes = torch.arange(weight.shape[0], device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            h, target = hidden[start : start + rows], targets[start : start + rows]
            valid = target != ignore_index
            index = torch.where(valid, target, 0).unsqueeze(1)  # [rows, 1]
            logits = (h @ used_weight.T).to(accumulate)
            log_p = torch.log_softmax(logits, dim=-1)
            target_log_p = log_p.gather(1, index)
            loss_sum = loss_sum - torch.where(valid, target_log_p.squeeze(1), 0.0).sum()
            if needs_grad:
                # No scatter: torch.compile fuses this, and under deterministic algorithms nothing in it waits for the device.
                dlogits = log_p.exp_().sub_((classes == index).to(torch.uint8))
                dlogits = dlogits.masked_fill_(~valid.unsqueeze(1), 0.0).to(hidden.dtype)
                dhidden[start : start + rows] = dlogits @ used_weight
                dweight += _matmul_float32(dlogits.T, h, accumulate)
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        count = (targets != ignore_index).sum()
        ctx.mark_non_differentiable(count)
        # Not cast to float32, which it is: torch 2.11 loses the gradient of an output that passes a cast to its own dtype.
        return loss_sum, count

    @staticmethod
    def backward(ctx, grad: Tensor, _count_grad):
        check_first_derivative("linear_cross_entropy")
        dhidden, dweight = ctx.saved_tensors
        # Scaled in float32: a GradScaler's 65536 is infinity in float16.
        dhidden = (dhidden.to(dweight.dtype) * grad).to(dhidden.dtype)
        dweight = (dweight * grad).to(ctx.weight_dtype)
        return dhidden, dweight, None, None, None, None


def _matmul_float32(a: Tensor, b: Tensor, accumulate: torch.dtype) -> Tensor:
    """a @ b without rounding the sums to half precision: cuBLAS can write float32, the CPU multiplies upcast operands."""
    if a.dtype == accumulate:
        return a @ b
    if a.device.type != "cpu":
        return torch.mm(a, b, out_dtype=accumulate)
    return a.to(accumulate) @ b.to(accumulate)


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    reduction: str,
    compute_weight: Tensor | None,
    gradient_sum: Tensor | None,
    scale: Tensor | None,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Raise ValueError, naming the argument, unless shapes, dtypes and devices are those of `linear_cross_entropy`."""
    op = "linear_cross_entropy"
    given = {"compute_weight": compute_weight, "gradient_sum": gradient_sum, "scale": scale}
    given = {name: x for name, x in given.items() if x is not None}
    for name, x in {"hidden": hidden, "weight": weight, "targets": targets, **given}.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{op}: {name} is a {type(x).__name__}, wanted a tensor")
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
    if compute_weight is not None and (compute_weight.shape != weight.shape or compute_weight.dtype != hidden.dtype):
        raise ValueError(
            f"{op}: compute_weight has shape {tuple(compute_weight.shape)} and dtype {compute_weight.dtype}, "
            f"wanted weight's {tuple(weight.shape)} and hidden's {hidden.dtype}"
        )
    for name, x, shape in (("gradient_sum", gradient_sum, weight.shape), ("scale", scale, ())):
        if x is not None and (x.shape != shape or x.dtype != torch.float32 or not x.is_contiguous()):
            raise ValueError(
                f"{op}: {name} has shape {tuple(x.shape)} and dtype {x.dtype}, wanted {tuple(shape)} of torch.float32, dense"
            )
    for name, x in {"weight": weight, "targets": targets, **given}.items():
        if x.device != hidden.device:
            raise ValueError(f"{op}: {name} is on {x.device}, hidden is on {hidden.device}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction is {reduction!r}, wanted one of {', '.join(map(repr, REDUCTIONS))}")


def linear_cross_entropy_triton(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    compute_weight: Tensor | None = None,
    gradient_sum: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """`linear_cross_entropy_torch` by cuBLAS and Triton kernels, but for float64.

    A target that is neither in [0, V) nor `ignore_index` makes the loss and the gradients NaN, without a sync and
    without a read or write out of bounds; the torch twin raises (on a GPU: ends the CUDA context).
    With `scale` the gradients are scaled where they are made, and with `gradient_sum` too added there. Not in float16, where
    they are formed unscaled.
    """
    _check(hidden, weight, targets, reduction, compute_weight, gradient_sum, scale, KERNEL_DTYPES)
    check_usable("linear_cross_entropy", hidden.device)
    want_dhidden, want_dweight = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    if not want_dhidden or hidden.dtype == torch.float16:
        scale = None
    if scale is None or not want_dweight:
        gradient_sum = None
    tensors = (hidden, weight, targets, compute_weight, gradient_sum, scale)
    return TritonLossHead.apply(*tensors, ignore_index, reduction == "mean", want_dhidden, want_dweight)
