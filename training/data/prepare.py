"""From a source of text to token shards: the tokenizer is trained, the text encoded by several processes, once."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from training import folder_lock
from training.config import TrainConfig
from training.data import shards
from training.data.corpus import Corpus, Part, Split, open_corpus
from training.data.digests import digest
from training.data.shards import Dataset, Encoded, ShardWriter, open_dataset, token_dtype
from training.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from training.errors import UserError
from training.stopping import answering_signals

_POOL_BYTES = 4 << 20  # with less text, starting processes takes longer than encoding
_PADDED_TO = (8, 16, 32, 64, 128)  # a model's vocabulary may be padded up to a multiple of one of these
_TOKENIZER_PARTS = 64  # the tokenizer is trained on so many parts of a source, or on all where there are fewer


def prepare_for(config: TrainConfig, *, show_progress: bool) -> Dataset:
    """`prepare` as the options of a run say."""
    return prepare(
        config.data,
        vocab_size=config.vocab_size,
        data_dir=config.data_dir,
        tokenizer_file=config.tokenizer or None,
        document_token=config.document_token,
        any_padding=config.init_from != "scratch",
        split_text=config.split_text,
        text_field=config.text_field or None,
        val_fraction=config.val_fraction,
        progress=show_progress,
    )


def prepare(
    data: str,
    *,
    vocab_size: int,
    data_dir: str | Path,
    tokenizer_file: str | Path | None = None,
    document_token: str = "",
    any_padding: bool = False,
    split_text: str = "blank-lines",
    text_field: str | None = None,
    val_fraction: float = 0.05,
    workers: int | None = None,
    progress: bool = False,
) -> Dataset:
    """Open a source as token shards, making them where `data_dir` does not hold them already.

    The shards depend on the source, its options, the tokenizer (or the vocabulary size to train one with) and the
    format, and not on the number of workers. Of processes that prepare one source at once the others wait for the first.

    Args:
        data: a source, as in `corpus.open_corpus`.
        vocab_size: of the tokenizer to train; a given one must have so many tokens, or it must be padded up from them.
        data_dir: where prepared sources and downloads are kept.
        tokenizer_file: a sentencepiece `.model` file or a `tokenizer.json` to use instead of training one.
        document_token: the token of that tokenizer that opens each document; empty: what the file says.
        any_padding: vocab_size may be padded to any size: it is that of weights that are there.
        split_text: as in `corpus.open_corpus`.
        text_field: as in `corpus.open_corpus`.
        val_fraction: as in `corpus.open_corpus`.
        workers: encoding processes, by default one a CPU, up to 16. They are spawned, which imports the main module
            again: it must not do its work on import, nor import torch at its top.
        progress: show a progress bar if stderr is a terminal.

    Raises:
        UserError: a bad source, tokenizer or vocabulary size, damaged shards, or a folder that can't be written.
    """
    tokenizer = _load_tokenizer(tokenizer_file, document_token, vocab_size, any_padding) if tokenizer_file else None
    if tokenizer:
        vocab_size = tokenizer.n_tokens  # to what size a model pads it changes no token
    elif document_token:
        raise UserError(
            f"--document-token {document_token} names a token of a given tokenizer: name that with --tokenizer"
        )
    data_dir = Path(data_dir)
    corpus = open_corpus(
        data,
        split_text=split_text,
        text_field=text_field or None,
        val_fraction=val_fraction,
        download_dir=data_dir / "downloads",
    )
    key = [shards.FORMAT_VERSION, corpus.fingerprint, vocab_size, tokenizer.hash if tokenizer else "trained"]
    slug = re.sub(r"[^\w.-]+", "-", corpus.name).strip(".-")[:60]
    folder = data_dir / f"{slug}-{vocab_size}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
    if not folder.exists():
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            with folder_lock.held(data_dir / f".lock-{folder.name}", wait=partial(_say_who_prepares, folder)):
                if not folder.exists():
                    _build(folder, corpus, vocab_size, tokenizer, workers or _default_workers(), progress)
        except OSError as error:
            raise UserError(f"--data {data} can't be prepared in {data_dir}: {error}") from error
    return open_dataset(folder)


def _say_who_prepares(folder: Path, holder: str) -> None:
    print(f"waiting for another process, which prepares {folder}: {holder}", file=sys.stderr, flush=True)


def _load_tokenizer(path: str | Path, document_token: str, vocab_size: int, any_padding: bool) -> Tokenizer:
    tokenizer = load_tokenizer(path, document_token)
    n_tokens = tokenizer.n_tokens
    padded = [-(-n_tokens // multiple) * multiple for multiple in _PADDED_TO]
    if vocab_size < n_tokens or (vocab_size not in (n_tokens, *padded) and not any_padding):
        raise UserError(
            f"--vocab-size is {vocab_size}, but --tokenizer {path} has {n_tokens} tokens: pass --vocab-size {n_tokens}, "
            f"or pad it to a multiple of {_PADDED_TO[-1]}: {padded[-1]}"
        )
    return tokenizer


def _default_workers() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, usable)


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
                tokenizer = answering_signals(
                    partial(train_tokenizer, sample, vocab_size, unfinished / "tokenizer.model")
                )
            else:
                (unfinished / tokenizer.file_name).write_bytes(tokenizer.content)
            writers = {split: ShardWriter(unfinished, split, tokenizer) for split in ("train", "val")}
            for part, encoded in zip(corpus.parts, _encode(corpus.parts, tokenizer, workers), strict=True):
                for split, tokens in encoded.items():
                    writers[split].append(tokens)
                advance(part.n_bytes, f"encoding {corpus.name}")
        manifest = {
            "source": corpus.name,
            "fingerprint": corpus.fingerprint,
            "vocab_size": vocab_size,
            "tokenizer_sha256": tokenizer.hash,
            "document_token": tokenizer.document_token,
        }
        names = {split: writer.close() for split, writer in writers.items()}
        digests = {name: digest(unfinished / name) for of_split in names.values() for name in of_split}
        manifest |= {**names, "digests": digests}
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


def _encode(parts: tuple[Part, ...], tokenizer: Tokenizer, workers: int) -> Iterator[dict[Split, Encoded]]:
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
    """Blocks Ctrl-C. Processes started meanwhile inherit the block and never get it; we do, afterwards, and stop them."""
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for systems where `_without_ctrl_c` does nothing


def _encode_in_worker(part: Part) -> dict[Split, Encoded]:
    return _encode_part(part, _worker_tokenizer)


def _encode_part(part: Part, tokenizer: Tokenizer) -> dict[Split, Encoded]:
    dtype = token_dtype(tokenizer.n_tokens)
    texts: dict[Split, list[str]] = {}
    for split, text in part.documents():
        texts.setdefault(split, []).append(text)
    return {
        split: Encoded(
            np.concatenate([np.array(tokenizer.encode(text, bos=True), dtype) for text in documents]),
            len(documents),
            sum(len(text.encode()) for text in documents),
        )
        for split, documents in texts.items()
    }


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
