"""What every tokenizer does, whatever its file; what they share of it is here, once."""

from __future__ import annotations

import codecs
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import ClassVar

import numpy as np

from training.errors import UserError

PIECE_CHARACTERS = 1 << 14
"""A longer text is encoded in pieces of about this: the libraries take 50 to 100 bytes of memory for each of its bytes, and
sentencepiece is 2.8 times as fast as on a million characters at once."""

LONGEST_PIECE = 4 << 20
"""Where a text can't be cut for so many characters, such as one character all along, it is cut all the same."""


class Tokenizer(ABC):
    """A tokenizer, held whole by one file. `load_tokenizer(path)` and `tokenizer_of(file_name, content)` make one.

    `SentencePieceTokenizer` (tokenizer.model) and `JsonTokenizer` (tokenizer.json) are the two there are. One of them
    gives its `n_tokens` and `bos_id`, says what `token_bytes` an id stands for, encodes a piece of text (`_encode`), and
    knows where a long text may be cut without changing a token (`_cut`). The rest is here and the same for both.

    It pickles as its file, so that processes can share it.

    Attributes:
        file_name: what the file is called in a checkpoint and beside token shards.
        content: the bytes of the file.
        document_token: the token that opens each document, where --document-token names one; empty: what the file says.
        hash: SHA-256, hex, of what decides the ids: the file, and `document_token` where there is one.
        n_tokens: ids are below this. A model's vocab_size is this, or padded up from it.
        bos_id: the id that opens each document, and so separates it from the one before. No text yields it.
        leading_spaces: how many spaces `encode` puts in front of a text, which `decode` takes off.
    """

    file_name: ClassVar[str]
    n_tokens: int
    bos_id: int
    leading_spaces: int = 0

    def __init__(self, content: bytes, document_token: str = ""):
        self.content = content
        self.document_token = document_token
        named = b"\0" + document_token.encode() if document_token else b""
        self.hash = hashlib.sha256(content + named).hexdigest()

    def __reduce__(self):
        return type(self), (self.content, f"the {self.file_name} of another process", self.document_token)

    # Text to ids

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Token ids of a text, after `bos_id` if asked for. UserError for half a surrogate pair, which is no text."""
        return [self.bos_id] * bos + [token for piece in self.encode_in_pieces(text) for token in piece]

    def encode_in_pieces(self, text: str) -> Iterator[list[int]]:
        """The ids of `encode(text)`, those of a piece at a time, in memory that the text does not grow."""
        start = 0
        while True:
            stop = self._cut(text, start + PIECE_CHARACTERS) if len(text) > start + 2 * PIECE_CHARACTERS else len(text)
            try:
                yield self._encode(text[start:stop], start > 0)
            except (RuntimeError, UnicodeEncodeError) as error:
                raise UserError(f"not a text: {text[start : start + 40]!r} can't be written as UTF-8") from error
            if stop == len(text):
                return
            start = stop

    @abstractmethod
    def _encode(self, text: str, goes_on: bool) -> list[int]:
        """Ids of a text, or of a piece of one that `_cut` cut off from what is before it."""

    @abstractmethod
    def _cut(self, text: str, at: int) -> int:
        """The first place from `at` on where encoding both sides apart gives the ids of the whole."""

    # Ids to text

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 that an id below `n_tokens` stands for, which may be a part of a character; control tokens have none."""

    @cached_property
    def bytes_of_tokens(self) -> tuple[bytes, ...]:
        """`token_bytes` of every id."""
        return tuple(map(self.token_bytes, range(self.n_tokens)))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids. Control tokens and ids of a padded vocabulary give none, bytes that are no UTF-8 give U+FFFD."""
        stream = TextStream(self)
        return "".join([stream.write(int(token)) for token in ids]) + stream.close()

    def is_byte_token(self, token: int) -> bool:
        """Whether an id stands for one byte of a character that the vocabulary has not. No id of a byte-level tokenizer does."""
        return False

    @cached_property
    def is_byte(self) -> np.ndarray:
        """`is_byte_token` of every id, (n_tokens,) bool."""
        return np.array([self.is_byte_token(token) for token in range(self.n_tokens)])

    def stream(self) -> TextStream:
        """A decoder that takes one id after another and gives the text that has become certain."""
        return TextStream(self)


class TextStream:
    """Decodes ids as they come: the strings that `write` and `close` return are, one after another, `decode` of all ids.

    A character whose bytes are in several tokens is given out with the last of them, never half of it.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._bytes_of_tokens = tokenizer.bytes_of_tokens
        self._spaces_to_drop = tokenizer.leading_spaces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, token: int) -> str:
        """Take in an id; the text that is certain now, often a word, empty within a character."""
        raw = self._bytes_of_tokens[token] if 0 <= token < len(self._bytes_of_tokens) else b""
        while raw and self._spaces_to_drop:
            raw, self._spaces_to_drop = (raw[1:], self._spaces_to_drop - 1) if raw.startswith(b" ") else (raw, 0)
        return self._utf8.decode(raw)

    def close(self) -> str:
        """What is left at the end: U+FFFD for a character that was not finished, else nothing."""
        return self._utf8.decode(b"", final=True)


def pairs_within(tokens: Iterable[str]) -> frozenset[str]:
    """All pairs of neighbours within tokens. Between two characters that are no such pair a text can be cut: no token spans it."""
    return frozenset(token[i : i + 2] for token in tokens for i in range(len(token) - 1))
