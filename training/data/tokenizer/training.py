"""A tokenizer for the run's own text: sentencepiece's byte-pair encoding, trained on a sample of it."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable
from pathlib import Path

from training.data.tokenizer.interface import Tokenizer
from training.data.tokenizer.sentencepiece_file import SentencePieceTokenizer
from training.errors import UserError

MIN_VOCAB_SIZE = 260  # 256 bytes, unknown, beginning, end, and at least one character
SAMPLE_CHARACTERS = 16 << 20

# llama2.c asks for all characters (1.0). On the standard library that gives 190 of 4096 ids to characters that make up
# a hundredth of a percent of the text, and byte fallback spells those as well: 3.09 bytes a token against 3.07.
CHARACTER_COVERAGE = 0.9999

_PIECE_CHARACTERS = 4096
# sentencepiece drops a whole sentence of its training text for one of these, its sign for the unknown.
_UNKNOWN_MARK = "\u2585"


def train_tokenizer(documents: Iterable[str], vocab_size: int, path: Path) -> Tokenizer:
    """Train a byte-pair encoding with the settings of llama2.c and write it to `path`; same documents, same bytes.

    Digits are tokens of their own, characters outside the vocabulary become bytes, and nothing is normalized: runs of
    spaces, tabs and line ends survive. Of long sources it reads all and keeps evenly spaced pieces of 4096 characters,
    8 to 16 million characters in all.

    Raises:
        UserError: `vocab_size` is below what the bytes and characters take, or above what the text can fill.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"--vocab-size is {vocab_size}, allowed: {MIN_VOCAB_SIZE} or more")
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(_sample(documents)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=CHARACTER_COVERAGE,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            unk_surface=r" \342\201\207 ",
            max_sentence_length=4 * _PIECE_CHARACTERS,  # bytes; longer ones would be dropped without a word
            num_threads=min(8, os.cpu_count() or 1),
            minloglevel=3,
        )
    except RuntimeError as error:
        if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            raise UserError(f"--vocab-size is {vocab_size}, allowed for this text: {found[1]} or more") from error
        if found := re.search(r"value <= (\d+)", str(error)):
            raise UserError(f"--vocab-size is {vocab_size}, allowed for this text: up to {found[1]}") from error
        raise
    path.write_bytes(model.getvalue())
    return SentencePieceTokenizer(model.getvalue(), str(path))


def _sample(documents: Iterable[str]) -> list[str]:
    """Every n-th piece of the documents, n the least power of two that keeps to SAMPLE_CHARACTERS.

    One pass without knowing the length: when the budget is full, every second piece goes and the stride doubles.
    """
    kept: list[str] = []
    kept_characters = seen = 0
    stride = 1
    for document in documents:
        for start in range(0, len(document), _PIECE_CHARACTERS):
            if seen % stride == 0:
                kept.append(document[start : start + _PIECE_CHARACTERS].replace(_UNKNOWN_MARK, ""))
                kept_characters += len(kept[-1])
            seen += 1
            if kept_characters > SAMPLE_CHARACTERS:
                kept = kept[::2]
                kept_characters = sum(map(len, kept))
                stride *= 2
    return kept
