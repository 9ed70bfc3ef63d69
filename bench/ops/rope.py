"""The sheet of RoPE, on the packed product of queries, keys and values."""

import torch

import kernels
from bench.ops.sheet import Case, Sheet, kernel, leaf, moved, of_liger, twins
from training.config import TrainConfig


def rope(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    """Forward q and k read and written; backward dq, dk, dv read and dqkv written; the tables in both."""
    heads, kv_heads, width = c.n_heads, c.n_kv_heads, c.head_dim
    qkv = leaf(c.batch_size, c.max_seq_len, (heads + 2 * kv_heads) * width, dtype=dtype, device=device)
    cos, sin = (torch.rand(c.max_seq_len, width // 2, device=device) for _ in range(2))
    turned, tables = qkv.nbytes * (heads + kv_heads) // (heads + 2 * kv_heads), cos.nbytes + sin.nbytes
    shape = f"{c.batch_size * c.max_seq_len} x ({heads} + 2 x {kv_heads}) x {width}"
    return Case(shape, (qkv, cos, sin, heads, kv_heads), moved(2 * turned + tables, 2 * qkv.nbytes + tables))


SHEETS = {
    "rope": Sheet(
        rope,
        twins(kernels.TORCH.rope) | of_liger("rope") | kernel(kernels.TRITON.rope),
    ),
}
