"""A Llama 3, its presets, its cost, and its weights in and out. Names are resolved on first use: `model.config` needs no torch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.config import PRESETS, LlamaConfig
    from model.llama import Llama

__all__ = ["PRESETS", "Llama", "LlamaConfig"]


def __getattr__(name: str):
    """Import torch only when the module itself is asked for."""
    if name == "Llama":
        from model.llama import Llama

        return Llama
    if name in ("LlamaConfig", "PRESETS"):
        from model import config

        return getattr(config, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
