from dataclasses import replace

import pytest
import torch

from bench.step import tokens
from tests.support.run_testing import write_text
from training.config import TrainConfig
from training.data.batches import Batches
from training.data.prepare import prepare


def config(tmp_path, **options):
    shape = {"vocab_size": 300, "max_seq_len": 16, "batch_size": 4, "gradient_accumulation_steps": 2}
    return TrainConfig(data_dir=str(tmp_path / "data"), **shape | options)


@pytest.mark.parametrize(("vocab_size", "share"), [(4096, 0.038), (128256, 0.025)])
def test_the_most_frequent_token_is_as_frequent_as_in_text(tmp_path, vocab_size, share):
    micro_batches, drawn = tokens.draw(config(tmp_path, vocab_size=vocab_size, batch_size=128, max_seq_len=256))
    assert drawn["source"] == "zipf"
    assert drawn["most_frequent"] == pytest.approx(share, abs=0.002)
    frequencies = torch.bincount(micro_batches[0][0].flatten(), minlength=vocab_size)
    assert frequencies.argmax() == 0
    assert frequencies[:10].sum() > 10 * frequencies[1000:1010].sum()


def test_uniform_tokens_have_no_frequent_one(tmp_path):
    _, drawn = tokens.draw(config(tmp_path, batch_size=128, max_seq_len=256), "uniform")
    assert drawn["source"] == "uniform"
    assert 1 / 300 < drawn["most_frequent"] < 1.3 / 300


def test_targets_are_the_tokens_that_follow_and_a_seed_gives_one_batch(tmp_path):
    (first, second), _ = tokens.draw(config(tmp_path))
    assert first[0].shape == first[1].shape == (4, 16)
    assert torch.equal(first[0][:, 1:], first[1][:, :-1])
    assert not torch.equal(first[0], second[0])
    assert torch.equal(tokens.draw(config(tmp_path))[0][1][1], second[1])
    assert not torch.equal(tokens.draw(config(tmp_path, seed=1))[0][0][0], first[0])


def test_a_prepared_corpus_gives_the_first_step_of_its_training(tmp_path):
    text = write_text(tmp_path / "text.txt")
    of = config(tmp_path, data=str(text))
    assert tokens.draw(of)[1]["source"] == "zipf"  # not prepared yet, and not prepared for this
    dataset = prepare(of.data, vocab_size=300, data_dir=of.data_dir)
    (first, second), drawn = tokens.draw(of)
    wanted = Batches(dataset.train, sequence_length=16, sequences_per_step=8, seed=of.seed).sequences(0, 0, 8)
    assert torch.equal(torch.cat([first[0], second[0]]), wanted.tokens)
    assert torch.equal(torch.cat([first[1], second[1]]), wanted.targets)
    assert drawn["source"] == "text.txt"
    for other in (replace(of, vocab_size=301), replace(of, data="stdlib"), replace(of, batch_size=10_000)):
        assert tokens.draw(other)[1]["source"] == "zipf"
    assert tokens.draw(of, "zipf")[1]["source"] == "zipf"
