"""A text in every form that a corpus is read from, and what is read."""

import json
import pickle

import pyarrow
import pyarrow.parquet

from training.data.corpus import Report, open_corpus

TEXTS = [f"Story {i}: grüße, 日本.\n\nThe end of {'x' * (i % 7)}." for i in range(40)]
JSONL = "".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(TEXTS))


def documents(source, report=None, **options):
    """All documents of a source in order. They survive the journey to another process."""
    opened = open_corpus(str(source), **options)
    pieces = [piece for part in opened.parts for piece in part.pieces(report or Report())]
    pieces = pickle.loads(pickle.dumps(pieces))
    return [text for piece in pieces for _, text in piece.documents(report)]


def parquet(path, **columns):
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path
