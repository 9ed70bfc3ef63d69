"""The sheet of the loss head. Variants beside the common ones, of which `eager` and `compiled` are another function here:

eager, compiled           the matmul and F.cross_entropy that people write, which hold all logits
twin                      the torch twin, in chunks
F.linear_cross_entropy    torch 2.13's, with its chunks; without them it is `eager`
cut-cross-entropy         Apple's, which never writes the logits; half precision only
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from bench.ops.sheet import (
    FLOAT32,
    Case,
    Peer,
    Sheet,
    always,
    kernel,
    leaf,
    of_liger,
    of_newer_torch,
    packaged,
    twins,
)
from bench.peers import cut_cross_entropy
from kernels.launch import ceil_div
from kernels.linear_cross_entropy.chunked import IN_REGISTERS, chunk_rows
from model.flops import Cost
from training.config import TrainConfig


def linear_cross_entropy(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    """The weight is in hidden's dtype, not float32 as in the model: peers take it, and give its gradient, in no other way."""
    rows, vocab, e = c.batch_size * c.max_seq_len, c.vocab_size, dtype.itemsize
    hidden = leaf(rows, c.dim, dtype=dtype, device=device)
    weight = (torch.randn(vocab, c.dim, dtype=dtype, device=device) * c.dim**-0.5).requires_grad_()
    targets = torch.randint(vocab, (rows,), device=device)
    chunks, logits = ceil_div(rows, chunk_rows(rows, vocab, e)), rows * vocab * e
    reads = 1 if vocab <= IN_REGISTERS else 2
    evaluation = hidden.nbytes + chunks * weight.nbytes + (1 + reads) * logits
    gradients = FLOAT32 * hidden.numel() + (8 * chunks - 4) * weight.numel()
    scaling = (FLOAT32 + e) * (hidden.numel() + weight.numel())
    both = 2 * (hidden.nbytes + chunks * weight.nbytes) + (4 + reads) * logits + gradients + scaling
    product = 2 * rows * c.dim * vocab
    costs = {"evaluation": Cost(evaluation, product), "both": Cost(both, 3 * product)}
    return Case(f"{rows} x {c.dim} x {vocab}", (hidden, weight, targets), costs)


def as_in_the_model(c: TrainConfig) -> tuple[Tensor, Tensor]:
    """The loss of a float32 weight beside its copy in the compute dtype, on the meta device: in a step that gives the memory
    of the weight's gradient and the scale of the loss, and where neither is known before.
    """
    rows = c.batch_size * c.max_seq_len
    hidden = leaf(rows, c.dim, dtype=torch.bfloat16, device=torch.device("meta"))
    weight = leaf(c.vocab_size, c.dim, dtype=torch.float32, device=hidden.device)
    targets = torch.empty(rows, dtype=torch.int64, device=hidden.device)
    known = {"gradient_sum": torch.empty_like(weight), "scale": torch.empty((), device=hidden.device)}

    def loss(**known: Tensor) -> Tensor:
        op = kernels.TRITON.linear_cross_entropy
        return op(hidden, weight, targets, compute_weight=weight.bfloat16(), **known)

    return loss(**known), loss()


# ---------------------------------------------------------------------------------------------------------------- peers


def unchunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The loss head as people write it: logits of the whole batch, held three times when it is differentiated."""
    return F.cross_entropy(hidden @ weight.T, targets)


def in_chunks_of_torch(case: Case) -> Callable[..., Any]:
    """`F.linear_cross_entropy` with the chunks that torch chooses."""
    return functools.partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())


SHEETS = {
    "linear_cross_entropy": Sheet(
        linear_cross_entropy,
        {
            **twins(unchunked),
            "twin": Peer(always(kernels.TORCH.linear_cross_entropy)),
            "F.linear_cross_entropy": Peer(
                in_chunks_of_torch, lacks=of_newer_torch(hasattr(F, "linear_cross_entropy"))
            ),
            **packaged("cut-cross-entropy", cut_cross_entropy, "linear_cross_entropy", half_only=True),
            **of_liger("linear_cross_entropy"),
            **kernel(kernels.TRITON.linear_cross_entropy),
        },
        sizes=("8192x2048", "reference", "124m", "350m", "llama3.2-1b", "llama3.2-3b", "llama3.1-8b"),
        calls=lambda c: 1,
        launched=as_in_the_model,
    ),
}
