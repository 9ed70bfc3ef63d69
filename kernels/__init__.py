"""The hot operations of a Llama: each a hand-written Triton kernel and its plain-PyTorch twin.

`TORCH` and `TRITON` hold the same operations under the same names; `select` deals them out by layer. The names are
resolved on first use, so that the grammar of a selection (`kernels.grammar`) is there without importing torch or triton.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.ops import TORCH, TRITON, Ops, select

__all__ = ["TORCH", "TRITON", "Ops", "select"]


def __getattr__(name: str):
    """Import torch, and Triton where there is one, only when an operation is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module = importlib.import_module("kernels.ops")
    for public in __all__:
        globals()[public] = getattr(module, public)
    return globals()[name]
