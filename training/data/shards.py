"""Token shards: the encoded text of a source on disk, memory-mapped. training/data/prepare.py makes them.

A prepared source is one folder:

    tokenizer.model or tokenizer.json   the tokenizer that encoded it
    train-00000.bin, val-00000.bin ...  the shards: a header (`_HEADER`), then the tokens, little-endian uint16 or 32
    manifest.json                       what the folder holds, in order, and a digest of each shard

Its name ends in a hash of all it depends on, so sources and vocabularies lie side by side. It is written under a name
that starts with `.tmp-` and renamed when complete and on the disk: a reader never sees half of one. A `.tmp-` folder
that is left behind was cut off; the next preparation of the same goes on from there. It may be deleted.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from training.data import digests
from training.data.corpus import Split
from training.data.token_stream import TokenStream
from training.data.tokenizer import FILE_NAMES, Tokenizer, tokenizer_of
from training.errors import UserError

FORMAT_VERSION = 1
"""Of the shards. Raise it with the format, and with whatever changes their content, such as the tokenizer's training."""
SHARD_TOKENS = 100_000_000

_MAGIC = b"TOKSHARD"
# magic, version, bytes a token, vocabulary size, BOS id, tokens, documents, bytes of text, SHA-256 of the tokenizer
_HEADER = struct.Struct("<8sIIQQQQQ32s")


class TokenShards(TokenStream):
    """A split of a prepared source."""

    way_on = "the shards are damaged, delete their folder and they are made anew"

    def __init__(self, name: str, paths: list[Path], tokenizer: Tokenizer):
        """Open shards, in order; UserError if one is truncated, no shard, or of another tokenizer."""
        opened = [_open_shard(path, tokenizer) for path in paths]
        super().__init__(name, [tokens for tokens, _, _ in opened], tokenizer)
        self.n_documents = sum(documents for _, documents, _ in opened)
        self.n_bytes = sum(text_bytes for _, _, text_bytes in opened)


@dataclass(frozen=True)
class Dataset:
    """A prepared source.

    Attributes:
        train: the split to train on.
        val: the split to validate on.
        tokenizer: that of both.
        fingerprint: of the text, `Corpus.fingerprint`.
        manifest: what else is known of it: `build` says what; of sources that were prepared long ago less.
    """

    train: TokenStream
    val: TokenStream
    tokenizer: Tokenizer
    fingerprint: str
    manifest: dict


def open_dataset(folder: Path) -> Dataset:
    """Open what `prepare` made; UserError, with what to do about it, where a file is missing or damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        file = folder / next((name for name in FILE_NAMES if (folder / name).exists()), FILE_NAMES[0])
        tokenizer = tokenizer_of(file.name, file.read_bytes(), manifest.get("document_token", ""), name=str(file))
        splits = {
            split: TokenShards(
                f"the {split} split of {manifest['source']}", [folder / name for name in manifest[split]], tokenizer
            )
            for split in ("train", "val")
        }
        digests.check(folder, manifest.get("digests", {}))  # there are none of what was prepared long ago
        return Dataset(**splits, tokenizer=tokenizer, fingerprint=manifest["fingerprint"], manifest=manifest)
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"damaged token shards: {reason}; delete {folder} and they are made anew") from error


class Encoded(NamedTuple):
    """Documents of a split as tokens: what `ShardWriter` takes."""

    tokens: np.ndarray
    n_documents: int
    n_bytes: int
    n_byte_tokens: int = 0  # those that stand for one byte of a character that the vocabulary has not


class ShardWriter:
    """Appends tokens to numbered shards of a split and starts the next when one holds SHARD_TOKENS."""

    def __init__(self, folder: Path, split: Split, tokenizer: Tokenizer):
        self._folder, self._split, self._tokenizer = folder, split, tokenizer
        self._names: list[str] = []
        self._counts: tuple[int, ...] = ()  # tokens, documents and bytes of the shard that is growing
        self.n_byte_tokens = 0

    def state(self) -> dict:
        """Where it is, for JSON; what was written so far is on the disk afterwards."""
        if self._counts:
            with self._path.open("rb") as file:
                os.fsync(file.fileno())
        return {"names": self._names, "counts": self._counts, "n_byte_tokens": self.n_byte_tokens}

    def go_on(self, state: dict) -> None:
        """Continue from a `state`: what was written after it is dropped. OSError or ValueError where a file is too short."""
        self._names, self._counts = list(state["names"]), tuple(state["counts"])
        self.n_byte_tokens = state["n_byte_tokens"]
        if self._counts:
            size = _HEADER.size + self._counts[0] * token_dtype(self._tokenizer.n_tokens).itemsize
            if self._path.stat().st_size < size:
                raise ValueError(f"{self._path} is shorter than it was")
            os.truncate(self._path, size)

    def append(self, encoded: Encoded) -> None:
        """Write the tokens behind those that are there, into the shard that is growing."""
        if not self._counts:
            self._names.append(f"{self._split}-{len(self._names):05d}.bin")
            self._path.write_bytes(bytes(_HEADER.size))  # filled in when the counts are known
            self._counts = (0, 0, 0)
        with self._path.open("ab") as file:
            file.write(encoded.tokens.data)
        added = (len(encoded.tokens), encoded.n_documents, encoded.n_bytes)
        self._counts = tuple(map(sum, zip(self._counts, added, strict=True)))
        self.n_byte_tokens += encoded.n_byte_tokens
        if self._counts[0] >= SHARD_TOKENS:
            self._finish_shard()

    def close(self) -> list[str]:
        """The names of the shards, in order."""
        if self._counts:
            self._finish_shard()
        return self._names

    @property
    def _path(self) -> Path:
        return self._folder / self._names[-1]

    def _finish_shard(self) -> None:
        tokenizer = self._tokenizer
        itemsize = token_dtype(tokenizer.n_tokens).itemsize
        constants = (_MAGIC, FORMAT_VERSION, itemsize, tokenizer.n_tokens, tokenizer.bos_id)
        with self._path.open("r+b") as file:
            file.write(_HEADER.pack(*constants, *self._counts, bytes.fromhex(tokenizer.hash)))
        self._counts = ()


def token_dtype(vocab_size: int) -> np.dtype:
    """What a token is kept as, little-endian: 16 bits where the vocabulary fits them, else 32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _open_shard(path: Path, tokenizer: Tokenizer) -> tuple[np.ndarray, int, int]:
    """Tokens (memory-mapped), number of documents, bytes of text."""
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if not header.startswith(_MAGIC):
        raise UserError(f"{path} is no token shard: it starts with {header[: len(_MAGIC)]!r}, wanted {_MAGIC!r}")
    if len(header) < _HEADER.size:
        raise UserError(f"{path} is truncated: its header has {len(header)} bytes, wanted {_HEADER.size}")
    _, version, itemsize, vocab_size, bos_id, n_tokens, n_documents, n_bytes, digest = _HEADER.unpack(header)
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}, wanted {FORMAT_VERSION}")
    if (vocab_size, bos_id, digest.hex()) != (tokenizer.n_tokens, tokenizer.bos_id, tokenizer.hash):
        raise UserError(
            f"{path} is of another tokenizer: vocabulary {vocab_size}, SHA-256 {digest.hex()[:16]}; "
            f"wanted {tokenizer.n_tokens}, {tokenizer.hash[:16]}"
        )
    dtype = token_dtype(vocab_size)
    size, wanted = path.stat().st_size, _HEADER.size + n_tokens * dtype.itemsize
    if itemsize != dtype.itemsize or size != wanted or not n_tokens or not n_documents:
        raise UserError(f"{path} is truncated or damaged: {size} bytes, its header tells of {wanted}")
    return np.asarray(np.memmap(path, dtype, "r", offset=_HEADER.size)), n_documents, n_bytes
