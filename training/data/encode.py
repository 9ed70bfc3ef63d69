"""Parts of a source to tokens, in this process or in several."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from training.data.corpus import Part, Report, Split
from training.data.shards import Encoded, token_dtype
from training.data.tokenizer import Tokenizer
from training.data.workers import in_processes

POOL_BYTES = 4 << 20  # with less text, starting processes takes longer than encoding
WORKER_BYTES = 512 << 20
"""What a process that encodes takes at most: it holds one document, of up to 64 MiB, a few times over (351 MB measured)."""


@dataclass
class EncodedPart:
    """A part as tokens: what each split gets of it, and what was left out."""

    splits: dict[Split, Encoded]
    report: Report


def default_workers() -> int:
    """One process a CPU, up to 16, and no more than fit half of the memory at WORKER_BYTES each."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, usable, memory_bytes() // 2 // WORKER_BYTES))


def memory_bytes() -> int:
    """Memory of this machine, or of the container where that is less."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else [16 << 30]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found.append(int(Path(limit).read_text()))
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
    return min(found)


def encode_parts(parts: Iterator[Part], tokenizer: Tokenizer, workers: int) -> Iterator[EncodedPart]:
    """Encode parts, in their order whichever process finishes first. Parts that are streams have been taken apart before."""
    work = partial(encode_part, tokenizer=tokenizer)
    return in_processes(work, parts, workers, _name) if workers > 1 else map(work, parts)


def _name(part: Part) -> str:
    return ", ".join(dict.fromkeys(str(path) for path, _ in part.reads[:3])) + " ..." * (len(part.reads) > 3)


def encode_part(part: Part, tokenizer: Tokenizer) -> EncodedPart:
    """The documents of a part as tokens, each behind a BOS."""
    dtype = token_dtype(tokenizer.n_tokens)
    bos = np.array([tokenizer.bos_id], dtype)
    arrays: dict[Split, list[np.ndarray]] = {}
    counts: dict[Split, list[int]] = {}
    report = Report()
    for split, text in part.documents(report):
        arrays.setdefault(split, []).append(bos)
        arrays[split] += [np.array(ids, dtype) for ids in tokenizer.encode_in_pieces(text)]
        counts.setdefault(split, [0, 0])
        counts[split][0] += 1
        counts[split][1] += len(text.encode())
    is_byte = tokenizer.is_byte
    splits = {}
    for split, its_arrays in arrays.items():
        tokens = np.concatenate(its_arrays)
        its_arrays.clear()
        splits[split] = Encoded(tokens, *counts[split], n_byte_tokens=int(is_byte[tokens].sum()))
    return EncodedPart(splits, report)
