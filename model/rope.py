"""The RoPE tables: float32 cosines and sines of every position (https://arxiv.org/abs/2104.09864)."""

import math

import torch
from torch import Tensor

from model.config import LlamaConfig


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """Radians a position, (head_dim / 2,) in rope_precision, with Llama 3.1's scaling where the configuration asks for it.

    Pair i turns by theta^(-2i/D). Scaling (Llama 3.1, section 3.4.1 of https://arxiv.org/abs/2407.21783 and its published
    code): wavelengths beyond original_length / low_freq_factor are stretched by the factor, those under
    original_length / high_freq_factor are kept, those between are interpolated linearly in original_length / wavelength.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=_precision(config)) / config.head_dim
    theirs = config.rope_precision == "float32"  # where transformers rounds twice
    frequencies = 1.0 / config.rope_theta**exponents if theirs else config.rope_theta**-exponents
    if config.rope_scaling_factor == 1.0:
        return frequencies
    turns = config.rope_original_max_seq_len * frequencies / (2 * math.pi)  # over the original length
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / config.rope_scaling_factor)


def rope_tables(config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Cos and sin, each (max_seq_len, head_dim / 2) float32, of position * frequency taken in rope_precision.

    A float32 angle is off by up to 2**-25 of itself, and at position 131,072 that of the fastest pair is 131,072 radians.
    """
    # On the CPU whatever the default device is: every device then trains with the same table, to the bit.
    with torch.device("cpu"):
        positions = torch.arange(config.max_seq_len, dtype=_precision(config))
        angles = torch.outer(positions, rope_frequencies(config))
        return angles.cos().float(), angles.sin().float()


def _precision(config: LlamaConfig) -> torch.dtype:
    return getattr(torch, config.rope_precision)
