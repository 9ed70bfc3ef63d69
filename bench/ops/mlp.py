"""The sheet of the feed-forward as one op, of models that are narrow enough."""

import torch

import kernels
from bench.ops.sheet import FLOAT32, Case, Peer, Sheet, kernel, leaf, twins
from kernels.grammar import MLP_WIDEST
from kernels.linear import linear
from model.flops import Cost
from training.config import TrainConfig


def mlp(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    """Forward, backward, and the products of the weights' gradients, which are float32 and written; as kernels/mlp/op.py counts."""
    x = leaf(c.batch_size, c.max_seq_len, c.dim, dtype=dtype, device=device)
    weights = [leaf(*s, dtype=torch.float32, device=device) for s in ((2 * c.hidden_dim, c.dim), (c.dim, c.hidden_dim))]
    copies = tuple(w.detach().to(dtype) for w in weights) if dtype != torch.float32 else (None, None)
    rows, elements = c.batch_size * c.max_seq_len, sum(w.numel() for w in weights)
    flops, of_weights = 2 * rows * elements, elements * dtype.itemsize
    forward = Cost(rows * (2 * c.dim + 2 * c.hidden_dim) * dtype.itemsize + of_weights, flops)
    backward = Cost(rows * (2 * c.dim + 5 * c.hidden_dim) * dtype.itemsize + of_weights, flops)
    gradients = Cost(rows * (2 * c.dim + 3 * c.hidden_dim) * dtype.itemsize + elements * FLOAT32, flops)
    costs = {"forward": forward, "backward": backward + gradients}
    return Case(f"{rows} x {c.dim} x {c.hidden_dim}", (x, *weights), costs, {"compute_weights": copies})


def in_turn(case: Case):
    """The library's products and SwiGLU's kernel: what `all,-mlp` trains with."""

    def function(x, gate_up_weight, down_weight, compute_weights):
        gate_up = linear(x, gate_up_weight, compute_weights[0])
        return linear(kernels.TRITON.swiglu(gate_up), down_weight, compute_weights[1])

    return function


SHEETS = {
    "mlp": Sheet(
        mlp,
        twins(kernels.TORCH.mlp) | {"in-turn": Peer(in_turn, needs_gpu=True)} | kernel(kernels.TRITON.mlp),
        sizes=("reference",),
        serves=lambda c: c.dim <= MLP_WIDEST,
    ),
}
