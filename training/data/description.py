"""What a run says of its data in its first lines, so that text that is not what it seems is seen."""

from __future__ import annotations

import numpy as np

from training.data.shards import Dataset
from training.data.token_stream import TokenStream

_BEGINNING = 100  # characters
_BAD_SHOWN = 5


def describe(dataset: Dataset) -> list[str]:
    """Lines: how many documents and tokens, how they were cut, what was left out, and the beginning of the first one."""
    train, val, manifest = dataset.train, dataset.val, dataset.manifest
    cut = f", {manifest['cut']}" if manifest.get("cut") else ""
    about = "about " if getattr(train, "is_estimated", False) else ""
    lines = [
        f"data {manifest['source']}{cut}: {about}{train.n_documents:,} documents of {train.n_tokens:,} tokens to train on, "
        f"{val.n_documents:,} of {val.n_tokens:,} to validate on"
    ]
    if count := manifest.get("without_text"):
        lines.append(f"left out: {count:,} records without text")
    if bad := manifest.get("bad"):
        more = manifest["n_bad"] - _BAD_SHOWN
        lines += [f"left out: {line}" for line in bad[:_BAD_SHOWN]]
        lines += [f"left out: {more:,} more that can't be read"] if more > 0 else []
    if count := manifest.get("n_byte_tokens"):
        share = count / (train.n_bytes + val.n_bytes)
        if share >= 0.001:
            lines.append(
                f"{share:.1%} of the text's bytes are tokens of one byte: characters that the {dataset.tokenizer.n_tokens:,} "
                "tokens do not hold (--character-coverage, --vocab-size)"
            )
    lines.append(f"the first document begins {beginning(dataset)!r}")
    return lines


def beginning(dataset: Dataset) -> str:
    """How the first document of the training split begins."""
    tokens = _first_tokens(dataset.train)
    text = dataset.tokenizer.decode(tokens)
    return text if len(text) <= _BEGINNING else f"{text[:_BEGINNING]}..."


def _first_tokens(shards: TokenStream) -> list[int]:
    tokens = shards.read(np.array([0]), min(shards.n_tokens, 4 * _BEGINNING))[0].tolist()
    ends = [place for place, token in enumerate(tokens) if token == shards.bos_id and place > 0]
    return tokens[: ends[0]] if ends else tokens
