"""The reader of `.model` files says what the sentencepiece library says, and what it does not say."""

import io
import random

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from model import sentencepiece_model
from model.sentencepiece_model import Kind, Piece, read, write
from tests.support.texts import SENTENCES, texts


def trained(**options) -> bytes:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_writer=model,
        vocab_size=700,
        hard_vocab_limit=False,
        minloglevel=3,
        **options,
    )
    return model.getvalue()


OURS = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}


def test_pieces_are_those_of_the_library():
    model = trained(**OURS, user_defined_symbols=["<sep>"])
    library, pieces = SentencePieceProcessor(model_proto=model), read(model).pieces
    assert len(pieces) == library.vocab_size()
    for i, piece in enumerate(pieces):
        assert piece.text == library.id_to_piece(i)
        assert piece.score == pytest.approx(library.get_score(i))
        assert (piece.kind == Kind.BYTE) == library.is_byte(i)
        assert (piece.kind == Kind.CONTROL) == library.is_control(i)
        assert (piece.kind == Kind.UNKNOWN) == library.is_unknown(i)
        assert (piece.text == "<sep>") == (piece.kind == Kind.USER_DEFINED)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (OURS, ("bpe", "identity", True, False, False, True)),
        ({"model_type": "unigram"}, ("unigram", "nmt_nfkc", True, True, False, False)),
        (
            OURS | {"add_dummy_prefix": False, "treat_whitespace_as_suffix": True, "byte_fallback": False},
            ("bpe", "identity", False, False, True, False),
        ),
    ],
)
def test_what_is_done_to_a_text_is_told(options, found):
    model = read(trained(**options))
    assert found == (
        model.model_type,
        model.normalization,
        model.space_before_text,
        model.removes_extra_spaces,
        model.space_after_word,
        model.byte_fallback,
    )


def test_a_model_that_is_written_is_read_by_the_library_and_gives_the_same_tokens():
    former = trained(**OURS)
    pieces = list(read(former).pieces)
    again = write(pieces)
    assert read(again).pieces == tuple(pieces)
    one, other = SentencePieceProcessor(model_proto=former), SentencePieceProcessor(model_proto=again)
    assert (other.bos_id(), other.eos_id(), other.unk_id()) == (1, 2, 0)
    for text in texts():
        assert other.encode(text) == one.encode(text)
        assert other.decode(other.encode(text)) == one.decode(one.encode(text))


def test_long_pieces_and_their_lengths():
    pieces = [Piece("<unk>", 0.0, Kind.UNKNOWN), Piece("é" * 300, -2.5)]
    assert read(write(pieces)).pieces == tuple(pieces)


def test_what_is_no_model_is_refused():
    model = trained(**OURS)
    draw = random.Random(0)
    noise = [bytes(draw.randrange(256) for _ in range(100)) for _ in range(50)]
    for content in [b"", b"\x0a", b"hello, world", model[:-3], b"\x0a\xff", *noise]:
        with pytest.raises(ValueError, match="not a sentencepiece model"):
            sentencepiece_model.read(content)
