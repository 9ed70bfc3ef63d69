"""A sentencepiece model: what `train_tokenizer` makes, and what Llama 1 and 2 and llama2.c use."""

from __future__ import annotations

import sys
from functools import cached_property

from training.data.tokenizer.interface import LONGEST_PIECE, Tokenizer, pairs_within
from training.errors import UserError

# sentencepiece writes a space as U+2581, so that one in the text would come back as a space.
_SPACE_MARK = "\u2581"


class SentencePieceTokenizer(Tokenizer):
    """A `.model` file. `decode(encode(text)) == text` holds for every text under a model of `train_tokenizer`."""

    file_name = "tokenizer.model"

    def __init__(self, content: bytes, name: str = "the tokenizer", document_token: str = ""):
        from sentencepiece import SentencePieceProcessor

        super().__init__(content, document_token)
        try:
            if not content:
                raise RuntimeError("empty")
            self._processor = SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise UserError(f"{name} is not a sentencepiece model: {error}") from error
        processor = self._processor
        self.n_tokens = processor.vocab_size()
        self.bos_id = self._id_of(document_token) if document_token else processor.bos_id()
        if self.bos_id < 0:
            found = f"has no token {document_token!r}" if document_token else "has no beginning-of-sequence token"
            raise UserError(f"{name} {found}, and each document opens with one; name another with --document-token")
        bytes_of_mark = [self._id_of(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        self._mark_ids = [] if -1 in bytes_of_mark else bytes_of_mark  # empty: bytes are no tokens of this model
        # Asked of the library: decoding may drop none of the spaces in front, one, or all.
        dropped = 3 - len(processor.decode_pieces([_SPACE_MARK] * 3)) if self._id_of(_SPACE_MARK) >= 0 else 1
        self.leading_spaces = sys.maxsize if dropped == 3 else dropped

    def _id_of(self, piece: str) -> int:
        token = self._processor.piece_to_id(piece)
        return token if self._processor.id_to_piece(token) == piece else -1

    def _encode(self, text: str, goes_on: bool) -> list[int]:
        head, *rest = text.split(_SPACE_MARK) if self._mark_ids else [text]
        ids = self._encode_inside(head) if goes_on else self._processor.encode(head)
        for text_after_mark in rest:
            ids += self._mark_ids + self._encode_inside(text_after_mark)
        return ids

    def _encode_inside(self, text: str) -> list[int]:
        """Ids of what is not the beginning of a text. The NUL, which never merges, takes the space that may go in front."""
        nul = self._processor.piece_to_id("<0x00>")
        anchored = self._processor.encode("\0" + text)
        return anchored[anchored.index(nul) + 1 :]

    def _cut(self, text: str, at: int) -> int:
        if not self._mark_ids:
            return len(text)
        last = min(at + LONGEST_PIECE, len(text))
        for place in range(at, last):
            if text[place - 1 : place + 1].replace(" ", _SPACE_MARK) not in self._pairs:
                return place
        return last

    @cached_property
    def _pairs(self) -> frozenset[str]:
        processor = self._processor
        return pairs_within(
            processor.id_to_piece(token)
            for token in range(self.n_tokens)
            if not (processor.is_byte(token) or processor.is_control(token) or processor.is_unknown(token))
        )

    def token_bytes(self, token: int) -> bytes:
        """As in `Tokenizer`."""
        processor = self._processor
        if processor.is_control(token):
            return b""
        if processor.is_unknown(token):
            return processor.decode([token]).encode()
        piece = processor.id_to_piece(token)
        return bytes([int(piece[3:5], 16)]) if processor.is_byte(token) else piece.replace(_SPACE_MARK, " ").encode()

    def is_byte_token(self, token: int) -> bool:
        """As in `Tokenizer`."""
        return self._processor.is_byte(token)
