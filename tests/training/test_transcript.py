"""Texts as they grow: nothing of a stop text, no half characters, one text after another."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.tokenizer import TextStream
from training.log.transcript import SEPARATOR, GrowingText, Transcript


class Bytes:
    """A tokenizer whose ids are bytes."""

    bytes_of_tokens = tuple(bytes([byte]) for byte in range(256))
    leading_spaces = 0

    def stream(self):
        return TextStream(self)


def written(text, stops=(), prompt=b""):
    """What is given out byte by byte, until a stop text has come."""
    growing = GrowingText(Bytes(), prompt, stops)
    parts = []
    for byte in text.encode():
        parts.append(growing.write(byte))
        if growing.ended:
            break
    return [*parts, growing.close()]


def test_a_character_comes_with_its_last_byte():
    assert written("é€a") == ["", "é", "", "", "€", "a", ""]
    assert GrowingText(Bytes(), "né".encode()).prompt == "né"


def test_what_may_begin_a_stop_text_is_held_back_until_it_does_not():
    assert written("abcabd", ["abd"]) == ["", "", "abc", "", "", "", ""]
    assert written("xab", ["abc"]) == ["x", "", "", "ab"]
    assert written("aab", ["ab"]) == ["", "a", "", ""]


@given(
    text=st.text(alphabet="abé", max_size=30),
    stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3),
)
def test_the_text_ends_before_the_first_stop_text_to_be_whole(text, stops):
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    wanted = text
    if ends:
        seen = text[: min(ends)]
        wanted = seen[: min(seen.index(stop) for stop in stops if stop in seen)]
    assert "".join(written(text, stops)) == wanted


def test_texts_are_printed_one_under_the_other_in_their_order(capsys):
    transcript = Transcript(3)
    transcript.write(0, "a")
    transcript.write(1, "b")
    transcript.write(2, "c")
    assert capsys.readouterr().out == "a"
    transcript.write(1, "B")
    transcript.end(1)
    assert capsys.readouterr().out == ""
    transcript.end(0)
    assert capsys.readouterr().out == f"\n{SEPARATOR}\nbB\n{SEPARATOR}\nc"
    transcript.write(2, "C\x1b")
    transcript.end(2)
    assert capsys.readouterr().out == "C\\x1b\n"


@pytest.mark.parametrize("byte", [0x80, 0xFF])
def test_bytes_that_are_no_character_are_given_out_as_such(byte):
    growing = GrowingText(Bytes(), b"")
    assert growing.write(byte) == "\ufffd"
