"""Weights in and out under the names of Hugging Face's Llama, in which checkpoints are written.

Here wqkv packs [q, k, v] and w_gate_up packs [gate, up]; there each is its own tensor. RoPE pairs (i, i + D/2) on both
sides, so nothing is permuted. A tied head is stored once, under the embedding's name.
"""

from __future__ import annotations

from collections.abc import Collection, Set
from typing import TYPE_CHECKING

from model.config import LlamaConfig

if TYPE_CHECKING:
    from torch import Tensor

_LAYER = {
    "attention_norm": ("input_layernorm.weight",),
    "wqkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "wo.weight": ("self_attn.o_proj.weight",),
    "ffn_norm": ("post_attention_layernorm.weight",),
    "w_gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "w_down.weight": ("mlp.down_proj.weight",),
}


def names(config: LlamaConfig) -> dict[str, tuple[str, ...]]:
    """For each parameter of `Llama`, the names of the tensors that it packs along its first dimension, in order."""
    table = {"embedding.weight": ("model.embed_tokens.weight",)}
    for i in range(config.n_layers):
        table |= {
            f"layers.{i}.{ours}": tuple(f"model.layers.{i}.{t}" for t in theirs) for ours, theirs in _LAYER.items()
        }
    table["final_norm"] = ("model.norm.weight",)
    if not config.tie_embeddings:
        table["head.weight"] = ("lm_head.weight",)
    return table


def shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every canonical tensor, by name."""
    dim, ffn, kv = config.dim, config.hidden_dim, config.n_kv_heads * config.head_dim
    of_layer = {
        "attention_norm": ((dim,),),
        "wqkv.weight": ((dim, dim), (kv, dim), (kv, dim)),
        "wo.weight": ((dim, dim),),
        "ffn_norm": ((dim,),),
        "w_gate_up.weight": ((ffn, dim), (ffn, dim)),
        "w_down.weight": ((dim, ffn),),
    }
    of_rest = {
        "embedding.weight": ((config.vocab_size, dim),),
        "final_norm": ((dim,),),
        "head.weight": ((config.vocab_size, dim),),
    }
    table = {}
    for ours, theirs in names(config).items():
        parts = of_rest[ours] if ours in of_rest else of_layer[ours.split(".", 2)[2]]
        table |= dict(zip(theirs, parts, strict=True))
    return table


def unpack(config: LlamaConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of `Llama` by name, all or some (or what has their shapes, an optimizer's moments), as canonical tensors."""
    of, canonical = shapes(config), {}
    for ours, theirs in names(config).items():
        if ours not in tensors:
            continue
        parts = tensors[ours].split([of[name][0] for name in theirs])
        canonical |= dict(zip(theirs, parts, strict=True))
    return canonical


def pack(config: LlamaConfig, canonical: dict[str, Tensor], only: Collection[str] | None = None) -> dict[str, Tensor]:
    """Inverse of `unpack`. only: the parameters wanted, if not all. ValueError that lists what is missing and what is unknown."""
    import torch

    table = {ours: theirs for ours, theirs in names(config).items() if only is None or ours in only}
    check_complete({name for theirs in table.values() for name in theirs}, canonical.keys())
    return {ours: torch.cat([canonical[name] for name in theirs]) for ours, theirs in table.items()}


def check_complete(wanted: Set[str], found: Set[str]) -> None:
    """ValueError that lists what is missing and what does not belong, where there is any."""
    missing, unknown = sorted(wanted - found), sorted(found - wanted)
    if missing or unknown:
        raise ValueError(f"weights do not fit the model: missing {_some(missing)}; not part of it {_some(unknown)}")


def _some(items: list[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "") if items else "none"
