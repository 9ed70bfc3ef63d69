"""Text from a model: one forward pass over the prompts, then a token of each at a time against a cache of keys and values.

Prompts of a batch may have any lengths. They are padded behind, where no token looks, and each has positions of its own: what it
gets is what it would get alone, to the rounding of products of other shapes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kernels import TORCH, Ops
from model.linear import linear
from model.llama import Llama
from model.sampling import Sampling, draw

# ---------------------------------------------------------------------------------------------------------------- cache


class KVCache:
    """Keys and values of the tokens so far of `batch` sequences, with room for `capacity` tokens each.

    Attributes:
        keys, values: by layer, (B, capacity, Hkv, D) in the model's compute dtype; the tokens of a head lie side by side.
        n_keys: (B,) int32, how many tokens of each sequence there are. What lies behind them is finite.
    """

    def __init__(self, model: Llama, batch: int, capacity: int):
        config, device = model.config, model.cos.device
        shape = (batch, config.n_kv_heads, capacity, config.head_dim)
        of_layers = [torch.zeros(2, *shape, dtype=model.compute_dtype, device=device) for _ in range(config.n_layers)]
        self.keys = [of_layer[0].transpose(1, 2) for of_layer in of_layers]
        self.values = [of_layer[1].transpose(1, 2) for of_layer in of_layers]
        self.n_keys = torch.zeros(batch, dtype=torch.int32, device=device)

    @property
    def capacity(self) -> int:
        """Tokens that a sequence can have."""
        return self.keys[0].shape[1]


@dataclass(frozen=True)
class _OfPrompts:
    """`rope_attention` of whole prompts, which puts their keys and values into an empty cache."""

    ops: Ops
    keys: Tensor
    values: Tensor
    padding: Tensor  # (B, T, 1, 1) bool

    def __call__(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, first_key: Tensor | None = None
    ) -> Tensor:
        q, k, v = self.ops.rope(qkv, cos, sin, n_heads, n_kv_heads)
        # In float16 a token of the padding may be infinite, and a weight of zero times that is no number.
        k, v = k.masked_fill(self.padding, 0), v.masked_fill(self.padding, 0)
        self.keys[:, : k.shape[1]], self.values[:, : k.shape[1]] = k, v
        return self.ops.attention(q, k, v)


@dataclass(frozen=True)
class _OfOneToken:
    """`rope_attention` of one token of each sequence, whose keys and values are put behind those in the cache.

    The sequences stand where time does elsewhere, in a batch of one: so each has its row of the tables.
    """

    ops: Ops
    keys: Tensor
    values: Tensor
    sequences: Tensor  # 0 .. B - 1
    slots: Tensor  # (B,) int64, where the tokens go
    n_keys: Tensor  # (B,) int32, with them

    def __call__(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, first_key: Tensor | None = None
    ) -> Tensor:
        q, k, v = self.ops.rope(qkv, cos, sin, n_heads, n_kv_heads)
        self.keys[self.sequences, self.slots] = k[0]
        self.values[self.sequences, self.slots] = v[0]
        return self.ops.decode_attention(q[0], self.keys, self.values, self.n_keys)[None]


def prefill(model: Llama, tokens: Tensor, lengths: Tensor, cache: KVCache, ops: Sequence[Ops]) -> Tensor:
    """Logits (B, V) float32 of the tokens that follow the prompts, whose keys and values fill the cache, empty before.

    tokens: (B, T) int64, T at most the cache's capacity. lengths: (B,) int64, tokens of each; those behind are padding.
    ops: `n_layers + 1` of them, as a model has.
    """
    n = tokens.shape[1]
    padding = (torch.arange(n, device=tokens.device) >= lengths[:, None])[:, :, None, None]
    attend = [_OfPrompts(*parts, padding) for parts in zip(ops, cache.keys, cache.values, strict=False)]
    hidden = _hidden(model, tokens, model.cos[:n], model.sin[:n], ops, attend)
    cache.n_keys.copy_(lengths)
    return _logits(model, hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1])


def decode(model: Llama, tokens: Tensor, cache: KVCache, ops: Sequence[Ops]) -> Tensor:
    """Logits (B, V) float32 of the tokens that follow `tokens` (B,) int64, one of each sequence, which are put into the cache.

    In a cache that is full a sequence's last token is put over the one before: its text has ended.
    """
    slots = cache.n_keys.long().clamp(max=cache.capacity - 1)
    cache.n_keys.copy_(slots + 1)
    sequences = torch.arange(len(tokens), device=tokens.device)
    attend = [
        _OfOneToken(*parts, sequences, slots, cache.n_keys)
        for parts in zip(ops, cache.keys, cache.values, strict=False)
    ]
    return _logits(model, _hidden(model, tokens[None], model.cos[slots], model.sin[slots], ops, attend)[0])


def _hidden(
    model: Llama, tokens: Tensor, cos: Tensor, sin: Tensor, ops: Sequence[Ops], attend: Sequence[Callable]
) -> Tensor:
    """As `Llama.hidden`, with these tables and, layer by layer, this in place of `rope_attention`."""
    embedding = model.embedding
    residual = ops[-1].embedding(tokens, embedding.weight, model.compute_dtype, embedding.compute_weight)
    branch = None
    for layer, its_ops, its_attention in zip(model.layers, ops, attend, strict=False):
        branch, residual = layer(replace(its_ops, rope_attention=its_attention), branch, residual, cos, sin)
    y, _ = ops[-1].add_rms_norm(branch, residual, model.final_norm, model.config.norm_eps)
    return y


def _logits(model: Llama, hidden: Tensor) -> Tensor:
    return linear(hidden, model.output.weight, model.output.compute_weight).float()


# ------------------------------------------------------------------------------------------------------------- decoding


class Decoder:
    """A batch of sequences that grow by a token each a step.

    All that `step` reads and writes stays where it is, and nothing in it waits for the device: it can be compiled, and recorded as
    a CUDA graph that serves for every step.

    Attributes:
        tokens: (B,) int64, the last token of each sequence, drawn and not yet in the cache.
        uniform: (B,) float64, what the next draw is made with: numbers in [0, 1).
    """

    def __init__(
        self,
        model: Llama,
        prompts: Sequence[Sequence[int]],
        capacity: int,
        sampling: Sampling,
        ops: Sequence[Ops] | None = None,
    ):
        """capacity: tokens that a sequence may come to have; ops: as those of a model, the torch twins if not given."""
        device = model.cos.device
        self._model, self._sampling = model, sampling
        self._ops = tuple(ops or [TORCH] * (model.config.n_layers + 1))
        self._cache = KVCache(model, len(prompts), capacity)
        lengths = [len(prompt) for prompt in prompts]
        padded = [[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts]
        self._prompts, self._lengths = torch.tensor(padded, device=device), torch.tensor(lengths, device=device)
        self.tokens = torch.zeros(len(prompts), dtype=torch.int64, device=device)
        self.uniform = torch.zeros(len(prompts), dtype=torch.float64, device=device)
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)
            for seen, prompt in zip(self._seen, prompts, strict=True):
                seen[torch.tensor(prompt, device=device)] = True

    def start(self) -> None:
        """Read the prompts and draw the first token after each."""
        self._draw(prefill(self._model, self._prompts, self._lengths, self._cache, self._ops))

    def step(self) -> None:
        """Put the last tokens into the cache and draw the next ones."""
        self._draw(decode(self._model, self.tokens, self._cache, self._ops))

    def _draw(self, logits: Tensor) -> None:
        self.tokens.copy_(draw(logits, self.uniform, self._sampling, self._seen))
        if self._seen is not None:
            self._seen.scatter_(1, self.tokens[:, None], True)


def uniform_numbers(prompts: Sequence[Sequence[int]], n: int, seed: int) -> Tensor:
    """n numbers in [0, 1) for each prompt, float64 (prompts, n): a function of the seed and of how many equal ones come before it.

    So a prompt gets alone what it gets in a batch, and one that is given twice gets two texts.
    """
    before: dict[tuple[int, ...], int] = {}
    rows = []
    for prompt in map(tuple, prompts):
        copies = before[prompt] = before.get(prompt, -1) + 1
        (state,) = np.random.SeedSequence([seed, copies]).generate_state(1, np.uint64)
        rows.append(
            torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(int(state >> np.uint64(1))))
        )
    return torch.stack(rows)


@torch.no_grad()
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    seed: int = 0,
    stop_token: int | None = None,
    ops: Sequence[Ops] | None = None,
    wrap: Callable[[Callable[[], None]], Callable[[], None]] = lambda step: step,
    on_token: Callable[[int, int], bool] = lambda prompt, token: False,
    on_end: Callable[[int], None] = lambda prompt: None,
) -> list[list[int]]:
    """Tokens that continue each prompt (at least one token, e.g. BOS), up to `max_new_tokens`, a `stop_token` left out.

    A text ends early at the model's max_seq_len. Draws are from generators of their own: sampling in a training run changes
    nothing of it.

    ops: `n_layers + 1` of them, such as the model's own; the torch twins if not given. wrap: what makes of `Decoder.step` the
    function that is called for each token but the first: a compiled one, a captured one. on_token: is called with the number of a
    prompt and each of its tokens as they come, and says whether its text ends with it. on_end: is called once with the number of
    each prompt whose text has ended.
    Raises ValueError for no prompts, an empty one or one that fills max_seq_len, and for sampling options out of range.
    """
    sampling = sampling or Sampling()
    sampling.check()
    limit = model.config.max_seq_len
    if not prompts:
        raise ValueError("there are no prompts")
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) < limit:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; it must have from 1 to {limit - 1} (max_seq_len {limit})"
            )
    room = [min(max_new_tokens, limit - len(prompt)) for prompt in prompts]
    new: list[list[int]] = [[] for _ in prompts]
    if max(room) < 1:
        for i in range(len(prompts)):
            on_end(i)
        return new
    capacity = max(len(prompt) + n for prompt, n in zip(prompts, room, strict=True))
    uniform = uniform_numbers(prompts, max(room), seed).to(model.cos.device)
    decoder = Decoder(model, prompts, capacity, sampling, ops)
    step = wrap(decoder.step)
    growing = set(range(len(prompts)))
    was_training = model.training
    model.eval()
    try:
        for n in range(max(room)):
            decoder.uniform.copy_(uniform[:, n])
            if n:
                step()
            else:
                decoder.start()
            for i, token in enumerate(decoder.tokens.tolist()):
                if i in growing and token != stop_token:
                    new[i].append(token)
                if i in growing and (token == stop_token or on_token(i, token) or len(new[i]) == room[i]):
                    growing.remove(i)
                    on_end(i)
            if not growing:
                break
    finally:
        model.train(was_training)
    return new
