"""What a sentencepiece `.model` file holds, read from its bytes: pieces, scores, and what is done to a text before.

The file is a protocol buffer, `ModelProto` of https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto.
The sentencepiece library does not tell the normalizer's settings, and its own reader of them needs protobuf, hence these lines.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

SPACE = "\u2581"
"""What a space is written as in a piece."""


class Kind(IntEnum):
    """What a piece is."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """An entry of the vocabulary; its id is its place. Of two merges the one into the piece of higher score comes first."""

    text: str
    score: float = 0.0
    kind: Kind = Kind.NORMAL


@dataclass(frozen=True)
class SentencepieceModel:
    """A `.model` file. `normalization` is the name of its rule ("identity": none); `model_type` is bpe, unigram, word or char."""

    pieces: tuple[Piece, ...]
    model_type: str
    normalization: str
    space_before_text: bool
    removes_extra_spaces: bool
    space_after_word: bool
    byte_fallback: bool

    def of(self, kind: Kind) -> dict[int, Piece]:
        """The pieces of a kind, by id."""
        return {i: piece for i, piece in enumerate(self.pieces) if piece.kind == kind}


def read(model: bytes) -> SentencepieceModel:
    """Read the bytes of a `.model` file. ValueError where they are something else."""
    try:
        return _read(model)
    except (IndexError, ValueError, struct.error, AttributeError, TypeError) as error:
        raise ValueError(f"not a sentencepiece model: {error}") from None


def _read(model: bytes) -> SentencepieceModel:
    fields = _fields(model)
    pieces = []
    for number, message in fields:
        if number == 1:
            piece = dict(_fields(message))
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            pieces.append(Piece(piece.get(1, b"").decode(), score, Kind(piece.get(3, Kind.NORMAL))))
    if not pieces:
        raise ValueError("it has no pieces")
    messages = dict(fields)
    trainer, normalizer = dict(_fields(messages.get(2, b""))), dict(_fields(messages.get(3, b"")))
    return SentencepieceModel(
        pieces=tuple(pieces),
        model_type=("unigram", "bpe", "word", "char")[trainer.get(3, 1) - 1],
        # The rule is what is compiled into the file; the name is for people, and one without a table does nothing.
        normalization=normalizer.get(1, b"").decode() if normalizer.get(2) else "identity",
        space_before_text=bool(normalizer.get(3, 1)),
        removes_extra_spaces=bool(normalizer.get(4, 1)),
        space_after_word=bool(trainer.get(24, 0)),
        byte_fallback=bool(trainer.get(35, 0)),
    )


def write(pieces: list[Piece]) -> bytes:
    """The bytes of a `.model` file of byte-pair encoding with these pieces, as Llama 2's: identity, a space before a text."""
    encoded = []
    for piece in pieces:
        text = piece.text.encode()
        message = b"\x0a" + _as_varint(len(text)) + text + b"\x15" + struct.pack("<f", piece.score)
        message += b"\x18" + _as_varint(piece.kind)
        encoded.append(b"\x0a" + _as_varint(len(message)) + message)
    trainer = b"\x18\x02" + b"\x20" + _as_varint(len(pieces)) + b"\x98\x02\x01"  # model_type, vocab_size, byte_fallback
    normalizer = b"\x0a\x08identity" + b"\x18\x01" + b"\x20\x00" + b"\x28\x01"  # name and the three switches
    return b"".join(
        [*encoded, b"\x12", _as_varint(len(trainer)), trainer, b"\x1a", _as_varint(len(normalizer)), normalizer]
    )


def _fields(message: bytes) -> list[tuple[int, int | bytes]]:
    """Numbers and values of a message's fields: integers for varints, bytes for the rest."""
    fields: list[tuple[int, int | bytes]] = []
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(message, at)
        elif wire in (1, 2, 5):
            length, at = _varint(message, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
            if at + length > len(message):
                raise IndexError("it ends within a field")
            value, at = message[at : at + length], at + length
        else:
            raise IndexError(f"a field of wire type {wire}")
        fields.append((tag >> 3, value))
    return fields


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if not byte & 0x80:
            return value, at
        if shift > 63:
            raise IndexError("a number of more than ten bytes")


def _as_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
