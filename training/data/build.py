"""A prepared source is built: its tokenizer trained, its parts encoded, its shards written. What is done survives a kill."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

from training.data import encode
from training.data.corpus import Corpus, Part, Report
from training.data.digests import digest
from training.data.shards import ShardWriter
from training.data.tokenizer import FILE_NAMES, Tokenizer, tokenizer_of, train_tokenizer
from training.data.workers import WorkerDied
from training.errors import UserError
from training.stopping import answering_signals

_TOKENIZER_PARTS = 64  # the tokenizer is trained on so many parts of a source, or on all where there are fewer
_JOURNAL = "progress.json"
_JOURNAL_SECONDS = 2.0
_BAD_LINES = 20  # so many things that could not be read are named


def build(
    folder: Path,
    corpus: Corpus,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    *,
    coverage: float,
    workers: int,
    progress: bool,
) -> None:
    """Make `folder` of a source: under a name that begins with `.tmp-`, renamed when complete and on the disk.

    Of a large source, what is done stays there when the preparation is cut off, and is where the next one begins: only one
    process at a time may build a folder. tokenizer: None trains one, as in `train_tokenizer`.

    Raises:
        UserError: a source that can't be read, or a process that was killed.
    """
    large = keep = sum(part.n_bytes for part in corpus.parts) >= encode.POOL_BYTES
    workers = workers if large else 1
    unfinished = folder.with_name(f".tmp-{folder.name}" if large else f".tmp-{folder.name}-{uuid.uuid4().hex[:8]}")
    unfinished.mkdir(exist_ok=True)
    try:
        with _progress_bar(progress, sum(part.n_bytes for part in corpus.parts)) as advance:
            tokenizer = tokenizer or _trained_before(unfinished)
            if tokenizer is None:
                advance(0, f"training a tokenizer of {vocab_size} tokens")
                sample = corpus.documents("train", max_parts=_TOKENIZER_PARTS)
                draft = unfinished / "tokenizer.draft"
                tokenizer = answering_signals(partial(train_tokenizer, sample, vocab_size, draft, coverage))
                draft.rename(unfinished / tokenizer.file_name)
            else:
                (unfinished / tokenizer.file_name).write_bytes(tokenizer.content)
            writers = {split: ShardWriter(unfinished, split, tokenizer) for split in ("train", "val")}
            report = _encode_all(unfinished, corpus, tokenizer, writers, workers, advance)
        manifest = {
            "source": corpus.name,
            "fingerprint": corpus.fingerprint,
            "vocab_size": vocab_size,
            "tokenizer_sha256": tokenizer.hash,
            "document_token": tokenizer.document_token,
            "cut": corpus.cut,
            "without_text": report.without_text,
            "n_bad": len(corpus.bad) + report.n_bad,
            "bad": [*corpus.bad, *report.bad][:_BAD_LINES],
            "n_byte_tokens": sum(writer.n_byte_tokens for writer in writers.values()),
        }
        names = {split: writer.close() for split, writer in writers.items()}
        digests = {name: digest(unfinished / name) for of_split in names.values() for name in of_split}
        manifest |= {**names, "digests": digests}
        (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        (unfinished / _JOURNAL).unlink(missing_ok=True)
        for file in [*unfinished.iterdir(), unfinished]:
            _fsync(file)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            return  # another process was first, and wrote the same
        _fsync(folder.parent)
    except WorkerDied as error:
        raise WorkerDied(
            f"preparing the data: {error}. What is encoded so far is kept, and the next try goes on from there: "
            f"lower --data-workers (now {workers})"
        ) from error
    except UserError:
        keep = False  # of a source that will be another one when it is mended
        raise
    finally:
        if not keep:
            shutil.rmtree(unfinished, ignore_errors=True)


def _trained_before(unfinished: Path) -> Tokenizer | None:
    """The tokenizer that an earlier try has trained."""
    for name in FILE_NAMES:
        if (unfinished / name).exists():
            return tokenizer_of(name, (unfinished / name).read_bytes(), name=str(unfinished / name))
    return None


def _encode_all(unfinished, corpus: Corpus, tokenizer: Tokenizer, writers: dict, workers: int, advance) -> Report:
    """Encode and write all parts but those that an earlier try has written; what was left out on the way."""
    report = Report()
    done = _go_on(unfinished, corpus, tokenizer, writers, report)
    sizes: list[int] = []

    def pieces() -> Iterator[Part]:
        for part in corpus.parts:
            for piece in part.pieces(streams):
                sizes.append(piece.n_bytes)
                yield piece

    streams = Report()  # what streams can't read is found here, what parts can't in whoever encodes them
    todo = pieces()
    for _ in islice(todo, done):
        pass
    advance(sum(sizes), f"encoding {corpus.name}")
    written = time.monotonic()
    try:
        for result in encode.encode_parts(todo, tokenizer, workers):
            for split, tokens in result.splits.items():
                writers[split].append(tokens)
            report.add(result.report, _BAD_LINES)
            advance(sizes[done], f"encoding {corpus.name}")
            done += 1
            if time.monotonic() - written > _JOURNAL_SECONDS:
                _write_journal(unfinished, corpus, tokenizer, writers, report, done)
                written = time.monotonic()
    except BaseException:
        _write_journal(unfinished, corpus, tokenizer, writers, report, done)
        raise
    report.add(streams, _BAD_LINES)
    return report


def _key(corpus: Corpus, tokenizer: Tokenizer) -> list:
    """What must be the same for the parts of two tries to be the same."""
    return [tokenizer.hash, len(corpus.parts), sum(part.n_bytes for part in corpus.parts)]


def _write_journal(unfinished: Path, corpus: Corpus, tokenizer: Tokenizer, writers: dict, report: Report, done: int):
    journal = {
        "key": _key(corpus, tokenizer),
        "done": done,
        "writers": {split: writer.state() for split, writer in writers.items()},
        "without_text": report.without_text,
        "n_bad": report.n_bad,
        "bad": report.bad,
    }
    draft = unfinished / f"{_JOURNAL}.draft"
    draft.write_text(json.dumps(journal))
    draft.replace(unfinished / _JOURNAL)


def _go_on(unfinished: Path, corpus: Corpus, tokenizer: Tokenizer, writers: dict, report: Report) -> int:
    """Put the writers and the report where an earlier try was cut off. Returns how many parts it has written."""
    try:
        journal = json.loads((unfinished / _JOURNAL).read_text())
        if journal["key"] != _key(corpus, tokenizer):
            raise ValueError("another source")
        for split, writer in writers.items():
            writer.go_on(journal["writers"][split])
        report.without_text, report.n_bad, report.bad = journal["without_text"], journal["n_bad"], journal["bad"]
        return journal["done"]
    except (OSError, ValueError, KeyError, TypeError):
        for split in writers:
            for path in unfinished.glob(f"{split}-*.bin"):
                path.unlink()
            writers[split] = ShardWriter(unfinished, split, tokenizer)
        return 0


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
