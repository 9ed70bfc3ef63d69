"""Texts as they grow: whole characters, up to a stop text, printed in the order of their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from training.log import console

if TYPE_CHECKING:
    from training.data.tokenizer import Tokenizer

SEPARATOR = "-" * 8
"""The line between two texts."""


class GrowingText:
    """What follows one prompt, token by token. The strings that `write` and `close` return are, one after another, the text.

    Attributes:
        prompt: the text of the prompt, as its tokens give it back.
        text: what was given out so far.
        ended: whether a stop text has come; nothing of it, or after it, is given out.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()):
        self._stream, self._stops = tokenizer.stream(), stops
        self._held = ""  # certain text that may be the beginning of a stop text
        self.prompt = "".join(map(self._stream.write, prompt))
        self.text = ""
        self.ended = False

    def write(self, token: int) -> str:
        """Take in a token; the text that is certain now."""
        return self._released(self._held + self._stream.write(token))

    def close(self) -> str:
        """What is left at the end."""
        return "" if self.ended else self._released(self._held + self._stream.close(), is_end=True)

    def _released(self, text: str, is_end: bool = False) -> str:
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.ended = True
            certain = text[: min(found)]
        else:
            begun = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
            held = 0 if is_end else max(begun, default=0)
            certain, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += certain
        return certain


class Transcript:
    """Prints texts one under the other on stdout: the first that has not ended as it grows, those behind it when their turn comes.

    What a terminal would obey, or stdout cannot encode, is shown escaped.
    """

    def __init__(self, count: int):
        self._waiting, self._ended = [""] * count, [False] * count
        self._current = 0

    def write(self, number: int, text: str) -> None:
        """Add to a text."""
        if number == self._current:
            console.write(text, end="")
        else:
            self._waiting[number] += text

    def end(self, number: int) -> None:
        """A text is whole."""
        self._ended[number] = True
        while self._current < len(self._ended) and self._ended[self._current]:
            self._current += 1
            has_next = self._current < len(self._ended)
            console.write(f"\n{SEPARATOR}\n{self._waiting[self._current]}" if has_next else "\n", end="")
