"""Text from a model: one forward pass over the prompts, then a token of each at a time against a cache of keys and values.

Prompts of a batch may have any lengths. They are padded behind, where no token looks, and each has positions of its own: what it
gets is what it would get alone, to the rounding of products of other shapes.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kernels import TORCH, Ops
from kernels.linear import linear
from model.llama import Llama
from model.sampling import Sampling, draw

# ---------------------------------------------------------------------------------------------------------------- cache


class KVCache:
    """Keys and values of the tokens so far of `batch` sequences, with room for `capacity` tokens each.

    Attributes:
        keys, values: by layer, (B, capacity, Hkv, D) in the model's compute dtype; the tokens of a head lie side by side.
        n_keys: (B,) int32, how many tokens of each sequence there are. What lies behind them is finite.
        slots: (B,) int64, where the last token of each sequence was put.
        sequences: (B,) int64, the numbers 0 .. B - 1, which with `slots` index keys and values.
    """

    def __init__(self, model: Llama, batch: int, capacity: int):
        config, device = model.config, model.cos.device
        shape = (2, batch, config.n_kv_heads, capacity, config.head_dim)
        layers = [torch.zeros(shape, dtype=model.compute_dtype, device=device) for _ in range(config.n_layers)]
        self.keys, self.values = ([layer[part].transpose(1, 2) for layer in layers] for part in (0, 1))
        self.n_keys = torch.zeros(batch, dtype=torch.int32, device=device)
        self.slots = torch.zeros(batch, dtype=torch.int64, device=device)
        self.sequences = torch.arange(batch, device=device)

    @property
    def capacity(self) -> int:
        """Tokens that a sequence can have."""
        return self.keys[0].shape[1]

    def keeping(self, ops: Sequence[Ops], attention: Callable) -> list[Ops]:
        """`ops` of the layers and of what is outside them, in whose layers `attention` stands in place of `rope_attention`."""
        layers = range(len(self.keys))
        return [replace(ops[i], rope_attention=attention(ops[i], self, i)) for i in layers] + [ops[-1]]


@dataclass(eq=False)  # told apart by what they are: torch 2.11 asks for the hash of what it has yet to fill
class OfPrompts:
    """`rope_attention` of whole prompts, (B, T, ...), which puts their keys and values into the cache, empty before."""

    ops: Ops
    cache: KVCache
    layer: int

    def __call__(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, first_key: Tensor | None = None
    ) -> Tensor:
        q, k, v = self.ops.rope(qkv, cos, sin, n_heads, n_kv_heads)
        n = k.shape[1]
        padding = torch.arange(n, device=k.device) >= self.cache.n_keys[:, None]
        # In float16 a token of the padding may be infinite, and a weight of zero times that is no number.
        k, v = (x.masked_fill(padding[:, :, None, None], 0) for x in (k, v))
        self.cache.keys[self.layer][:, :n], self.cache.values[self.layer][:, :n] = k, v
        return self.ops.attention(q, k, v)


@dataclass(eq=False)
class OfOneToken:
    """`rope_attention` of one token of each sequence, whose keys and values are put into the cache's `slots`.

    The sequences stand where time does elsewhere, in a batch of one: so each has its row of the tables.
    """

    ops: Ops
    cache: KVCache
    layer: int

    def __call__(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, first_key: Tensor | None = None
    ) -> Tensor:
        q, k, v = self.ops.rope(qkv, cos, sin, n_heads, n_kv_heads)
        cache, keys, values = self.cache, self.cache.keys[self.layer], self.cache.values[self.layer]
        keys[cache.sequences, cache.slots] = k[0]
        values[cache.sequences, cache.slots] = v[0]
        return self.ops.decode_attention(q[0], keys, values, cache.n_keys)[None]


def prefill(model: Llama, tokens: Tensor, lengths: Tensor, cache: KVCache, ops: Sequence[Ops]) -> Tensor:
    """Logits (B, V) float32 of the tokens that follow the prompts, whose keys and values fill the cache, empty before.

    tokens: (B, T) int64, T at most the cache's capacity. lengths: (B,) int64, tokens of each; those behind are padding.
    ops: `cache.keeping(ops, OfPrompts)`.
    """
    n = tokens.shape[1]
    cache.n_keys.copy_(lengths)
    hidden = _hidden(model, tokens, model.cos[:n], model.sin[:n], ops)
    return _logits(model, hidden[cache.sequences, lengths - 1])


def decode(model: Llama, tokens: Tensor, cache: KVCache, ops: Sequence[Ops]) -> Tensor:
    """Logits (B, V) float32 of the tokens that follow `tokens` (B,) int64, one of each sequence, which are put into the cache.

    In a cache that is full a sequence's last token is put over the one before: its text has ended.
    ops: `cache.keeping(ops, OfOneToken)`.
    """
    cache.slots.copy_(cache.n_keys.clamp(max=cache.capacity - 1))
    cache.n_keys.copy_(cache.slots + 1)
    return _logits(model, _hidden(model, tokens[None], model.cos[cache.slots], model.sin[cache.slots], ops)[0])


def _hidden(model: Llama, tokens: Tensor, cos: Tensor, sin: Tensor, ops: Sequence[Ops]) -> Tensor:
    """As `Llama.hidden`, with these tables and ops."""
    embedding = model.embedding
    residual = ops[-1].embedding(tokens, embedding.weight, model.compute_dtype, embedding.compute_weight)
    branch = None
    for layer, its_ops in zip(model.layers, ops, strict=False):
        branch, residual = layer(its_ops, branch, residual, cos, sin)
    y, _ = ops[-1].add_rms_norm(branch, residual, model.final_norm, model.config.norm_eps)
    return y


def _logits(model: Llama, hidden: Tensor) -> Tensor:
    return linear(hidden, model.output.weight, model.output.compute_weight).float()


def lay_out_for_decoding(model: Llama) -> None:
    """Lay out the float32 matrices on a CPU as its products of a few rows read them fastest: for good, in their own memory.

    Of one row by 288 x 1536, 288 x 4096 and the like, MKL's product takes half as long where the longer dim is the dense one (8
    rows: three quarters; on an EPYC, one thread). For a process that trains no more: an optimizer has its own view of parameters.
    """
    for weight in model.weights().values():
        matrix = weight.weight
        if matrix.device.type == "cpu" and weight.compute_weight is None and matrix.shape[0] > matrix.shape[1]:
            matrix.data = matrix.data.t().contiguous().t()


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
        self._cache = KVCache(model, len(prompts), capacity)
        ops = ops or [TORCH] * (model.config.n_layers + 1)
        self._of_prompts, self._of_one_token = (self._cache.keeping(ops, kind) for kind in (OfPrompts, OfOneToken))
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
        self._draw(prefill(self._model, self._prompts, self._lengths, self._cache, self._of_prompts))

    def step(self) -> None:
        """Put the last tokens into the cache and draw the next ones."""
        self._draw(decode(self._model, self.tokens, self._cache, self._of_one_token))

    def _draw(self, logits: Tensor) -> None:
        self.tokens.copy_(draw(logits, self.uniform, self._sampling, self._seen))
        if self._seen is not None:
            self._seen.scatter_(1, self.tokens[:, None], True)


def copies_before(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Of each prompt, how many equal ones come before it."""
    seen: Counter[tuple[int, ...]] = Counter()
    copies = []
    for prompt in map(tuple, prompts):
        copies.append(seen[prompt])
        seen[prompt] += 1
    return copies


def uniform_numbers(copies: Sequence[int], n: int, seed: int) -> Tensor:
    """n numbers in [0, 1) for each prompt, float64 (prompts, n): a function of the seed and of `copies_before` alone.

    So a prompt gets alone what it gets in a batch, and one that is given twice gets two texts.
    """
    rows = []
    for copy in copies:
        (state,) = np.random.SeedSequence([seed, copy]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
        rows.append(torch.rand(n, dtype=torch.float64, generator=generator))
    return torch.stack(rows)


@torch.no_grad()
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    seed: int = 0,
    copies: Sequence[int] | None = None,
    stop_token: int | None = None,
    ops: Sequence[Ops] | None = None,
    wrap: Callable[[Callable[[], None]], Callable[[], None]] = lambda step: step,
    on_token: Callable[[int, int], bool] = lambda prompt, token: False,
    on_end: Callable[[int], None] = lambda prompt: None,
) -> list[list[int]]:
    """Tokens that continue each prompt (at least one token, e.g. BOS), up to `max_new_tokens`, a `stop_token` left out.

    A text ends early at the model's max_seq_len. Draws are from generators of their own: sampling in a training run changes
    nothing of it.

    copies: of each prompt, how many equal ones came before it in what these are a part of; among these, if not given.
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
    uniform = uniform_numbers(copies or copies_before(prompts), max(room), seed).to(model.cos.device)
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
