"""The sheets of attention: causal over whole sequences, over documents that share one, and of one token over a cache of keys and
values. Variants beside the common ones:

    sdpa-flash, -cudnn, -efficient, -mask    F.scaled_dot_product_attention, held to one backend; with a dense mask
    flex                                     FlexAttention, compiled, with a block mask
    varlen                                   torch.nn.attention.varlen, FlashAttention over documents end to end

Keys and values are repeated, inside of the time, where a backend takes no grouped queries.
"""

import contextlib
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

import kernels
from bench.ops.sheet import FLOAT32, Case, Peer, Sheet, always, kernel, leaf, of_newer_torch, twins
from bench.ops.sizes import HEADS
from model.config import PRESETS
from model.flops import Cost
from training.config import TrainConfig

# ---------------------------------------------------------------------------------------------------------------- cases


def attention(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    """Every token sees all before it."""
    length = c.max_seq_len
    return _attention_case(c, _packed_heads(c, dtype, device), c.batch_size * length * (length + 1) // 2)


def packed_attention(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    """Every token sees those before it in its document."""
    first_key = documents(c.batch_size, c.max_seq_len)
    visible = int((torch.arange(c.max_seq_len) - first_key + 1).sum())
    return _attention_case(c, [*_packed_heads(c, dtype, device), first_key.to(device)], visible)


def rope_attention(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    """`rope`, then `attention`, as a step has it: q and k are written rotated and read again; the backward writes dqkv once."""
    heads, width = c.n_heads + 2 * c.n_kv_heads, c.head_dim
    qkv = leaf(c.batch_size, c.max_seq_len, heads * width, dtype=dtype, device=device)
    cos, sin = (torch.rand(c.max_seq_len, width // 2, device=device) for _ in range(2))
    case = attention(c, dtype, device)
    turned = 2 * qkv.nbytes * (c.n_heads + c.n_kv_heads) // heads
    tables = Cost(cos.nbytes + sin.nbytes)
    forward, backward = case.costs["forward"] + tables + Cost(turned), case.costs["backward"] + tables
    arguments = (qkv, cos, sin, c.n_heads, c.n_kv_heads)
    return Case(case.shape, arguments, {"forward": forward, "backward": backward})


def decode_attention(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    """One query a sequence over a cache that is full: it is read once, beside which the rest is little."""
    q = torch.randn(c.batch_size, c.n_heads, c.head_dim, dtype=dtype, device=device)
    cache = torch.randn(2, c.batch_size, c.n_kv_heads, c.max_seq_len, c.head_dim, dtype=dtype, device=device)
    n_keys = torch.full((c.batch_size,), c.max_seq_len, dtype=torch.int32, device=device)
    shape = f"{c.batch_size} x ({c.n_heads} + 2 x {c.n_kv_heads} x {c.max_seq_len}) x {c.head_dim}"
    return Case(shape, (q, *cache.transpose(2, 3), n_keys), {"evaluation": Cost(2 * q.nbytes + cache.nbytes)})


def _attention_case(c: TrainConfig, arguments: list[Tensor], visible: int) -> Case:
    """visible: pairs of a query and a key that it sees, in all of the batch.

    Bytes: forward q, k, v read, o and a statistic a row written. The backward has two launches: both read q, k, v, do and the
    statistics. FLOPs: two products forward, five backward.
    """
    q, k, _, *first_key = arguments
    statistics = FLOAT32 * c.batch_size * c.max_seq_len * c.n_heads
    mask = sum(x.nbytes for x in first_key)
    forward = 2 * (q.nbytes + k.nbytes) + statistics + mask
    backward = 6 * (q.nbytes + k.nbytes) + 4 * statistics + mask
    flops = 4 * visible * c.n_heads * c.head_dim
    costs = {"forward": Cost(forward, flops), "backward": Cost(backward, 5 * flops // 2)}
    shape = f"{c.batch_size} x {c.max_seq_len} x ({c.n_heads} + 2 x {c.n_kv_heads}) x {c.head_dim}"
    return Case(shape, tuple(arguments), costs)


def _packed_heads(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Queries, keys and values as slices of one packed product, each a leaf."""
    heads = [c.n_heads, c.n_kv_heads, c.n_kv_heads]
    packed = torch.randn(c.batch_size, c.max_seq_len, sum(heads), c.head_dim, dtype=dtype, device=device)
    return [x.detach().requires_grad_() for x in packed.split(heads, dim=2)]


def documents(batch: int, length: int, count: int = 8) -> Tensor:
    """`first_key`, int32 (batch, length), of sequences that are each packed from `count` documents of random lengths."""
    generator = torch.Generator().manual_seed(0)
    first_key = torch.zeros(batch, length, dtype=torch.int32)
    for row in first_key:
        starts = torch.randperm(length - 1, generator=generator)[: count - 1] + 1
        row[starts] = starts.int()
    return first_key.cummax(dim=1).values


# ---------------------------------------------------------------------------------------------------------------- peers


def sdpa(backend: SDPBackend, *, grouped: bool = True) -> Callable:
    """Causal attention by one backend of SDPA, for (B, T, heads, D); `grouped`: it takes fewer heads of keys than of queries."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = _heads_first(q, k, v, repeat=not grouped)
        with sdpa_kernel(backend):
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return o.transpose(1, 2)

    return attention


def sdpa_mask(case: Case) -> Callable:
    """SDPA with a dense mask of the documents, made here; on a GPU by the one fast backend that takes a mask."""
    first_key = case.arguments[3]
    position = torch.arange(first_key.shape[1], device=first_key.device)
    mask = (position >= first_key.unsqueeze(-1)) & (position <= position.unsqueeze(-1))  # [B, query, key]
    mask = mask.unsqueeze(1)

    def attention(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor) -> Tensor:
        q, k, v = _heads_first(q, k, v, repeat=True)
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if q.is_cuda else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return attention


def sdpa_cached(case: Case) -> Callable:
    """SDPA of one query over a cache, with a mask of its keys, made here."""
    _, k_cache, _, n_keys = case.arguments
    mask = (torch.arange(k_cache.shape[1], device=n_keys.device) < n_keys[:, None])[:, None, None]

    def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, n_keys: Tensor) -> Tensor:
        q, k, v = _heads_first(q.unsqueeze(1), k_cache, v_cache, repeat=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).squeeze(2)

    return attention


def flex(case: Case) -> Callable:
    """FlexAttention, compiled, with a causal mask that ends at the documents' edges where there are documents."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, _, _, *packed = case.arguments
    batch, length = q.shape[:2]

    def causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query

    def causal_in_document(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= packed[0][b, query])

    if packed:
        mask = create_block_mask(causal_in_document, batch, None, length, length, device=q.device)
    else:
        mask = create_block_mask(causal, None, None, length, length, device=q.device)
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def attention(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor | None = None) -> Tensor:
        q, k, v = _heads_first(q, k, v)
        return compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return attention


def varlen(case: Case) -> Callable:
    """FlashAttention of torch over documents of any lengths, laid end to end."""
    starts, longest = document_starts(case.arguments[3])

    def attention(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor) -> Tensor:
        rows = (x.flatten(0, 1) for x in (q, k, v))
        causal, grouped = (-1, 0), q.shape[2] != k.shape[2]
        o = varlen_attn(*rows, starts, starts, longest, longest, window_size=causal, enable_gqa=grouped)
        return o.unflatten(0, q.shape[:2])

    return attention


def document_starts(first_key: Tensor) -> tuple[Tensor, int]:
    """Where each document begins in the flattened batch, and the end of the last, int32; and the longest one's length."""
    position = torch.arange(first_key.shape[1], device=first_key.device)
    starts = (first_key == position).flatten().nonzero().flatten()
    starts = F.pad(starts, (0, 1), value=first_key.numel()).int()
    return starts, int(starts.diff().max())


def _heads_first(*tensors: Tensor, repeat: bool = False) -> list[Tensor]:
    """(B, T, heads, D) as views (B, heads, T, D); `repeat`: with as many heads of keys and values as of queries, in copies."""
    q, *others = (x.transpose(1, 2) for x in tensors)
    group = q.shape[1] // others[0].shape[1]
    return [q, *(x.repeat_interleave(group, dim=1) if repeat and group > 1 else x for x in others)]


_FLEX = {"flex": Peer(flex, needs_gpu=True)}
_GROUPED_VARLEN = of_newer_torch("enable_gqa" in inspect.signature(varlen_attn).parameters)

SHEETS = {
    "attention": Sheet(
        attention,
        {
            **twins(kernels.TORCH.attention),
            "sdpa-flash": Peer(always(sdpa(SDPBackend.FLASH_ATTENTION))),
            "sdpa-cudnn": Peer(always(sdpa(SDPBackend.CUDNN_ATTENTION)), needs_gpu=True, deterministic=False),
            "sdpa-efficient": Peer(always(sdpa(SDPBackend.EFFICIENT_ATTENTION, grouped=False)), needs_gpu=True),
            **_FLEX,
            **kernel(kernels.TRITON.attention),
        },
        sizes=(*HEADS, *PRESETS),
    ),
    "packed_attention": Sheet(
        packed_attention,
        {
            **twins(kernels.TORCH.attention),
            "sdpa-mask": Peer(sdpa_mask),
            **_FLEX,
            "varlen": Peer(varlen, needs_gpu=True, lacks=_GROUPED_VARLEN),
            **kernel(kernels.TRITON.attention),
        },
        sizes=tuple(HEADS),
        calls=lambda c: 0,
    ),
    "rope_attention": Sheet(
        rope_attention,
        twins(kernels.TORCH.rope_attention) | kernel(kernels.TRITON.rope_attention),
        sizes=("reference", "124m", "llama3.2-1b"),
        calls=lambda c: 0,  # counted as the two that it is
    ),
    "decode_attention": Sheet(
        decode_attention,
        {
            **twins(kernels.TORCH.decode_attention),
            "sdpa-mask": Peer(sdpa_cached),
            **kernel(kernels.TRITON.decode_attention),
        },
        sizes=("reference", *HEADS),
        calls=lambda c: 0,  # no part of a training step
    ),
}
