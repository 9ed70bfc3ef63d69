"""tokenizer.bin: a sentencepiece model's pieces and scores, as run.c reads them, and back.

    int32 bytes of the longest piece, then for each piece: float32 score, int32 bytes, the bytes

A space is a space there. BOS and EOS are printed as they stand, with line ends around them.
"""

import re
import struct

from model.sentencepiece_model import SPACE, Kind, Piece, read, write

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_UNKNOWN, _BOS, _EOS, _FIRST_BYTE = 0, 1, 2, 3


def tokenizer_bin(model: bytes, vocab_size: int = 0) -> bytes:
    """The content of tokenizer.bin for the bytes of a `.model` file. ValueError for one whose tokens run.c cannot give.

    vocab_size: of the model, for whose every id run.c reads a piece; those beyond the tokenizer's are never encoded.
    """
    parsed = read(model)
    pieces = parsed.pieces
    of_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    if [piece.text for piece in pieces[_FIRST_BYTE : _FIRST_BYTE + 256]] != of_bytes:
        raise ValueError(
            f"run.c spells the byte b as token {_FIRST_BYTE} + b, and the tokenizer has other tokens there"
        )
    if [pieces[i].kind for i in (_UNKNOWN, _BOS, _EOS)] != [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL]:
        raise ValueError("to run.c tokens 0, 1 and 2 are unknown, BOS and EOS, and the tokenizer has others there")
    if parsed.model_type != "bpe" or parsed.normalization != "identity" or not parsed.space_before_text:
        raise ValueError(
            f"run.c reads texts by byte-pair encoding, as they are, with a space in front; the tokenizer is {parsed.model_type}, "
            f"normalization {parsed.normalization!r}, space in front: {parsed.space_before_text}"
        )
    texts = [piece.text.replace(SPACE, " ").encode() for piece in pieces]
    for i in (_BOS, _EOS):
        texts[i] = b"\n" + texts[i] + b"\n"
    scores = [piece.score for piece in pieces]
    for i in range(len(pieces), vocab_size):
        texts.append(f"<unused {i}>".encode())
        scores.append(-1e10)
    entries = (struct.pack("<fi", score, len(text)) + text for score, text in zip(scores, texts, strict=True))
    return struct.pack("<i", max(map(len, texts))) + b"".join(entries)


def sentencepiece_of(content: bytes) -> bytes:
    """The bytes of a `.model` file that gives the tokens of a tokenizer.bin. ValueError for what is none."""
    pieces, at = [], 4
    try:
        (longest,) = struct.unpack_from("<i", content)
        while at < len(content):
            score, length = struct.unpack_from("<fi", content, at)
            at += 8
            if not 0 <= length <= min(longest, len(content) - at):
                raise ValueError(f"a piece of {length} bytes at byte {at}")
            pieces.append(_piece(len(pieces), content[at : at + length].decode(), score))
            at += length
    except (struct.error, ValueError) as error:
        raise ValueError(f"no tokenizer.bin of llama2.c: {error}") from None
    if len(pieces) < _FIRST_BYTE + 256:
        raise ValueError(f"no tokenizer.bin of llama2.c: it has {len(pieces)} pieces, wanted at least 259")
    return write(pieces)


def _piece(i: int, text: str, score: float) -> Piece:
    if i in (_BOS, _EOS):
        return Piece(text.strip("\n"), score, Kind.CONTROL)
    if i == _UNKNOWN:
        return Piece(text, score, Kind.UNKNOWN)
    if i < _FIRST_BYTE + 256 and _BYTE.fullmatch(text):
        return Piece(text, score, Kind.BYTE)
    return Piece(text.replace(" ", SPACE), score)
