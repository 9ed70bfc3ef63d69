"""Text to token ids and back. One small interface, `Tokenizer`, and two kinds of file that fill it."""

from training.data.tokenizer.files import FILE_NAMES, load_tokenizer, tokenizer_of
from training.data.tokenizer.interface import TextStream, Tokenizer
from training.data.tokenizer.training import train_tokenizer

__all__ = ["FILE_NAMES", "TextStream", "Tokenizer", "load_tokenizer", "tokenizer_of", "train_tokenizer"]
