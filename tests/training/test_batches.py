import random
import threading
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.data import shards
from training.data.batches import Batch, Batches, prefetch
from training.data.shards import TokenShards
from training.errors import UserError

BOS = 1


@pytest.fixture(scope="module")
def open_tokens(tmp_path_factory):
    """Token shards, on disk, of a list of ids."""

    def open_tokens(ids):
        folder = tmp_path_factory.mktemp("shards")
        tokenizer = SimpleNamespace(n_tokens=1000, bos_id=BOS, hash="00" * 32)
        writer = shards.ShardWriter(folder, "train", tokenizer)
        writer.append(shards.Encoded(np.array(ids, "<u2"), max(1, list(ids).count(BOS)), len(ids)))
        return TokenShards("the train split of a test", [folder / name for name in writer.close()], tokenizer)

    return open_tokens


@pytest.fixture(scope="module")
def counting(open_tokens):
    """100 tokens 100, 101, ...: each tells its place. 14 windows of 7."""
    return open_tokens(range(100, 200))


def make(split, seed=1, length=7, per_step=4):
    return Batches(split, sequence_length=length, sequences_per_step=per_step, seed=seed)


def rows(batches, steps):
    return torch.cat([batches.sequences(step, 0, batches.sequences_per_step).tokens for step in steps])


def test_each_epoch_sees_every_window_once_and_in_another_order(counting):
    seen = rows(make(counting), range(7))  # 28 rows, two epochs; step 3 spans both
    epochs = [seen[:14], seen[14:]]
    windows = torch.arange(100, 198).reshape(14, 7)
    for epoch in epochs:
        assert torch.equal(epoch[epoch[:, 0].argsort()], windows)
        assert not torch.equal(epoch, windows)
    assert not torch.equal(*epochs)


def test_targets_are_the_tokens_that_follow_and_each_token_is_a_target_once(counting):
    batches = make(counting)
    targets = []
    for step in range(7):
        batch = batches.sequences(step, 0, 4)
        assert torch.equal(batch.targets, batch.tokens + 1)
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        assert batch.tokens.shape == (4, 7)
        assert batch.tokens.is_contiguous()
        assert batch.targets.is_contiguous()
        targets.append(batch.targets)
    assert sorted(torch.cat(targets).flatten()[: 14 * 7].tolist()) == list(range(101, 199))


def test_the_shortest_split_that_fills_a_batch_is_enough(open_tokens):
    assert make(open_tokens(range(100, 100 + 4 * 7 + 1))).windows == 4
    message = (
        r"the train split of a test is too short: its 28 tokens give 3 sequences of --max-seq-len 7.* takes 4 \(--batch"
    )
    with pytest.raises(UserError, match=message):
        make(open_tokens(range(100, 100 + 4 * 7)))


@given(st.integers(0, 50), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_however_a_batch_is_sliced_it_is_the_same_batch(counting, step, counts):
    whole = make(counting, per_step=sum(counts) if sum(counts) <= 14 else 14)
    size = whole.sequences_per_step
    starts = np.minimum(np.cumsum([0, *counts]), size).tolist()
    slices = [whole.sequences(step, a, b - a).tokens for a, b in pairwise(starts)]
    assert torch.equal(torch.cat(slices), whole.sequences(step, 0, size).tokens[: starts[-1]])


def test_a_batch_depends_on_seed_and_step_alone(counting):
    one_by_one = [make(counting).sequences(step, 0, 4).tokens for step in range(30)]
    batches = make(counting)
    for step in [29, 0, 15, 3, 4, 28, 3]:
        assert torch.equal(batches.sequences(step, 0, 4).tokens, one_by_one[step])
    assert not torch.equal(rows(make(counting, seed=2), range(3)), rows(make(counting, seed=1), range(3)))


def test_no_global_generator_is_touched(counting):
    state = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    batches = make(counting)
    list(prefetch(lambda step: batches.sequences(step, 0, 4), 0, 10))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.random.get_state()[1].tolist() == state[1]
    assert random.getstate() == state[2]


def test_no_rows_are_an_empty_batch(counting):
    batch = make(counting).sequences(0, 4, 0, with_first_key=True)
    assert batch.tokens.shape == batch.targets.shape == batch.first_key.shape == (0, 7)


def test_rows_beyond_the_batch_are_a_bug(counting):
    with pytest.raises(AssertionError):
        make(counting).sequences(0, 2, 3)


@pytest.mark.parametrize(("count", "world_size"), [(1, 1), (4, 1), (4, 2), (4, 4)])
def test_micro_batches_of_all_processes_are_the_global_batch(open_tokens, count, world_size):
    batches = make(open_tokens([BOS, *range(2, 9)] * 12), per_step=8)
    of_ranks = [
        batches.micro_batches(3, count, rank=rank, world_size=world_size, with_first_key=True)
        for rank in range(world_size)
    ]
    assert [len(mine) for mine in of_ranks] == [count // world_size] * world_size
    whole = batches.sequences(3, 0, 8, with_first_key=True)
    for name in Batch._fields:
        parts = [getattr(batch, name) for mine in of_ranks for batch in mine]
        assert {len(part) for part in parts} == {8 // count}
        assert torch.equal(torch.cat(parts), getattr(whole, name))
    assert batches.micro_batches(3, count)[0].first_key is None


def test_steps_per_epoch(counting):
    assert make(counting).steps_per_epoch == 3.5
    assert make(counting).tokens_per_step == 28


@given(st.lists(st.sampled_from([BOS, 5, 6]), min_size=29, max_size=60))
def test_first_key_is_where_the_document_of_each_token_begins(open_tokens, ids):
    batch = make(open_tokens(ids)).sequences(0, 0, 4, with_first_key=True)
    assert batch.first_key.dtype == torch.int32
    for tokens, first_key in zip(batch.tokens.tolist(), batch.first_key.tolist(), strict=True):
        for i, first in enumerate(first_key):
            assert first == max((j for j in range(i + 1) if tokens[j] == BOS), default=0)


def test_first_key_is_only_made_on_request(counting):
    assert make(counting).sequences(0, 0, 4).first_key is None


# Prefetching


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_items_come_in_order_and_the_thread_ends():
    loaded = []
    assert list(prefetch(lambda i: loaded.append(i) or i * i, 3, 8)) == [9, 16, 25, 36, 49]
    assert loaded == [3, 4, 5, 6, 7]
    assert list(prefetch(lambda i: 1 / 0, 3, 3)) == []
    assert not prefetch_threads()


def test_the_next_item_is_loaded_while_this_one_is_used():
    loading = {i: threading.Event() for i in range(4)}

    def load(i):
        loading[i].set()
        return i

    items = prefetch(load, 0, 4)
    assert next(items) == 0
    assert loading[1].wait(10)
    assert not loading[2].is_set()
    items.close()


def test_an_error_arrives_where_its_item_would_have():
    def load(i):
        if i == 2:
            raise UserError("bad token")
        return i

    items = prefetch(load, 0, 5)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(UserError, match="bad token"):
        next(items)
    assert not prefetch_threads()


def test_closing_early_stops_the_loading():
    loaded = []
    items = prefetch(loaded.append, 0, 1000)
    next(items)
    items.close()
    assert len(loaded) <= 2
    assert not prefetch_threads()


def test_every_tensor_of_an_item_moves_and_the_rest_stays():
    def load(i):
        return [Batch(torch.ones(2), torch.ones(3), None), (torch.ones(i), {"step": i})]

    ((batch, (tensor, rest)),) = prefetch(load, 5, 6, device="meta")
    assert isinstance(batch, Batch)
    assert (batch.tokens.device.type, batch.targets.device.type, tensor.device.type) == ("meta",) * 3
    assert (batch.first_key, tensor.shape, rest) == (None, (5,), {"step": 5})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_batches_arrive_on_the_gpu_unchanged(counting):
    batches = make(counting)
    for step, batch in enumerate(prefetch(lambda s: batches.sequences(s, 0, 4), 0, 20, device="cuda")):
        assert batch.tokens.is_cuda
        assert torch.equal(batch.tokens.cpu(), batches.sequences(step, 0, 4).tokens)
