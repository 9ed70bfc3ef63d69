"""The sheet of SwiGLU, on the packed product of a feed-forward."""

import torch

import kernels
from bench.ops.sheet import Case, Sheet, kernel, leaf, moved, of_liger, twins
from training.config import TrainConfig


def swiglu(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    """Forward 2F read and F written; backward F and 2F read and 2F written."""
    gate_up = leaf(c.batch_size, c.max_seq_len, 2 * c.hidden_dim, dtype=dtype, device=device)
    half, rows = gate_up.nbytes // 2, c.batch_size * c.max_seq_len
    return Case(f"{rows} x 2 x {c.hidden_dim}", (gate_up,), moved(3 * half, 5 * half))


SHEETS = {
    "swiglu": Sheet(swiglu, twins(kernels.TORCH.swiglu) | of_liger("swiglu") | kernel(kernels.TRITON.swiglu)),
}
