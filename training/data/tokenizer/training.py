"""A tokenizer for the run's own text: sentencepiece's byte-pair encoding, trained on a sample of it."""

from __future__ import annotations

import io
import os
import re
import sys
from collections import Counter
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

_LEAST_COVERAGE = 0.98  # sentencepiece takes no less; for less, the rare characters are taken out of its text

_PIECE_CHARACTERS = 4096
# sentencepiece drops a whole sentence of its training text for one of these, its sign for the unknown.
_UNKNOWN_MARK = "\u2585"


def train_tokenizer(documents: Iterable[str], vocab_size: int, path: Path, coverage: float = 0.0) -> Tokenizer:
    """Train a byte-pair encoding with the settings of llama2.c and write it to `path`; same documents, same bytes.

    Digits are tokens of their own, characters outside the vocabulary become bytes, and nothing is normalized: runs of
    spaces, tabs and line ends survive. Of long sources it reads all and keeps evenly spaced pieces of 4096 characters,
    8 to 16 million characters in all.

    coverage: the share of the characters of the text that are to be tokens of their own. 0 chooses: 0.9999, or where a
    writing has more characters than fit, as many of the most frequent as fill half of the vocabulary, or as much more of it
    as pairs of them leave empty.

    Raises:
        UserError: `vocab_size` is below 260 or what the characters of `coverage` take, or above what the text can fill.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"--vocab-size is {vocab_size}, allowed: {MIN_VOCAB_SIZE} or more")
    sample = _sample(documents)
    try:
        if 0 < coverage < _LEAST_COVERAGE:
            sample, coverage = _without_rare(sample, _frequent(sample, share=coverage)), 1.0
        try:
            model = _train(sample, vocab_size, coverage or CHARACTER_COVERAGE)
        except _TooManyCharactersError:
            if coverage:
                raise
            model = _train_frequent(sample, vocab_size)
    except _TooManyCharactersError as error:
        lower = f", or a lower --character-coverage than {coverage}" if coverage else ""
        raise UserError(
            f"--vocab-size is {vocab_size}, allowed for this text: {error.needed} or more{lower}"
        ) from error
    path.write_bytes(model)
    return SentencePieceTokenizer(model, str(path))


class _TooManyCharactersError(Exception):
    """The characters alone need a larger vocabulary, of `needed` tokens."""

    def __init__(self, needed: int):
        self.needed = needed


class _TooFewPairsError(UserError):
    """The text is too short for the vocabulary: it fills one of `most` tokens."""

    def __init__(self, vocab_size: int, most: int):
        super().__init__(f"--vocab-size is {vocab_size}, allowed for this text: up to {most}")
        self.most = most


def _train_frequent(sample: list[str], vocab_size: int) -> bytes:
    """As `_train`, with as many characters as fill half of the vocabulary, and what pairs of them leave empty."""
    room = max(1, (vocab_size - MIN_VOCAB_SIZE + 1) // 2)
    try:
        return _train(_without_rare(sample, _frequent(sample, at_most=room)), vocab_size, 1.0)
    except _TooFewPairsError as error:
        room += vocab_size - error.most
        return _train(_without_rare(sample, _frequent(sample, at_most=room)), vocab_size, 1.0)


def _train(sample: list[str], vocab_size: int, coverage: float) -> bytes:
    """The model file. _TooManyCharactersError or _TooFewPairsError where the text does not fit the vocabulary."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=coverage,
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
            raise _TooManyCharactersError(int(found[1])) from error
        if found := re.search(r"value <= (\d+)", str(error)):
            raise _TooFewPairsError(vocab_size, int(found[1])) from error
        raise
    return model.getvalue()


def _frequent(sample: list[str], *, share: float = 1.0, at_most: int = sys.maxunicode) -> set[str]:
    """The most frequent characters: those that make up a share of the text, and no more than so many."""
    counts: Counter[str] = Counter()
    for piece in sample:
        counts.update(piece)
    total, covered, frequent = counts.total(), 0, set()
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= share * total or len(frequent) == at_most:
            break
        frequent.add(character)
        covered += count
    return frequent


def _without_rare(sample: list[str], frequent: set[str]) -> list[str]:
    """The sample with a NUL for every other character, which sentencepiece gives no token and never merges."""
    return [re.sub(f"[^{re.escape(''.join(sorted(frequent)))}]", "\0", piece) for piece in sample]


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
