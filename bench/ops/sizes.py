"""The sizes that ops are measured at: presets, and rows and heads as others publish them."""

from dataclasses import replace

from model.config import PRESETS
from training.config import TrainConfig, defaults
from training.errors import UserError

# Rows that fill any GPU, at the widths of small and large models, with Llama 3's vocabulary.
WIDTHS = {f"8192x{width}": width for width in (2048, 4096, 8192)}
# Batch, sequence and head dim of attention as others publish it: 32 heads of queries, 8 of keys and values.
HEADS = {f"4x4096x{head_dim}": head_dim for head_dim in (128, 64)}

ROWS = (*PRESETS, *WIDTHS)
"""Where the limit is memory, and rows are all that counts."""
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
