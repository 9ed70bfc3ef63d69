"""What each op is given when it is measured, and the bytes it must move: one entry in `CASES` an op.

The arguments are laid out as the model passes them: queries and keys are slices of a packed product, norm weights are
float32. Bytes are those of the table in the op's module docstring, each read and written once.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.config import PRESETS
from training.config import TrainConfig, defaults
from training.errors import UserError

FLOAT32 = 4


@dataclass(frozen=True)
class Case:
    """One op at one size."""

    shape: str
    """Of what is worked on, for people."""
    arguments: tuple
    """Of the op; the tensors that require a gradient are leaves."""
    forward_bytes: int
    backward_bytes: int
    liger_arguments: tuple = ()
    """Where Liger's callers lay them out otherwise than ours do."""

    @property
    def wanted(self) -> list[Tensor]:
        """The arguments that get a gradient."""
        return [x for x in self.arguments if isinstance(x, Tensor) and x.requires_grad]


# ---------------------------------------------------------------------------------------------------------------- sizes

# Rows that fill any GPU, at the widths of small and large models.
WIDTHS = {f"8192x{width}": width for width in (2048, 4096, 8192)}
SIZES = (*PRESETS, *WIDTHS)


def size(name: str) -> TrainConfig:
    """Shape and batch of a preset, or 8192 tokens of one width (`8192x2048`). UserError for any other name."""
    if name in WIDTHS:
        width = WIDTHS[name]
        heads = {"n_heads": width // 128, "n_kv_heads": width // 512}
        return TrainConfig(dim=width, ffn_dim=width, batch_size=1, max_seq_len=8192, **heads)
    if name not in PRESETS:
        raise UserError(f"--preset is {name!r}; allowed: {', '.join(SIZES)}")
    return defaults(name)


def cut(config: TrainConfig, tokens: int) -> TrainConfig:
    """The same widths with at most so many tokens in a micro-step."""
    length = min(config.max_seq_len, tokens)
    return replace(config, max_seq_len=length, batch_size=min(config.batch_size, tokens // length))


# ---------------------------------------------------------------------------------------------------------------- cases


def _leaf(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device).requires_grad_()


def _rms_norm(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    rows = c.batch_size * c.max_seq_len
    x = _leaf(c.batch_size, c.max_seq_len, c.dim, dtype=dtype, device=device)
    weight = torch.ones(c.dim, device=device, requires_grad=True)
    tensor, rstd = x.nbytes, FLOAT32 * rows
    return Case(f"{rows} x {c.dim}", (x, weight, c.norm_eps), 2 * tensor + rstd, 3 * tensor + rstd)


def _add_rms_norm(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    case = _rms_norm(c, dtype, device)
    x, weight, eps = case.arguments
    residual = _leaf(*x.shape, dtype=dtype, device=device)
    n_bytes = 4 * x.nbytes + FLOAT32 * (x.numel() // c.dim)
    return Case(case.shape, (x, residual, weight, eps), n_bytes, n_bytes)


def _rope(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    heads, kv_heads, width = c.n_heads, c.n_kv_heads, c.head_dim
    packed = _leaf(c.batch_size, c.max_seq_len, heads + 2 * kv_heads, width, dtype=dtype, device=device)
    q, k = (x.detach().requires_grad_() for x in packed.split([heads, kv_heads, kv_heads], dim=2)[:2])
    cos, sin = (torch.rand(c.max_seq_len, width // 2, device=device) for _ in range(2))
    n_bytes = 2 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes
    # Liger turns in place what Hugging Face's two projections give it, which is dense; of slices it would make a copy.
    dense = tuple(x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in (q, k))
    shape = f"{c.batch_size * c.max_seq_len} x ({heads} + {kv_heads}) x {width}"
    return Case(shape, (q, k, cos, sin), n_bytes, n_bytes, liger_arguments=(*dense, cos, sin))


def _swiglu(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    gate_up = _leaf(c.batch_size, c.max_seq_len, 2 * c.hidden_dim, dtype=dtype, device=device)
    half = gate_up.nbytes // 2
    return Case(f"{c.batch_size * c.max_seq_len} x 2 x {c.hidden_dim}", (gate_up,), 3 * half, 5 * half)


def _attention(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    heads, kv_heads, width, length = c.n_heads, c.n_kv_heads, c.head_dim, c.max_seq_len
    packed = torch.randn(c.batch_size, length, heads + 2 * kv_heads, width, dtype=dtype, device=device)
    q, k, v = (x.detach().requires_grad_() for x in packed.split([heads, kv_heads, kv_heads], dim=2))
    statistics = FLOAT32 * c.batch_size * length * heads
    forward = 2 * (q.nbytes + k.nbytes) + statistics
    backward = 6 * (q.nbytes + k.nbytes) + 4 * statistics  # of two launches: both read q, k, v, do, lse and delta
    return Case(f"{c.batch_size} x {length} x ({heads} + 2 x {kv_heads}) x {width}", (q, k, v), forward, backward)


CASES: dict[str, Callable[[TrainConfig, torch.dtype, torch.device], Case]] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rope": _rope,
    "swiglu": _swiglu,
    "attention": _attention,
}
