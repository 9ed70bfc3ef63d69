import io
import pickle
import random
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from training.data.tokenizer import interface, load_tokenizer, tokenizer_of, train_tokenizer
from training.data.tokenizer import training as tokenizer_module
from training.errors import UserError

STDLIB = Path(sysconfig.get_path("stdlib"))
SOURCES = [(STDLIB / name).read_text() for name in ("dataclasses.py", "textwrap.py", "heapq.py", "this.py")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(SOURCES, 512, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def pieces(tokenizer, text):
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.content)
    return [processor.id_to_piece(i) for i in tokenizer.encode(text)]


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])) | st.text(" \t\n\r▁▅⁇a0<>s/x"))
@example("")
@example(" leading")
@example("\n\n    indented\n\ttab  \n")
@example("▁")
@example(" ▁ ▁▁a ")
@example("▁\0 b")
@example("\ufeff\0\u2047\u2585")
@example("<s></s><unk><0x0A>")
def test_decoding_gives_the_text_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(2 < token < tokenizer.n_tokens for token in ids)
    assert tokenizer.decode(tokenizer.encode(text, bos=True)) == text


@pytest.mark.parametrize("name", ["decimal.py", "_pydecimal.py", "textwrap.py", "tabnanny.py"])
def test_python_source_comes_back_exactly(tokenizer, name):
    text = (STDLIB / name).read_bytes().decode()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_runs_of_spaces_are_tokens(tokenizer):
    assert pieces(tokenizer, "        return 1")[0] == "▁▁▁▁▁▁▁▁"


def test_digits_stand_alone_however_often_they_meet(tmp_path):
    tokenizer = train_tokenizer(["call 2024 back "] * 99, 275, tmp_path / "t.model")
    assert pieces(tokenizer, "2024") == ["▁", "2", "0", "2", "4"]


def test_characters_never_seen_become_bytes(tokenizer):
    assert pieces(tokenizer, "語")[-3:] == ["<0xE8>", "<0xAA>", "<0x9E>"]


def test_bos_goes_first_and_only_on_request(tokenizer):
    ids = tokenizer.encode("def f():")
    assert tokenizer.encode("def f():", bos=True) == [tokenizer.bos_id, *ids]
    assert tokenizer.bos_id not in ids
    assert tokenizer.encode("", bos=True) == [tokenizer.bos_id]
    assert (tokenizer.n_tokens, tokenizer.bos_id) == (512, 1)


def test_half_a_surrogate_pair_is_no_text(tokenizer):
    with pytest.raises(UserError, match="UTF-8"):
        tokenizer.encode("a\ud800")


def test_an_id_of_a_padded_vocabulary_is_no_text(tokenizer):
    assert tokenizer.decode([512, *tokenizer.encode("a"), 575]) == "a"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 511).filter(lambda token: token != 3 + ord(" "))))  # a space as a byte
def test_decoding_agrees_with_the_library_and_comes_in_whole_characters(tokenizer, ids):
    theirs = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.content).decode(ids)
    stream = tokenizer.stream()
    parts = [stream.write(token) for token in ids] + [stream.close()]
    assert "".join(parts) == tokenizer.decode(ids)
    if "\ufffd" not in theirs:  # how many stand for bytes that are no character is told in no standard
        assert tokenizer.decode(ids) == theirs


def test_a_stream_gives_a_character_with_its_last_byte_and_never_half_of_it(tokenizer):
    stream = tokenizer.stream()
    ids = tokenizer.encode("def 語")
    assert [stream.write(token) for token in ids][-3:] == ["", "", "語"]
    assert stream.close() == ""
    assert stream.write(ids[-3]) == ""
    assert stream.close() == "\ufffd"


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n▁aeinrt語")), size=st.integers(1, 9))
def test_a_long_text_encoded_in_pieces_has_the_tokens_of_the_whole(tokenizer, text, size):
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interface, "PIECE_CHARACTERS", size)
        pieces = list(tokenizer.encode_in_pieces(text))
    assert [token for piece in pieces for token in piece] == whole
    assert len(text) < 100 or len(pieces) > 1


def test_source_code_in_pieces_has_the_tokens_of_the_whole(tokenizer, monkeypatch):
    text = SOURCES[0] + "海象" * 2000 + SOURCES[1]
    whole = tokenizer.encode(text)
    monkeypatch.setattr(interface, "PIECE_CHARACTERS", 100)
    pieces = list(tokenizer.encode_in_pieces(text))
    assert len(pieces) > len(text) // 130
    assert [token for piece in pieces for token in piece] == whole


def test_files_bytes_and_pickles_hold_the_same_tokenizer(tokenizer, tmp_path):
    (tmp_path / "t.model").write_bytes(tokenizer.content)
    for other in (
        load_tokenizer(tmp_path / "t.model"),
        tokenizer_of("tokenizer.model", tokenizer.content),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert (other.hash, other.content) == (tokenizer.hash, tokenizer.content)
        assert other.encode(SOURCES[1]) == tokenizer.encode(SOURCES[1])


def test_training_twice_gives_the_same_bytes_and_writes_them(tokenizer, tmp_path):
    again = train_tokenizer(iter(SOURCES), 512, tmp_path / "t.model")
    assert again.hash == tokenizer.hash
    assert (tmp_path / "t.model").read_bytes() == tokenizer.content
    assert train_tokenizer(SOURCES[:1], 512, tmp_path / "u.model").hash != tokenizer.hash


def test_training_says_nothing(tmp_path, capfd):
    train_tokenizer(SOURCES[:1], 400, tmp_path / "t.model")
    assert capfd.readouterr() == ("", "")


def test_a_very_long_line_is_learned_from_like_any_other(tmp_path):
    tokenizer = train_tokenizer(["海象 " * 4096], 264, tmp_path / "t.model")  # 28 KiB, no shorter remainder
    assert pieces(tokenizer, "海象") == ["▁海象"]


def test_a_text_with_a_reserved_character_is_learned_from_too(tmp_path):
    tokenizer = train_tokenizer(["walrus ▅ walrus\twalrus ▁ walrus\0"] * 9, 272, tmp_path / "t.model")
    assert "walrus" in pieces(tokenizer, "walrus")[-1]


def test_the_sample_is_spread_over_a_source_beyond_the_budget(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "SAMPLE_CHARACTERS", 1000)
    monkeypatch.setattr(tokenizer_module, "_PIECE_CHARACTERS", 10)
    documents = [f"{i:010}" * (1 + i % 3) for i in range(500)]
    sample = tokenizer_module._sample(documents)
    assert 500 <= sum(map(len, sample)) <= 1000
    assert sample == [f"{i:010}" for i in range(500) for _ in range(1 + i % 3)][::16]
    assert "".join(tokenizer_module._sample(documents[:20])) == "".join(documents[:20])


@pytest.mark.parametrize("vocab_size", [-1, 0, 255, 259])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path, vocab_size):
    with pytest.raises(UserError, match=f"--vocab-size is {vocab_size}, allowed: 260 or more"):
        train_tokenizer(SOURCES, vocab_size, tmp_path / "t.model")


def test_the_message_names_the_vocabulary_sizes_that_fit_the_text(tmp_path):
    path = tmp_path / "t.model"
    with pytest.raises(UserError, match="--vocab-size is 260, allowed for this text: 267 or more, or a lower --char"):
        train_tokenizer(["hello world"], 260, path, coverage=1.0)
    with pytest.raises(UserError, match="--vocab-size is 260, allowed for this text: 261 or more"):
        train_tokenizer(["汉字没有空格"], 260, path)
    with pytest.raises(UserError, match=r"--vocab-size is 4096, allowed for this text: up to (\d+)") as error:
        train_tokenizer(["hello world"] * 5, 4096, path)
    assert not path.exists()
    largest = int(str(error.value).split()[-1])
    assert train_tokenizer(["hello world"] * 5, largest, path).n_tokens == largest


@pytest.mark.parametrize("vocab_size", [261, 262, 300, 700, 1024])
def test_a_vocabulary_too_small_for_the_characters_is_filled_with_the_frequent_ones(tmp_path, vocab_size):
    draw = random.Random(0)
    documents = [
        "".join(chr(0x4E00 + draw.randrange(1000)) for _ in range(100)) for _ in range(30)
    ]  # hardly a pair twice
    tokenizer = train_tokenizer(documents, vocab_size, tmp_path / "t.model")
    assert tokenizer.n_tokens == vocab_size
    assert tokenizer.decode(tokenizer.encode(documents[0])) == documents[0]


@pytest.mark.parametrize("content", [b"", b"garbage", b"\0" * 100])
def test_a_file_that_is_no_model_is_refused_by_name(tmp_path, content):
    (tmp_path / "t.model").write_bytes(content)
    with pytest.raises(UserError, match=r"--tokenizer .*t.model is not a sentencepiece model"):
        load_tokenizer(tmp_path / "t.model")


def test_a_missing_model_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"--tokenizer .*t.model: No such file"):
        load_tokenizer(tmp_path / "t.model")


def train_elsewhere(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCES[1].splitlines()), model_writer=model, vocab_size=400, minloglevel=3, **options
    )
    return model.getvalue()


def test_a_model_without_a_token_to_open_documents_is_refused():
    with pytest.raises(UserError, match="no beginning-of-sequence token"):
        tokenizer_of("tokenizer.model", train_elsewhere(bos_id=-1))


def test_a_model_without_byte_fallback_or_space_in_front_works_too():
    plain = tokenizer_of("tokenizer.model", train_elsewhere())
    assert plain.decode(plain.encode("the▁text")) == "the text"
    bare = tokenizer_of(
        "tokenizer.model", train_elsewhere(model_type="bpe", byte_fallback=True, add_dummy_prefix=False)
    )
    assert bare.decode(bare.encode("the▁ text")) == "the▁ text"
