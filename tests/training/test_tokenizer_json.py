"""tokenizer.json: byte-level BPE as GPT-2 and Llama 3 have it, and Llama 2's kind. Run where `tokenizers` is installed."""

import functools
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.tokenizer import interface, load_tokenizer, tokenizer_of
from training.errors import UserError

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

TEXTS = ["def main(argument):\n    return 2024 + argument  # grüße\n", "Once upon a time, 日本 was far away.\n\n"] * 20
LLAMA_3_WORDS = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(*, words="", specials=("<|endoftext|>",), bos_in_front=False):
    """A tokenizer.json trained here: GPT-2's kind, or with `words` Llama 3's."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = [pre_tokenizers.Split(tokenizers.Regex(words), "isolated")] if words else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(False, use_regex=not words)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if bos_in_front:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{specials[-1]} $A", special_tokens=[(specials[-1], tokenizer.token_to_id(specials[-1]))]
        )
    return tokenizer


def llama_2():
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]  # the bytes are tokens like others
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


@functools.cache
def content(kind):
    """The bytes of a tokenizer.json; a function, so that a failure does not print them."""
    if kind == "gpt2":
        tokenizer = byte_level()
    elif kind == "llama3":
        tokenizer = byte_level(
            words=LLAMA_3_WORDS, specials=("<|end_of_text|>", "<|begin_of_text|>"), bos_in_front=True
        )
    else:
        tokenizer = llama_2()
    return tokenizer.to_str().encode()


KINDS = ["gpt2", "llama3", "llama2"]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\t.,a0ü日<|>"))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(text=ANY_TEXT)
def test_a_text_comes_back_and_has_the_tokens_of_the_library(kind, text):
    tokenizer = tokenizer_of("tokenizer.json", content(kind))
    theirs = tokenizers.Tokenizer.from_str(content(kind).decode())
    theirs.encode_special_tokens = True
    ids = tokenizer.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False).ids
    assert tokenizer.bos_id not in ids
    if kind != "llama2" or "▁" not in text:
        assert tokenizer.decode(ids) == text == tokenizer.decode(tokenizer.encode(text, bos=True))
    stream = tokenizer.stream()
    assert "".join(map(stream.write, ids)) + stream.close() == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT, size=st.integers(1, 9))
def test_a_long_text_encoded_in_pieces_has_the_tokens_of_the_whole(kind, text, size):
    tokenizer = tokenizer_of("tokenizer.json", content(kind))
    # The last word is in no token, so that there is a place to cut whatever the library has merged.
    for text in (text, text + TEXTS[0] + text + TEXTS[1] + "qzxjkvq"):  # noqa: B020
        whole = tokenizer.encode(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(interface, "PIECE_CHARACTERS", size)
            pieces = list(tokenizer.encode_in_pieces(text))
        assert [token for piece in pieces for token in piece] == whole
    assert len(pieces) > 1


def test_the_document_token_is_what_the_file_puts_in_front_or_a_known_one_or_named(tmp_path):
    gpt2, llama3 = (tokenizer_of("tokenizer.json", content(kind)) for kind in ("gpt2", "llama3"))
    assert gpt2.encode("", bos=True) == [0]
    assert llama3.bos_id == 1
    (tmp_path / "T.JSON").write_bytes(content("llama3"))
    named = load_tokenizer(tmp_path / "T.JSON", "<|end_of_text|>")
    assert named.bos_id == 0
    assert len({named.hash, llama3.hash, gpt2.hash}) == 3
    with pytest.raises(UserError, match=r"no token <eos> to open .*--document-token.*are <\|end_of_text\|>, <\|begin"):
        load_tokenizer(tmp_path / "T.JSON", "<eos>")
    unknown = byte_level(specials=("<|strange|>",)).to_str().encode()
    with pytest.raises(UserError, match=r"no token <\|begin_of_text\|> or .*--document-token; .* are <\|strange\|>"):
        tokenizer_of("tokenizer.json", unknown)


def test_special_tokens_and_the_padding_of_a_vocabulary_are_no_text():
    tokenizer = tokenizer_of("tokenizer.json", content("gpt2"))
    assert tokenizer.decode([0, *tokenizer.encode("a"), tokenizer.n_tokens, tokenizer.n_tokens + 7]) == "a"


def test_truncation_and_padding_of_the_file_are_not_applied():
    library = byte_level()
    library.enable_truncation(3)
    library.enable_padding(length=50)
    tokenizer = tokenizer_of("tokenizer.json", library.to_str().encode())
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]
    assert len(tokenizer.encode("a")) == 1


def test_it_pickles_as_its_file():
    tokenizer = tokenizer_of("tokenizer.json", content("llama3"), "<|end_of_text|>")
    other = pickle.loads(pickle.dumps(tokenizer))
    assert (other.content, other.hash, other.bos_id) == (tokenizer.content, tokenizer.hash, 0)


def test_half_a_surrogate_pair_is_no_text():
    with pytest.raises(UserError, match="UTF-8"):
        tokenizer_of("tokenizer.json", content("gpt2")).encode("a\ud800")


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"\xff", b'{"decoder": 3}', b'{"model": {"type": "BPE"}}'])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, raw):
    (tmp_path / "t.json").write_bytes(raw)
    with pytest.raises(UserError, match=r"--tokenizer .*t.json is not a tokenizer.json"):
        load_tokenizer(tmp_path / "t.json")


def test_a_kind_whose_tokens_are_no_bytes_is_refused():
    library = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    library.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match="its decoder is WordPiece, wanted ByteLevel"):
        tokenizer_of("tokenizer.json", library.to_str().encode())
