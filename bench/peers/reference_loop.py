"""The step that this project started from, written out again as it was: the yardstick for "not slower than before".

A Llama with a GEMM a projection, complex RoPE, repeated keys and values, all logits at once and autocast, and a loop that divides
the loss by the number of micro-steps. No line of it is used for training.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import LlamaConfig


class _Norm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class _Layer(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.c = c
        kv = c.n_kv_heads * c.head_dim
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(c.dim, n, bias=False) for n in (c.dim, kv, kv, c.dim))
        self.w1, self.w3 = (nn.Linear(c.dim, c.hidden_dim, bias=False) for _ in range(2))
        self.w2 = nn.Linear(c.hidden_dim, c.dim, bias=False)
        self.attention_norm, self.ffn_norm = _Norm(c.dim, c.norm_eps), _Norm(c.dim, c.norm_eps)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        c, h = self.c, self.attention_norm(x)
        q, k, v = (w(h).unflatten(-1, (-1, c.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = (_rotate(t, turns).type_as(v) for t in (q, k))
        k, v = (t.repeat_interleave(c.n_heads // c.n_kv_heads, dim=2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.wo(o.transpose(1, 2).flatten(-2))
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


def _rotate(x: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2)


class ReferenceLlama(nn.Module):
    """The model of the reference run; same parameters and arithmetic as `model.Llama`, other memory traffic."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.embedding = nn.Embedding(c.vocab_size, c.dim)
        self.layers = nn.ModuleList(_Layer(c) for _ in range(c.n_layers))
        self.norm = _Norm(c.dim, c.norm_eps)
        self.head = nn.Linear(c.dim, c.vocab_size, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.embedding.weight
        frequencies = c.rope_theta ** (-torch.arange(0, c.head_dim, 2).float() / c.head_dim)
        angles = torch.outer(torch.arange(c.max_seq_len).float(), frequencies)
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), persistent=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of (B, T) tokens against (B, T) targets."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.turns[: tokens.shape[1]])
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class AutocastStep:
    """Forward, backward, clip and AdamW of any model as the reference's loop does them, under autocast in half precision.

    model: from (B, T) tokens and (B, T) targets to their mean loss.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype, compiled: bool = False):
        self.model = model
        self.loss = torch.compile(model) if compiled else model
        decay = [p for p in model.parameters() if p.ndim >= 2]
        other = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.95), fused=device.type == "cuda")
        half = dtype != torch.float32
        self.autocast = (lambda: torch.autocast(device.type, dtype)) if half else contextlib.nullcontext

    def __call__(self, micro_batches: list[tuple[Tensor, Tensor]]) -> float:
        """One optimizer step; the loss of its last micro-batch, which is what the reference logs."""
        for tokens, targets in micro_batches:
            with self.autocast():
                loss = self.loss(tokens, targets) / len(micro_batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item() * len(micro_batches)
