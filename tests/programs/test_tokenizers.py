"""Runs whose tokenizer is a tokenizer.json: prepared with it, saved with it, resumed and sampled by it alone."""

import re

import pytest

import generate
import train
from tests.support.run_testing import TINY, arguments, call, write_text
from training.checkpoint import files as checkpoint

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The options of a run with GPT-2's kind of tokenizer, of 290 tokens, and a vocabulary padded to 304."""
    folder = tmp_path_factory.mktemp("json")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    text = write_text(folder / "text.txt")
    library.train_from_iterator([text.read_text()], trainer)
    library.save(str(folder / "tokenizer.json"))
    return TINY | {
        "data": text,
        "data_dir": folder / "data",
        "out_dir": folder / "out",
        "tokenizer": folder / "tokenizer.json",
        "vocab_size": 304,
    }


def test_a_run_with_a_tokenizer_json_saves_resumes_and_writes_with_it(run):
    result = call(train, arguments(**run | {"max_iters": 6}))
    assert (result.status, result.err) == (0, "")
    saved = checkpoint.load(run["out_dir"])
    assert saved.tokenizer_name == "tokenizer.json"
    assert saved.tokenizer == run["tokenizer"].read_bytes()
    result = call(train, arguments(out_dir=run["out_dir"], init_from="resume", max_iters=12))
    assert (result.status, result.err) == (0, "")
    result = call(generate, [str(run["out_dir"]), "--prompt=the café 日", "--max-new-tokens=5", "--device=cpu"])
    assert result.status == 0, result.err
    assert result.out.startswith("the café 日")


@pytest.mark.parametrize("size", [289, 291, 305, 1000])
def test_a_vocabulary_that_is_neither_the_tokenizers_nor_padded_is_refused(run, size):
    result = call(train, arguments(**run | {"vocab_size": size}))
    assert result.status == 2
    message = (
        rf"train\.py: error: --vocab-size is {size}, but .* has 290 tokens: pass --vocab-size 290, or pad .*: 384\n"
    )
    assert re.fullmatch(message, result.err)
