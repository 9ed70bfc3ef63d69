"""The two sets of operations, and which of them each layer gets."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from kernels import grammar
from kernels.attention.decode import decode_attention_torch, decode_attention_triton
from kernels.attention.op import attention_torch, attention_triton
from kernels.attention.rope_attention import rope_attention_triton
from kernels.embedding import embedding_torch, embedding_triton
from kernels.linear_cross_entropy.op import linear_cross_entropy_torch, linear_cross_entropy_triton
from kernels.mlp.op import mlp_torch, mlp_triton
from kernels.rms_norm import add_rms_norm_torch, add_rms_norm_triton, rms_norm_torch, rms_norm_triton
from kernels.rope import rope_torch, rope_triton
from kernels.swiglu import swiglu_torch, swiglu_triton


@dataclass(frozen=True)
class InTurn:
    """`rope_attention` of two ops apart."""

    rope: Callable
    attention: Callable

    def __call__(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, first_key: Tensor | None = None
    ) -> Tensor:
        """`rope`, then `attention`: o (B, T, H, D)."""
        q, k, v = self.rope(qkv, cos, sin, n_heads, n_kv_heads)
        return self.attention(q, k, v, first_key)


@dataclass(frozen=True)
class Ops:
    """The operations of a Llama. Signatures, shapes and dtypes are those of the torch twin in each op's file."""

    rms_norm: Callable
    add_rms_norm: Callable
    rope: Callable
    swiglu: Callable
    attention: Callable
    embedding: Callable
    linear_cross_entropy: Callable
    rope_attention: Callable | None = None
    """`rope`, then `attention`, of a packed qkv: what the model calls. Made of those two unless something else is given."""

    decode_attention: Callable | None = None
    """Attention of one query a sequence over a cache (kernels/attention/decode.py): a kernel where `attention` is one, unless
    something else is given."""

    mlp: Callable | None = None
    """The whole feed-forward as one op, where `mlp_serves` says so; its products and `swiglu` in turn, unless it is given, and
    where `swiglu` is another than the one that is in it."""

    def __post_init__(self) -> None:
        if self.mlp is None or (self.mlp is mlp_triton and self.swiglu is not swiglu_triton):
            object.__setattr__(self, "mlp", mlp_torch)
        made_of_others = isinstance(self.rope_attention, InTurn) or self.rope_attention in FUSED.values()
        if self.rope_attention is None or made_of_others:
            parts = (self.rope, self.attention)
            object.__setattr__(self, "rope_attention", FUSED.get(parts) or InTurn(*parts))
        if self.decode_attention in (None, decode_attention_torch, decode_attention_triton):
            on = self.attention is attention_triton
            object.__setattr__(self, "decode_attention", decode_attention_triton if on else decode_attention_torch)


FUSED = {(rope_triton, attention_triton): rope_attention_triton}
"""Pairs of rope and attention that are one kernel where both are on."""

# The fields of Ops that one switch turns. Those of the whole run (AdamW's) turn none.
FIELDS: dict[str, tuple[str, ...]] = {switch: (switch,) for switch in (*grammar.LAYER_SWITCHES, *grammar.OUT_SWITCHES)}
FIELDS |= {"rms_norm": ("rms_norm", "add_rms_norm")}

OUTPUTS: dict[str, tuple[str, ...]] = {
    "rms_norm": ("y",),
    "add_rms_norm": ("y", "summed"),
    "rope": ("q", "k", "v"),
    "swiglu": ("y",),
    "attention": ("o",),
    "rope_attention": ("o",),
    "decode_attention": ("o",),
    "mlp": ("out",),
    "embedding": ("x",),
    "linear_cross_entropy": ("loss",),
}
"""What each field of Ops returns, by the names that its file has for it."""


TORCH = Ops(
    rms_norm=rms_norm_torch,
    add_rms_norm=add_rms_norm_torch,
    rope=rope_torch,
    swiglu=swiglu_torch,
    attention=attention_torch,
    embedding=embedding_torch,
    linear_cross_entropy=linear_cross_entropy_torch,
)

TRITON = Ops(
    rms_norm=rms_norm_triton,
    add_rms_norm=add_rms_norm_triton,
    rope=rope_triton,
    swiglu=swiglu_triton,
    attention=attention_triton,
    embedding=embedding_triton,
    linear_cross_entropy=linear_cross_entropy_triton,
    mlp=mlp_triton,
)


def select(spec: str, n_layers: int) -> list[Ops]:
    """Ops of each layer, then those of the embedding, the final norm and the loss head: `n_layers + 1` of them.

    spec: the grammar of `kernels.grammar`, e.g. `all,-rope@0-1`. What it does not turn to Triton stays torch.
    Places with equal selections share one Ops, so that compiled layers can share their code.
    Raises ValueError as `kernels.grammar.parse` does.
    """
    made: dict[frozenset[str], Ops] = {}
    return [made.setdefault(switches, _mixed(switches)) for switches in grammar.parse(spec, n_layers)]


def _mixed(switches: frozenset[str]) -> Ops:
    fields = [field for switch in switches for field in FIELDS[switch]]
    return replace(TORCH, **{field: getattr(TRITON, field) for field in fields})
