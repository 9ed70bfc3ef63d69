"""RoPE and attention of a packed qkv as one op, whose backward writes the packed gradient.

Forward: `rope`, then `attention`; the mathematics is in ../rope.py and op.py. Backward: the gradients of the rotated queries and
keys are turned back by the programs that hold them, and stored where they belong in the gradient of qkv:

    dqkv = [turned back dq', turned back dk', dv]

So rope has no backward pass of its own: its 2 e N (H + 2 Hkv) D bytes, for N = B T positions of e bytes an element, are not
read and written again. Saved: q', k', o and lse, and qkv for the values in it.

The rounding is that of the two ops apart: dq' and dk' to the dtype of qkv, then what they are turned to.
"""

import torch
from torch import Tensor

from kernels.attention.backward import _attention_backward
from kernels.attention.forward import _attention
from kernels.attention.op import check_first_key, check_head_dim
from kernels.launch import KERNEL_DTYPES, check_usable
from kernels.rope import _check, _rope, _split


class _RopeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, first_key: Tensor | None
    ) -> Tensor:
        q, k = _rope(qkv, cos, sin, n_heads, n_kv_heads)
        v = _split(qkv, n_heads, n_kv_heads)[2]
        o, lse = _attention(q, k, v, first_key)
        ctx.save_for_backward(qkv, q, k, o, lse, first_key, cos, sin)
        ctx.heads = n_heads, n_kv_heads
        return o

    @staticmethod
    def backward(ctx, do: Tensor):
        qkv, q, k, *others = ctx.saved_tensors
        # Of qkv, which is an input: so a second derivative, which this op lacks, is asked for and refused.
        v = _split(qkv, *ctx.heads)[2]
        dqkv, _, _ = _attention_backward(do, q, k, v, *others)
        return dqkv.flatten(-2), None, None, None, None, None


def rope_attention_triton(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, first_key: Tensor | None = None
) -> Tensor:
    """`rope`, then `attention`, by Triton kernels; the twin is the two torch twins in turn.

    qkv: (B, T, (H + 2 Hkv) D), D a multiple of 4 from 16 to 256. cos, sin: (T, D/2) float32. n_heads, n_kv_heads: H, a multiple
    of Hkv. first_key: (B, T) int32 or None, as in `attention`. Returns o (B, T, H, D), contiguous, of qkv's dtype.
    Raises ValueError on anything else.
    """
    _check(qkv, cos, sin, n_heads, n_kv_heads, KERNEL_DTYPES, op="rope_attention")
    batch, time, packed = qkv.shape
    check_head_dim("rope_attention", "qkv", packed // (n_heads + 2 * n_kv_heads))
    if n_heads % n_kv_heads:
        raise ValueError(f"rope_attention: n_heads is {n_heads}, wanted a multiple of n_kv_heads, {n_kv_heads}")
    check_first_key("rope_attention", first_key, batch, time, qkv.device)
    check_usable("rope_attention", qkv.device)
    return _RopeAttention.apply(qkv, cos, sin, n_heads, n_kv_heads, first_key)
