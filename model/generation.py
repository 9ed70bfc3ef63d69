"""Text from a model: one forward pass over the prompt, then a token at a time against a cache of keys and values."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import TORCH
from model.linear import linear
from model.llama import Llama


class KVCache:
    """Keys and values of the tokens so far: (layers, B, capacity, Hkv, D) each, in the model's compute dtype."""

    def __init__(self, model: Llama, batch: int, capacity: int):
        config = model.config
        shape = (config.n_layers, batch, capacity, config.n_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=model.compute_dtype, device=model.cos.device)
        self.values = torch.zeros_like(self.keys)
        self.length = 0


@torch.no_grad()
def decode(model: Llama, tokens: Tensor, cache: KVCache) -> Tensor:
    """Logits (B, V) float32 of the token that follows `tokens` (B, n), which are appended to the cache.

    n is the prompt's length at first and 1 from then on. Attention reads the cache, so it is not the training op; the torch
    twins serve for the rest, since a row of one token is no work for a kernel.
    """
    start, stop = cache.length, cache.length + tokens.shape[1]
    assert start == 0 or tokens.shape[1] == 1, "after the prompt, one token at a time"
    assert stop <= cache.keys.shape[2], "the cache is full"
    cos, sin = model.cos[start:stop], model.sin[start:stop]
    eps = model.config.norm_eps
    residual = F.embedding(tokens, model.embedding.weight).to(model.compute_dtype)
    for i, layer in enumerate(model.layers):
        qkv = layer.wqkv(TORCH.rms_norm(residual, layer.attention_norm, eps))
        q, k, v = TORCH.rope(qkv, cos, sin, layer.n_heads, layer.n_kv_heads)
        cache.keys[i, :, start:stop], cache.values[i, :, start:stop] = k, v
        q, k, v = (x.transpose(1, 2) for x in (q, cache.keys[i, :, :stop], cache.values[i, :, :stop]))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=start == 0, enable_gqa=q.shape[1] != k.shape[1])
        residual = residual + layer.wo(o.transpose(1, 2).flatten(-2))
        residual = residual + layer.feed_forward(TORCH, TORCH.rms_norm(residual, layer.ffn_norm, eps))
    cache.length = stop
    last = TORCH.rms_norm(residual[:, -1], model.final_norm, eps)
    return linear(last, model.output.weight, model.output.compute_weight).float()


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """Next tokens (B, 1) from logits (B, V). temperature 0 takes the likeliest; top_k 0 and top_p 1 keep all of them."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        # the likeliest tokens whose mass reaches top_p: a token stays while the mass before it is less
        outside = p.cumsum(-1) - p >= top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


@torch.no_grad()
def generate(
    model: Llama,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_token: int | None = None,
) -> list[int]:
    """Tokens that continue `prompt` (at least one token, e.g. BOS), up to `max_new_tokens`, a `stop_token` left out.

    Ends early at the model's max_seq_len. Draws from a generator of its own: sampling in a training run changes nothing of it.
    Raises ValueError for an empty prompt or one that fills max_seq_len, and for sampling options out of range.
    """
    limit = model.config.max_seq_len
    if not 1 <= len(prompt) < limit:
        raise ValueError(f"prompt has {len(prompt)} tokens; it must have from 1 to {limit - 1} (max_seq_len {limit})")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature} and top_k {top_k} must be at least 0, top_p {top_p} in (0, 1]")
    device = model.cos.device
    generator = torch.Generator(device).manual_seed(seed)
    capacity = min(limit, len(prompt) + max_new_tokens)
    cache = KVCache(model, 1, capacity)
    tokens = torch.tensor([prompt], device=device)
    new: list[int] = []
    was_training = model.training
    model.eval()
    try:
        while len(new) < capacity - len(prompt):
            tokens = sample(decode(model, tokens, cache), temperature, top_k, top_p, generator)
            token = int(tokens)
            if token == stop_token:
                break
            new.append(token)
    finally:
        model.train(was_training)
    return new
