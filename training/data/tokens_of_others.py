"""Tokens that another program has prepared, trained on as they are: nanoGPT's train.bin and val.bin, llama2.c's data00.bin ...

Both are nothing but tokens, little-endian, 16 bits each (32 where the vocabulary does not fit them), without a header. nanoGPT
ends each document with GPT-2's <|endoftext|>, llama2.c opens each with BOS and validates on its first file. Either token
separates the documents, so both are read as streams in which it opens them. A stream without it is one document.
"""

from __future__ import annotations

import fnmatch
import hashlib
from functools import cached_property
from pathlib import Path

import numpy as np

from training.data.corpus.files import written_by_a_run
from training.data.corpus.parts import reading
from training.data.digests import digest
from training.data.shards import Dataset, token_dtype
from training.data.token_stream import TokenStream
from training.data.tokenizer import FILE_NAMES, Tokenizer
from training.errors import UserError

_TOKENIZERS = (*FILE_NAMES, "tokenizer.bin")
_LOOKED_AT = 1 << 20  # tokens at the beginning of a file that are checked
_ENCODED_AGAIN, _CUT = 4096, 16  # so many of them, but for the last, which the end of the text may change
_COUNTED, _BLOCKS = 100_000_000, 64  # of a longer stream, so many blocks are counted


def token_files(folder: Path, pattern: str = "") -> dict[str, list[Path]] | None:
    """The files of each split, in order, where a folder holds tokens of another program; None where it holds none.

    pattern: --data-files. Raises UserError for tokens among other files, or without a file to validate on.
    """
    with reading(folder):
        if not folder.is_dir():
            return None
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if written_by_a_run({path.name for path in files}):
        return None
    if pattern:
        files = [path for path in files if fnmatch.fnmatch(path.name, pattern)]
    tokens = [path for path in files if path.suffix == ".bin" and path.name not in _TOKENIZERS]
    names = {path.name for path in tokens}
    if {"train.bin", "val.bin"} <= names:
        return {"train": [folder / "train.bin"], "val": [folder / "val.bin"]}
    if not tokens:
        return None
    others = [path.name for path in files if path.suffix != ".bin" and path.name not in _TOKENIZERS]
    if others:
        raise UserError(
            f"--data {folder}: it holds tokens ({tokens[0].name}) among other files ({others[0]}); "
            "say which to read, for instance --data-files '*.bin'"
        )
    if len(tokens) < 2 or names & {"train.bin", "val.bin"}:
        raise UserError(
            f"--data {folder}: it holds tokens ({', '.join(sorted(names))}) but none to train or none to validate on; "
            "wanted train.bin and val.bin, or several files, of which the first is for validation"
        )
    return {"train": tokens[1:], "val": tokens[:1]}


def tokenizer_beside(folder: Path) -> Path:
    """The tokenizer of such a folder, where --tokenizer names none. UserError where none lies in it or beside it."""
    for path in (*(folder / name for name in _TOKENIZERS), folder.with_name(f"{folder.resolve().name}.model")):
        if path.is_file():
            return path
    raise UserError(
        f"--data {folder} holds tokens that another program has prepared; name their tokenizer with --tokenizer: "
        "GPT-2's tokenizer.json for nanoGPT's, the tokenizer.model or tok4096.model for llama2.c's"
    )


class TokensOfOthers(TokenStream):
    """A split of such tokens. Its documents and bytes are counted when they are asked for, of long ones in a sample of blocks."""

    way_on = "they are of another tokenizer: name theirs with --tokenizer"

    def __init__(self, name: str, paths: list[Path], tokenizer: Tokenizer):
        """UserError for files that are empty, or whose beginning can't be tokens of this tokenizer."""
        super().__init__(name, [_open(path, tokenizer) for path in paths], tokenizer)
        self._tokenizer = tokenizer
        self.is_estimated = self.n_tokens > _COUNTED

    @cached_property
    def n_documents(self) -> int:  # type: ignore[override]
        """As in `TokenStream`; at least 1."""
        return max(1, self._total(lambda tokens: int((tokens == self.bos_id).sum())))

    @cached_property
    def n_bytes(self) -> int:  # type: ignore[override]
        """As in `TokenStream`; at least 1."""
        lengths = np.array([len(token) for token in self._tokenizer.bytes_of_tokens])
        return max(1, self._total(lambda tokens: int(lengths[tokens].sum())))

    def _total(self, count) -> int:
        """The sum of count(tokens) over the stream, or that of evenly spaced blocks, scaled up."""
        step = min(_LOOKED_AT, self.n_tokens)
        if not self.is_estimated:
            starts = range(0, self.n_tokens, step)
        else:
            starts = [i * (self.n_tokens - step) // (_BLOCKS - 1) for i in range(_BLOCKS)]
        total = n_tokens = 0
        for start in starts:
            tokens = self.read(np.array([start]), min(step, self.n_tokens - start))[0]
            total += count(tokens)
            n_tokens += len(tokens)
        return round(total * self.n_tokens / n_tokens)


def _open(path: Path, tokenizer: Tokenizer) -> np.ndarray:
    dtype = token_dtype(tokenizer.n_tokens)
    with reading(path):
        size = path.stat().st_size
        if not size or size % dtype.itemsize:
            raise UserError(f"{path}: {size} bytes are no tokens of {dtype.itemsize} bytes each")
        tokens = np.asarray(np.memmap(path, dtype, "r"))
    head = tokens[:_LOOKED_AT]
    of_tokenizer = (
        f"of the tokenizer, which has {tokenizer.n_tokens} tokens and opens documents with {tokenizer.bos_id}"
    )
    if len(head) > 1 and dtype.itemsize == 2 and (head[1::2] == 0).mean() > 0.9:
        raise UserError(f"{path} holds tokens of 32 bits, wanted 16, {of_tokenizer}")
    if (largest := int(head.max())) >= tokenizer.n_tokens:
        raise UserError(f"{path} holds token {largest}, which is none {of_tokenizer}; name theirs with --tokenizer")
    # A single long document, as nanoGPT's shakespeare, is known by its text: another tokenizer's would not be encoded so again.
    if not (head == tokenizer.bos_id).any() and not _is_encoded_by(head[:_ENCODED_AGAIN].tolist(), tokenizer):
        raise UserError(
            f"{path}: no document begins in its first {len(head):,} tokens: they are none {of_tokenizer}; "
            "name theirs with --tokenizer, or the token that separates documents with --document-token"
        )
    return tokens


def _is_encoded_by(tokens: list[int], tokenizer: Tokenizer) -> bool:
    """Whether the beginning of a text is encoded as this tokenizer does."""
    again = tokenizer.encode(tokenizer.decode(tokens))
    return len(tokens) > _CUT and again[: len(tokens) - _CUT] == tokens[:-_CUT]


def open_tokens(folder: Path, files: dict[str, list[Path]], tokenizer: Tokenizer) -> Dataset:
    """The dataset of such files. UserError as `TokensOfOthers`."""
    name = folder.resolve().name
    splits = {split: TokensOfOthers(f"the {split} split of {name}", paths, tokenizer) for split, paths in files.items()}
    found = hashlib.sha256()
    for split, paths in files.items():
        for path in paths:
            found.update(f"{split} {path.name} {digest(path)}\n".encode())
    manifest = {"source": name, "cut": "tokens of another program"}
    return Dataset(**splits, tokenizer=tokenizer, fingerprint=found.hexdigest(), manifest=manifest)
