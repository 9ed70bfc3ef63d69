"""Token shards: the encoded text of a source on disk, memory-mapped.

A prepared source is one folder:

    tokenizer.model                     the tokenizer that encoded it
    train-00000.bin, val-00000.bin ...  the shards: a header (`_HEADER`), then the tokens, little-endian uint16 or 32
    manifest.json                       what the folder holds, in order

Its name ends in a hash of all it depends on, so sources and vocabularies lie side by side. It is written under a name
that starts with `.tmp-` and renamed when complete and on the disk: a reader never sees half of one. A `.tmp-` folder
that is left behind was cut off by a kill or a power failure and may be deleted.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from training.data.corpus import Corpus, Part, Split, open_corpus
from training.data.tokenizer import Tokenizer, train_tokenizer
from training.errors import UserError

FORMAT_VERSION = (
    1  # of the shards and of what decides their content: raise it with a change to the tokenizer's training
)
SHARD_TOKENS = 100_000_000

_MAGIC = b"TOKSHARD"
# magic, version, bytes a token, vocabulary size, BOS id, tokens, documents, bytes of text, SHA-256 of the tokenizer
_HEADER = struct.Struct("<8sIIQQQQQ32s")
_POOL_BYTES = 4 << 20  # with less text, starting processes takes longer than encoding
_TOKENIZER_PARTS = 64  # of a longer source, the tokenizer is trained on 64 of its parts


class TokenShards:
    """The tokens of one split, as one stream: BOS, a document, BOS, the next document ...

    Attributes:
        name: the split and its source, for messages.
        vocab_size: ids are below this.
        bos_id: the token that opens each document and so ends the one before.
        n_tokens: length of the stream, BOS included.
        n_documents: number of documents.
        n_bytes: bytes of the text in UTF-8; `n_bytes / n_tokens` turns a loss a token into bits per byte.
    """

    def __init__(self, name: str, paths: list[Path], tokenizer: Tokenizer):
        """Open shards, in order; UserError if one is truncated, no shard, or of another tokenizer."""
        self.name = name
        self.vocab_size = tokenizer.vocab_size
        self.bos_id = tokenizer.bos_id
        self.n_documents = self.n_bytes = 0
        self._arrays: list[np.ndarray] = []
        for path in paths:
            tokens, documents, text_bytes = _open_shard(path, tokenizer)
            self._arrays.append(tokens)
            self.n_documents += documents
            self.n_bytes += text_bytes
        self._ends = np.cumsum([len(array) for array in self._arrays], dtype=np.int64)
        self.n_tokens = int(self._ends[-1])

    @property
    def mean_document_length(self) -> float:
        """Tokens a document, BOS included."""
        return self.n_tokens / self.n_documents

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Windows of the stream.

        Args:
            starts: (n,) integers, 0 <= start <= n_tokens - length.
            length: tokens of each window.

        Returns:
            (n, length) int64.

        Raises:
            UserError: an id past the vocabulary, which only a damaged file can hold.
        """
        windows = np.empty((len(starts), length), dtype=np.int64)
        for window, start in zip(windows, starts.tolist(), strict=True):
            self._read_into(window, start)
        if windows.size and (largest := int(windows.max())) >= self.vocab_size:
            raise UserError(
                f"{self.name}: token id {largest}, allowed: below the vocabulary size {self.vocab_size}; "
                "the shards are damaged, delete their folder and they are made anew"
            )
        return windows

    def _read_into(self, window: np.ndarray, start: int) -> None:
        assert 0 <= start <= self.n_tokens - len(window), (start, len(window), self.n_tokens)
        shard = int(np.searchsorted(self._ends, start, side="right"))
        start -= int(self._ends[shard]) - len(self._arrays[shard])
        filled = 0
        while filled < len(window):  # a window may lie across shards
            piece = self._arrays[shard][start : start + len(window) - filled]
            window[filled : filled + len(piece)] = piece
            filled += len(piece)
            shard, start = shard + 1, 0


@dataclass(frozen=True)
class Dataset:
    """A prepared source: its two splits, their tokenizer, and the fingerprint of the text (`Corpus.fingerprint`)."""

    train: TokenShards
    val: TokenShards
    tokenizer: Tokenizer
    fingerprint: str


def prepare(
    data: str,
    *,
    vocab_size: int,
    data_dir: str | Path,
    tokenizer_file: str | Path | None = None,
    split_text: str = "blank-lines",
    text_field: str | None = None,
    val_fraction: float = 0.05,
    workers: int | None = None,
    progress: bool = False,
) -> Dataset:
    """Open a source as token shards, making them where `data_dir` does not hold them already.

    The shards depend on the source, its options, the tokenizer (or the vocabulary size to train one with) and the
    format, and not on the number of workers. Processes may prepare one source at once: the first to finish is kept.

    Args:
        data: a source, as in `corpus.open_corpus`.
        vocab_size: of the tokenizer to train; a given one must have it.
        data_dir: where prepared sources and downloads are kept.
        tokenizer_file: a sentencepiece `.model` file to use instead of training one.
        split_text: as in `corpus.open_corpus`.
        text_field: as in `corpus.open_corpus`.
        val_fraction: as in `corpus.open_corpus`.
        workers: encoding processes, by default one a CPU, up to 16. They are spawned, which imports the main module
            again: it must not do its work on import, nor import torch at its top.
        progress: show a progress bar if stderr is a terminal.

    Raises:
        UserError: a bad source, tokenizer or vocabulary size, damaged shards, or a folder that can't be written.
    """
    tokenizer = _load_tokenizer(tokenizer_file, vocab_size) if tokenizer_file else None
    data_dir = Path(data_dir)
    corpus = open_corpus(
        data,
        split_text=split_text,
        text_field=text_field or None,
        val_fraction=val_fraction,
        download_dir=data_dir / "downloads",
    )
    key = [FORMAT_VERSION, corpus.fingerprint, vocab_size, tokenizer.hash if tokenizer else "trained"]
    slug = re.sub(r"[^\w.-]+", "-", corpus.name).strip(".-")[:60]
    folder = data_dir / f"{slug}-{vocab_size}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
    if not folder.exists():
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            _build(folder, corpus, vocab_size, tokenizer, workers or _default_workers(), progress)
        except OSError as error:
            raise UserError(f"--data {data} can't be prepared in {data_dir}: {error}") from error
    return open_dataset(folder)


def open_dataset(folder: Path) -> Dataset:
    """Open what `prepare` made; UserError, with what to do about it, where a file is missing or damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        tokenizer = Tokenizer((folder / "tokenizer.model").read_bytes(), str(folder / "tokenizer.model"))
        splits = {
            split: TokenShards(
                f"the {split} split of {manifest['source']}", [folder / name for name in manifest[split]], tokenizer
            )
            for split in ("train", "val")
        }
        return Dataset(**splits, tokenizer=tokenizer, fingerprint=manifest["fingerprint"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"damaged token shards: {reason}; delete {folder} and they are made anew") from error


def _load_tokenizer(path: str | Path, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"--vocab-size is {vocab_size}, but --tokenizer {path} has {tokenizer.vocab_size} tokens: "
            f"pass --vocab-size {tokenizer.vocab_size}"
        )
    return tokenizer


def _default_workers() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, usable)


# Writing ----------------------------------------------------------------------------------------------------------


def _build(
    folder: Path, corpus: Corpus, vocab_size: int, tokenizer: Tokenizer | None, workers: int, progress: bool
) -> None:
    unfinished = folder.with_name(f".tmp-{folder.name}-{uuid.uuid4().hex[:8]}")
    unfinished.mkdir()
    try:
        with _progress_bar(progress, sum(part.n_bytes for part in corpus.parts)) as advance:
            if tokenizer is None:
                advance(0, f"training a tokenizer of {vocab_size} tokens")
                sample = corpus.documents("train", max_parts=_TOKENIZER_PARTS)
                tokenizer = train_tokenizer(sample, vocab_size, unfinished / "tokenizer.model")
            else:
                (unfinished / "tokenizer.model").write_bytes(tokenizer.model_bytes)
            writers = {split: _ShardWriter(unfinished, split, tokenizer) for split in ("train", "val")}
            for part, encoded in zip(corpus.parts, _encode(corpus.parts, tokenizer, workers), strict=True):
                for split, tokens in encoded.items():
                    writers[split].append(tokens)
                advance(part.n_bytes, f"encoding {corpus.name}")
        manifest = {
            "source": corpus.name,
            "fingerprint": corpus.fingerprint,
            "vocab_size": vocab_size,
            "tokenizer_sha256": tokenizer.hash,
        }
        manifest |= {split: writer.close() for split, writer in writers.items()}
        (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        for file in [*unfinished.iterdir(), unfinished]:
            _fsync(file)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            return  # another process was first, and wrote the same
        _fsync(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


class _Encoded(NamedTuple):
    tokens: np.ndarray
    n_documents: int
    n_bytes: int


class _ShardWriter:
    """Appends tokens to numbered shards of a split and starts the next when one holds SHARD_TOKENS."""

    def __init__(self, folder: Path, split: Split, tokenizer: Tokenizer):
        self._folder, self._split, self._tokenizer = folder, split, tokenizer
        self._names: list[str] = []
        self._counts: tuple[int, ...] = ()  # tokens, documents and bytes of the shard that is growing

    def append(self, encoded: _Encoded) -> None:
        if not self._counts:
            self._names.append(f"{self._split}-{len(self._names):05d}.bin")
            self._path.write_bytes(bytes(_HEADER.size))  # filled in when the counts are known
            self._counts = (0, 0, 0)
        with self._path.open("ab") as file:
            file.write(encoded.tokens.data)
        added = (len(encoded.tokens), encoded.n_documents, encoded.n_bytes)
        self._counts = tuple(map(sum, zip(self._counts, added, strict=True)))
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
        itemsize = _token_dtype(tokenizer.vocab_size).itemsize
        constants = (_MAGIC, FORMAT_VERSION, itemsize, tokenizer.vocab_size, tokenizer.bos_id)
        with self._path.open("r+b") as file:
            file.write(_HEADER.pack(*constants, *self._counts, bytes.fromhex(tokenizer.hash)))
        self._counts = ()


def _encode(parts: tuple[Part, ...], tokenizer: Tokenizer, workers: int) -> Iterator[dict[Split, _Encoded]]:
    """Encode the parts, in their order whichever process finishes first."""
    if min(workers, len(parts)) == 1 or sum(part.n_bytes for part in parts) < _POOL_BYTES:
        yield from (_encode_part(part, tokenizer) for part in parts)
        return
    # Spawned and not forked: torch and CUDA have threads, which a fork would leave half alive.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(parts)), context, _start_worker, (tokenizer,))
    try:
        with _without_ctrl_c():
            encoded = pool.map(_encode_in_worker, parts)  # this starts the processes
        yield from encoded
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _without_ctrl_c():
    """Holds Ctrl-C back; a process that is started meanwhile never gets it. It reaches us, and we stop our workers."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


_worker_tokenizer: Tokenizer  # of a process that encodes; there is none in this one


def _start_worker(tokenizer: Tokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where `_without_ctrl_c` could not


def _encode_in_worker(part: Part) -> dict[Split, _Encoded]:
    return _encode_part(part, _worker_tokenizer)


def _encode_part(part: Part, tokenizer: Tokenizer) -> dict[Split, _Encoded]:
    dtype = _token_dtype(tokenizer.vocab_size)
    texts: dict[Split, list[str]] = {}
    for split, text in part.documents():
        texts.setdefault(split, []).append(text)
    return {
        split: _Encoded(
            np.concatenate([np.array(tokenizer.encode(text, bos=True), dtype) for text in documents]),
            len(documents),
            sum(len(text.encode()) for text in documents),
        )
        for split, documents in texts.items()
    }


def _token_dtype(vocab_size: int) -> np.dtype:
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
    if (vocab_size, bos_id, digest.hex()) != (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.hash):
        raise UserError(
            f"{path} is of another tokenizer: vocabulary {vocab_size}, SHA-256 {digest.hex()[:16]}; "
            f"wanted {tokenizer.vocab_size}, {tokenizer.hash[:16]}"
        )
    dtype = _token_dtype(vocab_size)
    size, wanted = path.stat().st_size, _HEADER.size + n_tokens * dtype.itemsize
    if itemsize != dtype.itemsize or size != wanted or not n_tokens or not n_documents:
        raise UserError(f"{path} is truncated or damaged: {size} bytes, its header tells of {wanted}")
    return np.asarray(np.memmap(path, dtype, "r", offset=_HEADER.size)), n_documents, n_bytes


def _fsync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _progress_bar(wanted: bool, total: int):
    """Gives `advance(n_bytes, description)`, which draws on a terminal and does nothing elsewhere."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda n_bytes, description: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda n_bytes, description: bar.update(task, advance=n_bytes, description=description)
