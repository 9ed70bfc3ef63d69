"""Which tokenizer a file is of, by its name: tokenizer.model is sentencepiece's, tokenizer.json that of Hugging Face."""

from __future__ import annotations

from pathlib import Path

from model.llama2c.tokenizer import sentencepiece_of
from training.data.tokenizer.interface import Tokenizer
from training.data.tokenizer.json_file import JsonTokenizer
from training.data.tokenizer.sentencepiece_file import SentencePieceTokenizer
from training.errors import UserError

FILE_NAMES = (SentencePieceTokenizer.file_name, JsonTokenizer.file_name)
"""What a tokenizer's file may be called in a checkpoint and beside token shards."""


def load_tokenizer(path: str | Path, document_token: str = "") -> Tokenizer:
    """The tokenizer of a file, as --tokenizer names it: `.json` is a tokenizer.json, `.bin` llama2.c's, any other sentencepiece's.

    Raises:
        UserError: no such file, or it is something else, or it has no token to open documents with.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"--tokenizer {path}: {error.strerror}; wanted a sentencepiece .model file or a tokenizer.json"
        ) from error
    if path.suffix.lower() == ".bin":
        try:
            content = sentencepiece_of(content)
        except ValueError as error:
            raise UserError(f"--tokenizer {path}: {error}") from None
    name = JsonTokenizer.file_name if path.suffix.lower() == ".json" else SentencePieceTokenizer.file_name
    return tokenizer_of(name, content, document_token, name=f"--tokenizer {path}")


def tokenizer_of(file_name: str, content: bytes, document_token: str = "", *, name: str = "the tokenizer") -> Tokenizer:
    """The tokenizer whose `file_name`, `content` and `document_token` these are; name: for messages."""
    kind = JsonTokenizer if file_name == JsonTokenizer.file_name else SentencePieceTokenizer
    return kind(content, name, document_token)
