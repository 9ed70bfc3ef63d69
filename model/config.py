"""The shape of a Llama and the presets. Imports nothing heavy, so that options are parsed and refused at once."""

from dataclasses import dataclass
from typing import Literal

MAX_VOCAB_SIZE = 2**31 - 1
MAX_LAYERS = 10_000  # far more than any model has: lists of so many are made before anything else is known of it
RECOMPUTE = ("none", "selective", "full")
"""What a layer may compute again in the backward pass (model/recompute.py)."""


@dataclass(kw_only=True)
class LlamaConfig:
    """Everything that decides which parameters a model has and what its forward pass computes."""

    vocab_size: int = 4096
    """Tokens in the vocabulary; the tokenizer is trained to this size."""
    max_seq_len: int = 256
    """Tokens in a training sequence, and the longest that the RoPE tables cover."""
    dim: int = 288
    """Width of the residual stream."""
    n_layers: int = 8
    """Transformer layers."""
    n_heads: int = 8
    """Query heads; dim / n_heads is the head dim, which must be even."""
    n_kv_heads: int = 4
    """Key and value heads; n_heads must be a multiple of it."""
    ffn_dim: int = 0
    """Width of the SwiGLU feed-forward; 0 means 2/3 of 4 * dim, rounded up to a multiple of multiple_of."""
    multiple_of: int = 32
    """Rounds the feed-forward width up where ffn_dim is 0."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the RoPE frequencies."""
    rope_scaling_factor: float = 1.0
    """Llama 3.1 frequency scaling: low frequencies are divided by this; 1 leaves RoPE as it is."""
    rope_low_freq_factor: float = 1.0
    """Llama 3.1 frequency scaling: wavelengths longer than the original length over this are scaled in full."""
    rope_high_freq_factor: float = 4.0
    """Llama 3.1 frequency scaling: wavelengths shorter than the original length over this are left alone."""
    rope_original_max_seq_len: int = 8192
    """Llama 3.1 frequency scaling: sequence length that the unscaled model was trained at."""
    rope_precision: Literal["float64", "float32"] = "float64"
    """Of the RoPE angles before their float32 cosines: float32 is what transformers trains with, 9e-3 off at position 131,072."""
    tie_embeddings: bool = True
    """Whether the output head shares its weight with the input embedding."""
    dropout: float = 0.0
    """Dropout on the embedding and the residual branches; 0 adds nothing to the graph."""

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward, resolved."""
        if self.ffn_dim:
            return self.ffn_dim
        width = 2 * 4 * self.dim // 3
        return -(-width // self.multiple_of) * self.multiple_of

    def check(self) -> None:
        """Raise ValueError, naming the option, what was found and what is allowed, for a shape no model can have."""
        positive = (
            "max_seq_len",
            "dim",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "multiple_of",
            "rope_original_max_seq_len",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{option(name)} is {getattr(self, name)}; it must be at least 1")
        if self.n_layers > MAX_LAYERS:
            raise ValueError(f"--n-layers is {self.n_layers}; it must be at most {MAX_LAYERS}")
        if not 256 <= self.vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(
                f"--vocab-size is {self.vocab_size}; it must be from 256 (one token a byte) to {MAX_VOCAB_SIZE}"
            )
        if self.dim % self.n_heads:
            raise ValueError(f"--dim {self.dim} is not divisible by --n-heads {self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"--n-heads {self.n_heads} is not divisible by --n-kv-heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(
                f"--dim {self.dim} / --n-heads {self.n_heads} gives an odd head dim, {self.head_dim}; RoPE rotates pairs, "
                "so it must be even"
            )
        if self.ffn_dim < 0:
            raise ValueError(f"--ffn-dim is {self.ffn_dim}; it must be 0 (from dim and multiple_of) or more")
        if self.rope_precision not in ("float64", "float32"):
            raise ValueError(f"--rope-precision is {self.rope_precision!r}; allowed: float64, float32")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"--dropout is {self.dropout}; it must be at least 0 and less than 1")
        if not self.norm_eps > 0.0:
            raise ValueError(f"--norm-eps is {self.norm_eps}; it must be positive")
        if not self.rope_theta > 1.0:
            raise ValueError(f"--rope-theta is {self.rope_theta}; it must be greater than 1")
        if not self.rope_scaling_factor >= 1.0:
            raise ValueError(
                f"--rope-scaling-factor is {self.rope_scaling_factor}; it must be at least 1 (1: no scaling)"
            )
        if not 0.0 < self.rope_low_freq_factor < self.rope_high_freq_factor:
            raise ValueError(
                f"--rope-low-freq-factor {self.rope_low_freq_factor} must be positive and less than "
                f"--rope-high-freq-factor {self.rope_high_freq_factor}"
            )


def option(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


_GPT2_VOCAB = {"vocab_size": 50304, "multiple_of": 256}
# Published: the config.json of meta-llama/Llama-3.1-* and Llama-3.2-*; trained here at the sequence lengths of the bench.
_LLAMA31 = {
    "vocab_size": 128256,
    "max_seq_len": 8192,
    "rope_theta": 500000.0,
    "rope_scaling_factor": 8.0,
    "tie_embeddings": False,
}
_LLAMA32 = _LLAMA31 | {"max_seq_len": 4096, "rope_scaling_factor": 32.0, "tie_embeddings": True}

# Shapes by name, as differences from the defaults above, which are the reference run's.
PRESETS: dict[str, dict] = {
    "reference": {},
    "smoke": {"vocab_size": 1024, "dim": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 128},
    "124m": _GPT2_VOCAB | {"dim": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 12, "max_seq_len": 1024},
    "350m": _GPT2_VOCAB | {"dim": 1024, "n_layers": 24, "n_heads": 16, "n_kv_heads": 8, "max_seq_len": 2048},
    "llama3.2-1b": _LLAMA32 | {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "ffn_dim": 8192},
    "llama3.2-3b": _LLAMA32 | {"dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8, "ffn_dim": 8192},
    "llama3.1-8b": _LLAMA31 | {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "ffn_dim": 14336},
    "llama3.1-70b": _LLAMA31 | {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "ffn_dim": 28672},
    "llama3.1-405b": _LLAMA31 | {"dim": 16384, "n_layers": 126, "n_heads": 128, "n_kv_heads": 8, "ffn_dim": 53248},
}


def preset(name: str) -> LlamaConfig:
    """The shape of a preset. Raises ValueError, listing the presets, for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"--preset is {name!r}; allowed: {', '.join(PRESETS)}")
    return LlamaConfig(**PRESETS[name])
