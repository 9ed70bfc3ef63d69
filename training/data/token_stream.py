"""The tokens of one split, as one stream that lies on the disk: memory-mapped, so that any window of it is read at once."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence

import numpy as np

from training.data.tokenizer import Tokenizer
from training.errors import UserError


class TokenStream(ABC):
    """BOS, a document, BOS, the next document ...: what `TokenShards` and `TokensOfOthers` both are.

    Attributes:
        name: the split and its source, for messages.
        vocab_size: ids are below this.
        bos_id: the token that opens each document and so ends the one before.
        n_tokens: length of the stream, BOS included.
        n_documents: number of documents.
        n_bytes: bytes of the text in UTF-8; `n_bytes / n_tokens` turns a loss a token into bits per byte.
    """

    n_documents: int
    n_bytes: int
    way_on = ""
    """What to do about tokens that can't be of the tokenizer."""

    def __init__(self, name: str, arrays: Sequence[np.ndarray], tokenizer: Tokenizer):
        """arrays: the files of the stream in order, (n,) each, of at least one token."""
        self.name = name
        self.vocab_size = tokenizer.n_tokens
        self.bos_id = tokenizer.bos_id
        self._arrays = list(arrays)
        self._ends = np.cumsum([len(array) for array in self._arrays], dtype=np.int64)
        self.n_tokens = int(self._ends[-1])

    @property
    def mean_document_length(self) -> float:
        """Tokens a document, BOS included."""
        return self.n_tokens / self.n_documents

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Windows of the stream.

        Args:
            starts: (n,) integers, 0 <= start <= n_tokens - length.
            length: tokens of each window.

        Returns:
            (n, length) int64.

        Raises:
            UserError: an id past the vocabulary, which only a damaged file or one of another tokenizer can hold.
        """
        windows = np.empty((len(starts), length), dtype=np.int64)
        for window, start in zip(windows, starts.tolist(), strict=True):
            self._read_into(window, start)
        if windows.size and (largest := int(windows.max())) >= self.vocab_size:
            raise UserError(
                f"{self.name}: token id {largest}, allowed: below the vocabulary size {self.vocab_size}; {self.way_on}"
            )
        return windows

    def _read_into(self, window: np.ndarray, start: int) -> None:
        assert 0 <= start <= self.n_tokens - len(window), (start, len(window), self.n_tokens)
        shard = int(np.searchsorted(self._ends, start, side="right"))
        start -= int(self._ends[shard]) - len(self._arrays[shard])
        filled = 0
        while filled < len(window):  # a window may lie across shards
            piece = self._arrays[shard][start : start + len(window) - filled]
            window[filled : filled + len(piece)] = piece
            filled += len(piece)
            shard, start = shard + 1, 0
