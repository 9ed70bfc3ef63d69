"""The bars of a step that a GPU ran: from the profile that `bench.step --profile` took of it."""

import re

from bench.report.profiles import OURS, part_of
from bench.waterfall.bars import COPIES, GAPS, INDUCTOR, PRODUCTS, PYTORCH, Work

_OPS = {
    r"^_rms_norm": "rms_norm",
    r"^_rope": "rope",
    r"^_swiglu": "swiglu",
    r"^_attention": "attention",
    r"^_embedding": "embedding",
    r"^_linear_cross_entropy": "linear_cross_entropy",
    r"^_adamw": "optimizer",
}
"""What a kernel of ours is for, by the name of its function. Attention's backward turns RoPE back as well."""
_PARTS = {
    "kernels that Inductor wrote": INDUCTOR,
    "attention of PyTorch": "attention",
    "products (cuBLAS)": PRODUCTS,
    "copies and fills of memory": COPIES,
}


def works(row: dict) -> list[Work]:
    """What a row of `bench.step` with a profile says: its kernels, and the time in which none ran.

    Of kernels that ran at the same time both count, and what is between launches may then be less than nothing.
    """
    profile = row["profile"]
    found = [Work(cause(kernel["name"]), kernel["ms"], kernel["launches"]) for kernel in profile["kernels"]]
    return [*found, Work(GAPS, row["ms"] - profile["busy_ms"], 0)]


def cause(kernel: str) -> str:
    """What a kernel is counted as, by its name."""
    part = part_of(kernel)
    if part == OURS:
        return next((op for pattern, op in _OPS.items() if re.search(pattern, kernel)), PYTORCH)
    return _PARTS.get(part, PYTORCH)
