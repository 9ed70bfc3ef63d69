"""The two sets of operations, and which of them each layer gets."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from kernels import grammar
from kernels.attention.op import attention_torch, attention_triton
from kernels.linear_cross_entropy.op import linear_cross_entropy_torch, linear_cross_entropy_triton
from kernels.rms_norm import add_rms_norm_torch, add_rms_norm_triton, rms_norm_torch, rms_norm_triton
from kernels.rope import rope_qkv_triton, rope_torch, rope_triton, split_qkv
from kernels.swiglu import swiglu_torch, swiglu_triton


@dataclass(frozen=True)
class Ops:
    """The operations of a Llama. Signatures, shapes and dtypes are those of the torch twin in each op's file."""

    rms_norm: Callable
    add_rms_norm: Callable
    rope: Callable
    swiglu: Callable
    attention: Callable
    linear_cross_entropy: Callable

    def rope_qkv(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`rope` of the queries and keys in a packed qkv (B, T, (H + 2 Hkv) D); the values come as a view of it.

        Triton's has a form of its own, which writes the packed gradient once.
        """
        if self.rope is rope_triton:
            return rope_qkv_triton(qkv, cos, sin, n_heads, n_kv_heads)
        q, k, v = split_qkv(qkv, n_heads, n_kv_heads)
        return *self.rope(q, k, cos, sin), v


# The fields of Ops that one switch turns. Those of the whole run (AdamW's) turn none.
FIELDS = {switch: (switch,) for switch in (*grammar.LAYER_SWITCHES, *grammar.OUT_SWITCHES)}
FIELDS |= {"rms_norm": ("rms_norm", "add_rms_norm")}


TORCH = Ops(
    rms_norm=rms_norm_torch,
    add_rms_norm=add_rms_norm_torch,
    rope=rope_torch,
    swiglu=swiglu_torch,
    attention=attention_torch,
    linear_cross_entropy=linear_cross_entropy_torch,
)

TRITON = Ops(
    rms_norm=rms_norm_triton,
    add_rms_norm=add_rms_norm_triton,
    rope=rope_triton,
    swiglu=swiglu_triton,
    attention=attention_triton,
    linear_cross_entropy=linear_cross_entropy_triton,
)


def select(spec: str, n_layers: int) -> list[Ops]:
    """Ops of each layer, then those of the final norm and the loss head: `n_layers + 1` of them.

    spec: the grammar of `kernels.grammar`, e.g. `all,-rope@0-1`. What it does not turn to Triton stays torch.
    Places with equal selections share one Ops, so that compiled layers can share their code.
    Raises ValueError as `kernels.grammar.parse` does.
    """
    made: dict[frozenset[str], Ops] = {}
    return [made.setdefault(switches, _mixed(switches)) for switches in grammar.parse(spec, n_layers)]


def _mixed(switches: frozenset[str]) -> Ops:
    fields = [field for switch in switches for field in FIELDS[switch]]
    return replace(TORCH, **{field: getattr(TRITON, field) for field in fields})
