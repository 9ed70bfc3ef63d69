"""Text to token ids and back: sentencepiece's byte-pair encoding, trained on the run's own text."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable
from pathlib import Path

from training.errors import UserError

MIN_VOCAB_SIZE = 260  # 256 bytes, unknown, beginning, end, and at least one character
SAMPLE_CHARACTERS = 16 << 20

# llama2.c asks for all characters (1.0). On the standard library that gives 190 of 4096 ids to characters that make up
# a hundredth of a percent of the text, and byte fallback spells those as well: 3.09 bytes a token against 3.07.
CHARACTER_COVERAGE = 0.9999

_PIECE_CHARACTERS = 4096
# sentencepiece writes a space as U+2581, so that one in the text would come back as a space, and it drops a whole
# sentence of its training text for one U+2585, its sign for the unknown.
_SPACE_MARK = "\u2581"
_UNKNOWN_MARK = "\u2585"


class Tokenizer:
    """A sentencepiece model. `decode(encode(text)) == text` holds for every text under a model of `train_tokenizer`.

    Pickles as the bytes of its model file, so that processes can share it.

    Attributes:
        model_bytes: the model file.
        hash: SHA-256 of the model file, hex.
        vocab_size: number of token ids.
        bos_id: the id that opens each document.
        eos_id: the id that ends a text, -1 where the model has none; the shards don't use it.
    """

    def __init__(self, model_bytes: bytes, name: str = "the tokenizer"):
        from sentencepiece import SentencePieceProcessor

        try:
            if not model_bytes:
                raise RuntimeError("empty")
            self._processor = SentencePieceProcessor(model_proto=model_bytes)
        except RuntimeError as error:
            raise UserError(f"{name} is not a sentencepiece model: {error}") from error
        self.model_bytes = model_bytes
        self.hash = hashlib.sha256(model_bytes).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if self.bos_id < 0:
            raise UserError(f"{name} has no beginning-of-sequence token, and each document opens with one")
        bytes_of_mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        self._mark_ids = bytes_of_mark if self._processor.unk_id() not in bytes_of_mark else []

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a `.model` file; UserError if there is none or it is something else."""
        try:
            return cls(Path(path).read_bytes(), f"--tokenizer {path}")
        except OSError as error:
            raise UserError(f"--tokenizer {path}: {error.strerror}; wanted a sentencepiece .model file") from error

    @classmethod
    def from_bytes(cls, model_bytes: bytes) -> Tokenizer:
        """The tokenizer whose `model_bytes` these are."""
        return cls(model_bytes)

    def __reduce__(self):
        return Tokenizer.from_bytes, (self.model_bytes,)

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Token ids of a text, after `bos_id` if asked for. The text never yields `bos_id` or `eos_id` itself."""
        try:
            ids = self._encode(text)
        except (RuntimeError, UnicodeEncodeError) as error:
            raise UserError(f"not a text: {text[:40]!r} can't be written as UTF-8") from error
        return [self.bos_id, *ids] if bos else ids

    def _encode(self, text: str) -> list[int]:
        if _SPACE_MARK not in text or not self._mark_ids:
            return self._processor.encode(text)
        head, *rest = text.split(_SPACE_MARK)
        ids = self._processor.encode(head)
        nul = self._processor.piece_to_id("<0x00>")
        for text_after_mark in rest:
            # The NUL, which never merges, takes the space that sentencepiece may put in front of a text.
            anchored = self._processor.encode("\0" + text_after_mark)
            ids += self._mark_ids + anchored[anchored.index(nul) + 1 :]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; beginning and end tokens give none. IndexError for an id past the vocabulary."""
        return self._processor.decode([int(token) for token in ids])


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
    return Tokenizer(model.getvalue(), str(path))


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
