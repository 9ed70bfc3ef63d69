"""A sentencepiece model written as tokenizer.json gives the same tokens: with the real `tokenizers`, where it is installed."""

import io
import json

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from model.huggingface.tokenizer import opened_by, tokenizer_config, tokenizer_json
from model.sentencepiece_model import Kind, Piece, write
from tests.support.texts import ODD, SENTENCES, texts

OURS = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "character_coverage": 0.98,
}


def trained(**options) -> bytes:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter((SENTENCES + [text for text in ODD if text.strip()]) * 3),
        model_writer=model,
        minloglevel=3,
        **{"vocab_size": 700, "hard_vocab_limit": False} | options,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def model() -> bytes:
    return trained(**OURS)


def read_by_theirs(content: dict):
    return pytest.importorskip("tokenizers").Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize("change", [{}, {"add_dummy_prefix": False}, {"byte_fallback": False}, {"split_digits": False}])
def test_the_same_tokens_and_the_same_text(change):
    model = trained(**OURS | change)
    ours = SentencePieceProcessor(model_proto=model)
    theirs = read_by_theirs(tokenizer_json(model, ours.bos_id()))
    everything = texts()
    assert len(everything) >= 300
    for text in everything:
        ids = ours.encode(text)
        assert theirs.encode(text).ids == [ours.bos_id(), *ids], text
        if ours.unk_id() not in ids:
            assert theirs.decode([ours.bos_id(), *ids]) == ours.decode(ids) == text


@pytest.mark.parametrize("words", ["$A", "<s> $A", "<s> $A </s>", "</s> $A"])
@pytest.mark.parametrize("bos", ["<s>", "</s>"])
def test_a_tokenizer_json_is_opened_by_one_token_and_by_nothing_else(model, words, bos):
    """Whatever it did before; of kinds that add tokens none is left."""
    theirs = read_by_theirs(tokenizer_json(model, 1))
    bare = theirs.encode("the text", add_special_tokens=False).ids
    processors = pytest.importorskip("tokenizers").processors
    template = processors.TemplateProcessing(single=words, special_tokens=[("<s>", 1), ("</s>", 2)])
    for former in (template, processors.Sequence([processors.ByteLevel(trim_offsets=False), template])):
        theirs.post_processor = former
        bos_id = theirs.token_to_id(bos)
        opened = read_by_theirs(opened_by(theirs.to_str().encode(), bos_id))
        assert opened.encode("the text").ids == [bos_id, *bare]


def test_two_texts_are_opened_each():
    model = trained(**OURS)
    theirs = read_by_theirs(tokenizer_json(model, 1))
    a, b = theirs.encode("one").ids, theirs.encode("two").ids
    assert theirs.encode("one", "two").ids == a + b


def test_merges_are_in_the_order_of_the_scores(model):
    """Known without the library: pieces by score, each by every cut into two pieces."""
    pieces = [Piece("<unk>", 0.0, Kind.UNKNOWN), Piece("<s>", 0.0, Kind.CONTROL)]
    pieces += [Piece("aab", -1.0), Piece("ab", -3.0), Piece("aa", -2.0), Piece("a", -4.0), Piece("b", -5.0)]
    content = tokenizer_json(write(pieces), 1)
    assert content["model"]["merges"] == ["a ab", "aa b", "a a", "a b"]
    assert content["model"]["vocab"]["aab"] == 2
    assert [token["content"] for token in content["added_tokens"]] == ["<unk>", "<s>"]


def test_the_configuration_names_the_token_that_ends_documents(model):
    content = tokenizer_json(model, 1)
    config = tokenizer_config(content, 1, 1, 64)
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "<s>", "<unk>")
    assert config["model_max_length"] == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "model type is unigram; bpe"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalization 'nmt_nfkc'"),
        ({"remove_extra_whitespaces": True}, "removing extra spaces: True"),
        ({"treat_whitespace_as_suffix": True}, "spaces behind words"),
        ({"user_defined_symbols": ["<sep>", "<cls>"]}, "has 2 pieces that are user defined .*'<sep>'"),
    ],
)
def test_a_model_that_cannot_be_told_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_json(trained(**OURS | options), 1)
