"""The header of a file of weights. Imports no torch, so that a shape is known while options are read."""

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from model.config import LlamaConfig

MAGIC = 0x616B3432
VERSION_1_BYTES = 256
ASSUMED = {"norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling_factor": 1.0}
"""What run.c computes with, as options; a file does not tell."""
_SEVEN = struct.Struct("<7i")
_MARK = struct.Struct("<Ii")


@dataclass(frozen=True)
class Header:
    """What the header says: the version, the shape as options of `LlamaConfig`, and where the weights begin, in bytes."""

    version: int
    shape: dict
    start: int


def write_header(config: LlamaConfig, version: int) -> bytes:
    """The bytes of a header. ValueError, naming the option, for what run.c would compute otherwise."""
    for name, assumed in ASSUMED.items():
        if getattr(config, name) != assumed:
            raise ValueError(
                f"the model's {name} is {getattr(config, name)}; llama2.c's format has no place for it, and run.c "
                f"computes with {assumed}"
            )
    tied = config.tie_embeddings
    seven = [config.dim, config.hidden_dim, config.n_layers, config.n_heads, config.n_kv_heads, config.vocab_size]
    seven.append(config.max_seq_len)
    if version == 0:
        seven[5] *= 1 if tied else -1
        return _SEVEN.pack(*seven)
    return (_MARK.pack(MAGIC, 1) + _SEVEN.pack(*seven) + bytes([tied])).ljust(VERSION_1_BYTES, b"\0")


def read_header(path: str | Path) -> Header:
    """Read a file's header and hold its size to it. ValueError for what is no such file, quantized, or cut short."""
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(VERSION_1_BYTES)
        size = os.fstat(file.fileno()).st_size
    if len(head) < VERSION_1_BYTES:
        raise ValueError(f"{path} is no llama2.c file: it has {size} bytes")
    version, start, at = 0, _SEVEN.size, 0
    magic, stated = _MARK.unpack_from(head)
    if magic == MAGIC:
        version, start, at = stated, VERSION_1_BYTES, _MARK.size
        if version != 1:
            quantized = " (of 8-bit integers)" if version == 2 else ""
            raise ValueError(f"{path} is of llama2.c's version {version}{quantized}; 0 and 1 are read")
    dim, ffn_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = _SEVEN.unpack_from(head, at)
    tied = vocab_size > 0 if version == 0 else bool(head[at + _SEVEN.size])
    shape = {
        "vocab_size": abs(vocab_size),
        "dim": dim,
        "ffn_dim": ffn_dim,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "max_seq_len": max_seq_len,
        "tie_embeddings": tied,
    }
    try:
        if ffn_dim < 1:
            raise ValueError(f"hidden_dim is {ffn_dim}")
        config = LlamaConfig(**shape)
        config.check()
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is no llama2.c file: as one, its header says: {error}") from None
    wanted = start + 4 * sum(count for _, count in sections(config, version))
    if size != wanted:
        raise ValueError(
            f"{path} is damaged, or no llama2.c file: it has {size} bytes, and its header tells of {wanted}"
        )
    return Header(version, shape, start)


def sections(config: LlamaConfig, version: int) -> list[tuple[str, int]]:
    """The parts of the file after its header, in order: their names, and how many floats each has over all layers."""
    dim, layers = config.dim, config.n_layers
    square, kv, ffn = dim * dim, dim * config.n_kv_heads * config.head_dim, dim * config.hidden_dim
    attention_norm, ffn_norm, final_norm = (
        ("attention_norm", layers * dim),
        ("ffn_norm", layers * dim),
        ("final_norm", dim),
    )
    embedding = ("embedding", config.vocab_size * dim)
    attention = [("wq", layers * square), ("wk", layers * kv), ("wv", layers * kv), ("wo", layers * square)]
    feed_forward = [("w1", layers * ffn), ("w2", layers * ffn), ("w3", layers * ffn)]
    head = [] if config.tie_embeddings else [("head", config.vocab_size * dim)]
    if version == 1:
        return [attention_norm, ffn_norm, final_norm, embedding, *attention, *feed_forward, *head]
    table = config.max_seq_len * (config.head_dim // 2)
    tables = [("cos", table), ("sin", table)]
    return [embedding, attention_norm, *attention, ffn_norm, *feed_forward, final_norm, *tables, *head]
