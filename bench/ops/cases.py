"""What each op is given when it is measured, and what it must move and compute: one entry in `CASES` an op.

The arguments are laid out as the model passes them: queries and keys are slices of a packed product, norm weights are
float32. Bytes are those of the table in the op's module docstring, each read and written once; FLOPs are counted where
arithmetic and not memory is the limit, two a multiply-add.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kernels.launch import ceil_div
from kernels.linear_cross_entropy.chunked import IN_REGISTERS, chunk_rows
from model.config import PRESETS
from model.flops import matmul_parameters, parameters
from training.config import TrainConfig, defaults
from training.errors import UserError

FLOAT32 = 4


@dataclass(frozen=True)
class Cost:
    """What one pass must move and compute, at the least."""

    bytes: int
    flops: int = 0
    """0 where memory is the limit."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Case:
    """One op at one size."""

    shape: str
    """Of what is worked on, for people."""
    arguments: tuple
    """Of the op; the tensors that require a gradient are leaves."""
    costs: dict[str, Cost]
    """By pass, those that are timed: forward and backward (their sum is `both`); evaluation (forward with no gradient wanted)
    and both, for an op that may do the backward's work in the forward pass; or update."""
    keywords: dict = field(default_factory=dict)
    """More arguments of the op."""

    @property
    def wanted(self) -> list[Tensor]:
        """The arguments that get a gradient."""
        return [x for x in self.arguments if isinstance(x, Tensor) and x.requires_grad]


# ---------------------------------------------------------------------------------------------------------------- sizes

# Rows that fill any GPU, at the widths of small and large models, with Llama 3's vocabulary.
WIDTHS = {f"8192x{width}": width for width in (2048, 4096, 8192)}
# Batch, sequence and head dim of attention as others publish it: 32 heads of queries, 8 of keys and values.
HEADS = {f"4x4096x{head_dim}": head_dim for head_dim in (128, 64)}

_ROWS = (*PRESETS, *WIDTHS)
SIZES: dict[str, tuple[str, ...]] = {
    "rms_norm": _ROWS,
    "add_rms_norm": _ROWS,
    "rope": _ROWS,
    "swiglu": _ROWS,
    "attention": (*HEADS, *PRESETS),
    "packed_attention": tuple(HEADS),
    "embedding": _ROWS,
    "linear_cross_entropy": ("8192x2048", "reference", "124m", "350m", "llama3.2-1b", "llama3.2-3b", "llama3.1-8b"),
    "adamw": ("reference", "124m", "llama3.2-1b"),
}
"""What an op is measured at when nothing else is said."""

ALL_SIZES = (*PRESETS, *WIDTHS, *HEADS)


def size(name: str) -> TrainConfig:
    """Shape and batch of a preset, 8192 tokens of one width (`8192x2048`), or 4 x 4096 of one head dim (`4x4096x128`).

    UserError for any other name.
    """
    vocabulary = {"vocab_size": 128256}
    if name in WIDTHS:
        width = WIDTHS[name]
        heads = {"n_heads": width // 128, "n_kv_heads": width // 512}
        return TrainConfig(dim=width, ffn_dim=width, batch_size=1, max_seq_len=8192, **heads, **vocabulary)
    if name in HEADS:
        heads = {"n_heads": 32, "n_kv_heads": 8, "dim": 32 * HEADS[name]}
        return TrainConfig(batch_size=4, max_seq_len=4096, **heads, **vocabulary)
    if name not in PRESETS:
        raise UserError(f"--preset is {name!r}; allowed: {', '.join(ALL_SIZES)}")
    return defaults(name)


def cut(config: TrainConfig, tokens: int) -> TrainConfig:
    """The same widths with at most so many tokens in a micro-step."""
    length = min(config.max_seq_len, tokens)
    return replace(config, max_seq_len=length, batch_size=min(config.batch_size, tokens // length))


# ---------------------------------------------------------------------------------------------------------------- cases


def _leaf(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device).requires_grad_()


def _moved(forward: int, backward: int) -> dict[str, Cost]:
    return {"forward": Cost(forward), "backward": Cost(backward)}


def _rms_norm(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    rows = c.batch_size * c.max_seq_len
    x = _leaf(c.batch_size, c.max_seq_len, c.dim, dtype=dtype, device=device)
    weight = torch.ones(c.dim, device=device, requires_grad=True)
    tensor, rstd = x.nbytes, FLOAT32 * rows
    return Case(f"{rows} x {c.dim}", (x, weight, c.norm_eps), _moved(2 * tensor + rstd, 3 * tensor + rstd))


def _add_rms_norm(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    case = _rms_norm(c, dtype, device)
    x, weight, eps = case.arguments
    residual = _leaf(*x.shape, dtype=dtype, device=device)
    n_bytes = 4 * x.nbytes + FLOAT32 * (x.numel() // c.dim)
    return Case(case.shape, (x, residual, weight, eps), _moved(n_bytes, n_bytes))


def _rope(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    heads, kv_heads, width = c.n_heads, c.n_kv_heads, c.head_dim
    qkv = _leaf(c.batch_size, c.max_seq_len, (heads + 2 * kv_heads) * width, dtype=dtype, device=device)
    cos, sin = (torch.rand(c.max_seq_len, width // 2, device=device) for _ in range(2))
    turned, tables = qkv.nbytes * (heads + kv_heads) // (heads + 2 * kv_heads), cos.nbytes + sin.nbytes
    shape = f"{c.batch_size * c.max_seq_len} x ({heads} + 2 x {kv_heads}) x {width}"
    return Case(shape, (qkv, cos, sin, heads, kv_heads), _moved(2 * turned + tables, 2 * qkv.nbytes + tables))


def _packed_heads(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Queries, keys and values as slices of one packed product, each a leaf."""
    heads = [c.n_heads, c.n_kv_heads, c.n_kv_heads]
    packed = torch.randn(c.batch_size, c.max_seq_len, sum(heads), c.head_dim, dtype=dtype, device=device)
    return [x.detach().requires_grad_() for x in packed.split(heads, dim=2)]


def _swiglu(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    gate_up = _leaf(c.batch_size, c.max_seq_len, 2 * c.hidden_dim, dtype=dtype, device=device)
    half, rows = gate_up.nbytes // 2, c.batch_size * c.max_seq_len
    return Case(f"{rows} x 2 x {c.hidden_dim}", (gate_up,), _moved(3 * half, 5 * half))


def _attention(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    length = c.max_seq_len
    return _attention_case(c, _packed_heads(c, dtype, device), c.batch_size * length * (length + 1) // 2)


def _packed_attention(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    first_key = documents(c.batch_size, c.max_seq_len)
    visible = int((torch.arange(c.max_seq_len) - first_key + 1).sum())
    return _attention_case(c, [*_packed_heads(c, dtype, device), first_key.to(device)], visible)


def _attention_case(c: TrainConfig, arguments: list[Tensor], visible: int) -> Case:
    """visible: pairs of a query and a key that it sees, in all of the batch."""
    q, k, _, *first_key = arguments
    statistics = FLOAT32 * c.batch_size * c.max_seq_len * c.n_heads
    mask = sum(x.nbytes for x in first_key)
    forward = 2 * (q.nbytes + k.nbytes) + statistics + mask
    backward = (
        6 * (q.nbytes + k.nbytes) + 4 * statistics + mask
    )  # of two launches: both read q, k, v, do, lse and delta
    flops = 4 * visible * c.n_heads * c.head_dim
    costs = {"forward": Cost(forward, flops), "backward": Cost(backward, 5 * flops // 2)}
    shape = f"{c.batch_size} x {c.max_seq_len} x ({c.n_heads} + 2 x {c.n_kv_heads}) x {c.head_dim}"
    return Case(shape, tuple(arguments), costs)


def documents(batch: int, length: int, count: int = 8) -> Tensor:
    """`first_key`, int32 (batch, length), of sequences that are each packed from `count` documents of random lengths."""
    generator = torch.Generator().manual_seed(0)
    first_key = torch.zeros(batch, length, dtype=torch.int32)
    for row in first_key:
        starts = torch.randperm(length - 1, generator=generator)[: count - 1] + 1
        row[starts] = starts.int()
    return first_key.cummax(dim=1).values


def _embedding(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    # Tokens of frequency 1 / rank, about as text has them: what sums the gradient must not wait for the frequent ones.
    shape, vocab = (c.batch_size, c.max_seq_len), c.vocab_size
    tokens = (vocab ** torch.rand(shape, device=device)).long() - 1
    weight = _leaf(vocab, c.dim, dtype=torch.float32, device=device)
    copy = None if dtype == torch.float32 else weight.detach().to(dtype)
    x = tokens.numel() * c.dim * dtype.itemsize
    touched = 2 * FLOAT32 * min(tokens.numel(), vocab) * c.dim
    costs = _moved(tokens.nbytes + 2 * x, tokens.nbytes + x + touched)
    return Case(f"{tokens.numel()} x {vocab} x {c.dim}", (tokens, weight, dtype, copy), costs)


def _linear_cross_entropy(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    # The weight is in hidden's dtype, not float32 as in the model: peers take it, and give its gradient, in no other way.
    rows, vocab, e = c.batch_size * c.max_seq_len, c.vocab_size, dtype.itemsize
    hidden = _leaf(rows, c.dim, dtype=dtype, device=device)
    weight = (torch.randn(vocab, c.dim, dtype=dtype, device=device) * c.dim**-0.5).requires_grad_()
    targets = torch.randint(vocab, (rows,), device=device)
    chunks, logits = ceil_div(rows, chunk_rows(rows, vocab, e)), rows * vocab * e
    reads = 1 if vocab <= IN_REGISTERS else 2
    evaluation = hidden.nbytes + chunks * weight.nbytes + (1 + reads) * logits
    gradients = FLOAT32 * hidden.numel() + (8 * chunks - 4) * weight.numel()
    scaling = (FLOAT32 + e) * (hidden.numel() + weight.numel())
    both = 2 * (hidden.nbytes + chunks * weight.nbytes) + (4 + reads) * logits + gradients + scaling
    product = 2 * rows * c.dim * vocab
    costs = {"evaluation": Cost(evaluation, product), "both": Cost(both, 3 * product)}
    return Case(f"{rows} x {c.dim} x {vocab}", (hidden, weight, targets), costs)


def _adamw(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    shape = c.shape()
    n = parameters(shape)
    n_decayed = n - (2 * c.n_layers + 1) * c.dim  # all but the norms
    values, gradients, exp_avg = (torch.randn(n, device=device) for _ in range(3))
    exp_avg_sq = torch.rand(n, device=device)
    copies = None if dtype == torch.float32 else torch.empty(matmul_parameters(shape), dtype=dtype, device=device)
    step, lr, factor, skip = (torch.full((), x, device=device) for x in (100.0, 1e-4, 1.0, 0.0))
    arguments = (values, gradients, exp_avg, exp_avg_sq, copies, step, lr, factor, skip)
    n_bytes = 7 * values.nbytes + (0 if copies is None else copies.nbytes)
    keywords = {"n_decayed": n_decayed, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
    return Case(f"{n}", arguments, {"update": Cost(n_bytes)}, keywords)


CASES: dict[str, Callable[[TrainConfig, torch.dtype, torch.device], Case]] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rope": _rope,
    "swiglu": _swiglu,
    "attention": _attention,
    "packed_attention": _packed_attention,
    "embedding": _embedding,
    "linear_cross_entropy": _linear_cross_entropy,
    "adamw": _adamw,
}
