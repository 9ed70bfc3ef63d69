"""The sheet of the embedding, on tokens about as frequent as those of text."""

import torch

import kernels
from bench.ops.sheet import FLOAT32, Case, Sheet, kernel, leaf, moved, twins
from training.config import TrainConfig


def embedding(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    """Forward the rows of the tokens read and written; backward dx read and the rows of the float32 gradient added to.

    Tokens are of frequency 1 / rank: what sums the gradient must not wait for the frequent ones.
    """
    shape, vocab = (c.batch_size, c.max_seq_len), c.vocab_size
    tokens = (vocab ** torch.rand(shape, device=device)).long() - 1
    weight = leaf(vocab, c.dim, dtype=torch.float32, device=device)
    copy = None if dtype == torch.float32 else weight.detach().to(dtype)
    x = tokens.numel() * c.dim * dtype.itemsize
    touched = 2 * FLOAT32 * min(tokens.numel(), vocab) * c.dim
    costs = moved(tokens.nbytes + 2 * x, tokens.nbytes + x + touched)
    return Case(f"{tokens.numel()} x {vocab} x {c.dim}", (tokens, weight, dtype, copy), costs)


SHEETS = {
    "embedding": Sheet(
        embedding,
        twins(kernels.TORCH.embedding) | kernel(kernels.TRITON.embedding),
        calls=lambda c: 1,
    ),
}
