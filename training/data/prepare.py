"""From a source of text to token shards: the tokenizer is trained, the text encoded by several processes, once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from functools import partial
from pathlib import Path

from training import folder_lock
from training.config import TrainConfig
from training.data import shards
from training.data.build import build
from training.data.corpus import open_corpus
from training.data.encode import default_workers
from training.data.shards import Dataset, open_dataset
from training.data.tokenizer import Tokenizer, load_tokenizer
from training.data.tokens_of_others import open_tokens, token_files, tokenizer_beside
from training.errors import UserError

_PADDED_TO = (8, 16, 32, 64, 128)  # a model's vocabulary may be padded up to a multiple of one of these


def prepare_for(config: TrainConfig, *, show_progress: bool) -> Dataset:
    """`prepare` as the options of a run say. UserError as that, and for text that would lie among the run's files."""
    if os.path.isdir(config.data) and os.path.exists(config.out_dir) and os.path.samefile(config.data, config.out_dir):
        raise UserError(f"--out-dir {config.out_dir} is --data too: the run's files would be text; name another folder")
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
        data_files=config.data_files,
        skip_bad=config.skip_bad_files,
        character_coverage=config.character_coverage,
        workers=config.data_workers,
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
    split_text: str = "auto",
    text_field: str | None = None,
    val_fraction: float = 0.05,
    data_files: str = "",
    skip_bad: bool = False,
    character_coverage: float = 0.0,
    workers: int = 0,
    progress: bool = False,
) -> Dataset:
    """Open a source as token shards, making them where `data_dir` does not hold them already.

    The shards depend on the source, its options, the tokenizer (or the vocabulary size to train one with) and the
    format, and not on the number of workers. Of processes that prepare one source at once the others wait for the first.

    Args:
        data: a source, as in `corpus.open_corpus`, or a folder of tokens that another program has prepared.
        vocab_size: of the tokenizer to train; a given one must have so many tokens, or it must be padded up from them.
        data_dir: where prepared sources and downloads are kept.
        tokenizer_file: a sentencepiece `.model` file or a `tokenizer.json` to use instead of training one.
        document_token: the token of that tokenizer that opens each document; empty: what the file says.
        any_padding: vocab_size may be padded to any size: it is that of weights that are there.
        split_text: as in `corpus.open_corpus`.
        text_field: as in `corpus.open_corpus`.
        val_fraction: as in `corpus.open_corpus`.
        data_files: as in `corpus.open_corpus`.
        skip_bad: as in `corpus.open_corpus`.
        character_coverage: as in `train_tokenizer`.
        workers: encoding processes; 0: `default_workers()`. They are spawned, which imports the main module again: it
            must not do its work on import, nor import torch at its top.
        progress: show a progress bar if stderr is a terminal.

    Raises:
        UserError: a bad source, tokenizer or vocabulary size, damaged shards, or a folder that can't be written.
    """
    others = None if data in ("stdlib", "tinystories") else token_files(Path(data), data_files)
    if others:
        tokenizer_file = tokenizer_file or tokenizer_beside(Path(data))
    tokenizer = _load_tokenizer(tokenizer_file, document_token, vocab_size, any_padding) if tokenizer_file else None
    if tokenizer:
        vocab_size = tokenizer.n_tokens  # to what size a model pads it changes no token
    elif document_token:
        raise UserError(
            f"--document-token {document_token} names a token of a given tokenizer: name that with --tokenizer"
        )
    if others:
        return open_tokens(Path(data), others, tokenizer)
    data_dir = Path(data_dir)
    corpus = open_corpus(
        data,
        split_text=split_text,
        text_field=text_field or None,
        val_fraction=val_fraction,
        data_files=data_files,
        skip_bad=skip_bad,
        download_dir=data_dir / "downloads",
    )
    key = [shards.FORMAT_VERSION, corpus.fingerprint, vocab_size, tokenizer.hash if tokenizer else "trained"]
    key += [character_coverage] if character_coverage and not tokenizer else []
    slug = re.sub(r"[^\w.-]+", "-", corpus.name).strip(".-")[:60]
    folder = data_dir / f"{slug}-{vocab_size}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
    try:
        if not folder.exists():
            data_dir.mkdir(parents=True, exist_ok=True)
            with folder_lock.held(data_dir / f".lock-{folder.name}", wait=partial(_say_who_prepares, folder)):
                if not folder.exists():
                    build(
                        folder,
                        corpus,
                        vocab_size,
                        tokenizer,
                        coverage=character_coverage,
                        workers=workers or default_workers(),
                        progress=progress,
                    )
    except OSError as error:
        raise UserError(f"--data {data} can't be prepared in {data_dir}: {error.strerror or error}") from error
    return open_dataset(folder)


def _say_who_prepares(folder: Path, holder: str) -> None:
    print(f"waiting for another process, which prepares {folder}: {holder}", file=sys.stderr, flush=True)


def _load_tokenizer(path: str | Path, document_token: str, vocab_size: int, any_padding: bool) -> Tokenizer:
    tokenizer = load_tokenizer(path, document_token)
    n_tokens = tokenizer.n_tokens
    padded = [-(-n_tokens // multiple) * multiple for multiple in _PADDED_TO]
    if vocab_size < n_tokens and any_padding:
        raise UserError(
            f"--tokenizer {path} has {n_tokens} tokens, and the weights that the run begins with only {vocab_size}: it is another "
            "model's, or tokens were added to it; name one of no more with --tokenizer"
        )
    if vocab_size < n_tokens or (vocab_size not in (n_tokens, *padded) and not any_padding):
        raise UserError(
            f"--vocab-size is {vocab_size}, but --tokenizer {path} has {n_tokens} tokens: pass --vocab-size {n_tokens}, "
            f"or pad it to a multiple of {_PADDED_TO[-1]}: {padded[-1]}"
        )
    return tokenizer
