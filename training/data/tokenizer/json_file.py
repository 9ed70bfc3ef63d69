"""A tokenizer.json of Hugging Face's `tokenizers`: the byte-level BPE of GPT-2, Llama 3 and most since, or Llama 2's."""

from __future__ import annotations

import json
from functools import cached_property

from training.data.tokenizer.interface import LONGEST_PIECE, Tokenizer, pairs_within
from training.errors import UserError

DOCUMENT_TOKENS = ("<|begin_of_text|>", "<|endoftext|>", "<|end_of_text|>", "<bos>", "<s>")
"""Tokens that separate documents, in the order in which they are looked for where the file puts none in front of a text."""


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for: printable ones for themselves, the rest from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`. The names of special tokens within a text are text: a document can't end itself."""

    file_name = "tokenizer.json"

    def __init__(self, content: bytes, name: str = "the tokenizer", document_token: str = ""):
        super().__init__(content, document_token)
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(f"{name} needs the tokenizers library: pip install triton-llama[huggingface]") from error
        try:
            spec = json.loads(content)
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
            self._decoder = _decoder_of(spec)
            self._added = {token["id"]: token for token in spec.get("added_tokens") or ()}
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"{name} is not a tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.bos_id = self._find_bos(name, document_token)
        self._tokenizer.encode_special_tokens = True
        self.n_tokens = 1 + max(self._tokenizer.get_vocab().values())
        self._alphabet = _byte_alphabet()
        strips = any(
            part["type"] == "Metaspace" or (part["type"], part.get("start")) == ("Strip", 1) for part in self._decoder
        )
        self.leading_spaces = int(strips)

    @property
    def _is_byte_level(self) -> bool:
        return any(part["type"] == "ByteLevel" for part in self._decoder)

    def _find_bos(self, name: str, document_token: str) -> int:
        specials = {token["content"]: number for number, token in self._added.items() if token["special"]}
        if document_token:
            found = self._tokenizer.token_to_id(document_token)
        else:
            in_front = self._tokenizer.encode("").ids[:1]  # what the file itself adds to an empty text
            known = [specials[wanted] for wanted in DOCUMENT_TOKENS if wanted in specials]
            found = next((token for token in (*in_front, *known) if token in specials.values()), None)
        if found is None:
            raise UserError(
                f"{name} has no token {document_token or ' or '.join(DOCUMENT_TOKENS)} to open documents with; "
                f"name one with --document-token; its special tokens are {', '.join(list(specials)[:20]) or 'none'}"
            )
        return found

    def _encode(self, text: str, goes_on: bool) -> list[int]:
        text.encode()  # half a surrogate pair is refused as in the other kind
        if not goes_on or self._is_byte_level:
            return self._ids_of(text)
        anchored = self._ids_of("\0" + text)  # the NUL takes the space that may go in front of a text
        return anchored[anchored.index(self._nul) + 1 :]

    def _ids_of(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    @cached_property
    def _nul(self) -> int:
        """The id of a NUL where it is a token by itself, as bytes are in Llama 2's kind; else -1."""
        token = self._tokenizer.token_to_id("<0x00>")
        return -1 if token is None or self._ids_of("\0\0").count(token) != 2 else token

    def _cut(self, text: str, at: int) -> int:
        """Where no token spans the place; of byte-level ones before a space that follows a word, where all begin a new word."""
        if not self._is_byte_level and self._nul < 0:
            return len(text)
        last = min(at + LONGEST_PIECE, len(text))
        for place in range(at, last):
            before, behind = text[place - 1], text[place]
            if self._is_byte_level:
                if behind == " " and before.isascii() and before.isalnum() and before + "Ġ" not in self._pairs:
                    return place
            elif (before + behind).replace(" ", "\u2581") not in self._pairs:
                return place
        return last

    @cached_property
    def _pairs(self) -> frozenset[str]:
        return pairs_within(self._tokenizer.get_vocab(with_added_tokens=False))

    def token_bytes(self, token: int) -> bytes:
        """As in `Tokenizer`."""
        if added := self._added.get(token):
            return b"" if added["special"] else added["content"].encode()
        piece = self._tokenizer.id_to_token(token)
        if piece is None:  # a gap in the numbering
            return b""
        if self._is_byte_level:
            return bytes([self._alphabet[character] for character in piece])
        if self.is_byte_token(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    def is_byte_token(self, token: int) -> bool:
        """As in `Tokenizer`."""
        piece = self._tokenizer.id_to_token(token) or ""
        return not self._is_byte_level and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _decoder_of(spec: dict) -> list[dict]:
    """The steps by which tokens become text. UserError for a kind whose tokens are no bytes of the text, such as BERT's."""
    decoder = spec.get("decoder") or {"type": "none"}
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if not {"ByteLevel", "ByteFallback", "Metaspace"} & set(kinds):
        raise UserError(
            f"its decoder is {', '.join(kinds)}, wanted ByteLevel (GPT-2, Llama 3) or ByteFallback or Metaspace (Llama 2)"
        )
    return steps
