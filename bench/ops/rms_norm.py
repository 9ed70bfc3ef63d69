"""The sheets of RMSNorm: the norm, and the addition to the residual stream with the norm of the sum. Weights are float32."""

import torch

import kernels
from bench.ops.sheet import FLOAT32, Case, Sheet, kernel, leaf, moved, of_liger, packaged, twins
from bench.peers import quack
from training.config import TrainConfig


def rms_norm(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    """Forward x read, y and a statistic a row written; backward both and dy read, dx written."""
    rows = c.batch_size * c.max_seq_len
    x = leaf(c.batch_size, c.max_seq_len, c.dim, dtype=dtype, device=device)
    weight = torch.ones(c.dim, device=device, requires_grad=True)
    tensor, rstd = x.nbytes, FLOAT32 * rows
    return Case(f"{rows} x {c.dim}", (x, weight, c.norm_eps), moved(2 * tensor + rstd, 3 * tensor + rstd))


def add_rms_norm(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    """Forward x and residual read, y and sum written; backward sum, dy and dsum read, one gradient for both written."""
    case = rms_norm(c, dtype, device)
    x, weight, eps = case.arguments
    residual = leaf(*x.shape, dtype=dtype, device=device)
    n_bytes = 4 * x.nbytes + FLOAT32 * (x.numel() // c.dim)
    return Case(case.shape, (x, residual, weight, eps), moved(n_bytes, n_bytes))


SHEETS = {
    "rms_norm": Sheet(
        rms_norm,
        {
            **twins(kernels.TORCH.rms_norm),
            **of_liger("rms_norm"),
            **packaged("quack", quack, "rms_norm"),
            **kernel(kernels.TRITON.rms_norm),
        },
        calls=lambda c: 1,  # the first; each further one takes in the branch before it
    ),
    "add_rms_norm": Sheet(
        add_rms_norm,
        {
            **twins(kernels.TORCH.add_rms_norm),
            **of_liger("add_rms_norm"),
            **packaged("quack", quack, "add_rms_norm"),
            **kernel(kernels.TRITON.add_rms_norm),
        },
        calls=lambda c: 2 * c.n_layers,
    ),
}
