"""Decoding against the cache gives what the full forward pass gives; sampling draws from what it says."""

import pytest
import torch

import kernels
from model import Llama, LlamaConfig
from model.generation import KVCache, decode, generate, sample

TINY = LlamaConfig(vocab_size=300, max_seq_len=24, dim=48, n_layers=2, n_heads=4, n_kv_heads=2, dropout=0.3)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request):
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**vars(TINY) | {"tie_embeddings": request.param}), kernels.select("none", 2)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    return model


def test_cached_decoding_gives_the_logits_of_the_full_forward_pass(model):
    tokens = torch.randint(300, (2, 24))
    wanted = model(tokens)
    cache = KVCache(model, 2, 24)
    logits = [decode(model, tokens[:, :5], cache)]
    logits += [decode(model, tokens[:, i : i + 1], cache) for i in range(5, 24)]
    torch.testing.assert_close(torch.stack(logits, 1), wanted[:, 4:], atol=1e-4, rtol=1e-4)


def test_greedy_generation_takes_the_likeliest_token_each_time(model):
    prompt = [1, 7, 9]
    new = generate(model, prompt, 10, temperature=0)
    for i, token in enumerate(new):
        assert model(torch.tensor([prompt + new[:i]]))[0, -1].argmax() == token


def test_generation_ends_at_the_length_the_limit_or_the_stop_token(model):
    assert len(generate(model, [1], 5)) == 5
    assert len(generate(model, [1, 2], 1000)) == 22
    assert generate(model, [1], 0) == []
    first = generate(model, [1], 3, temperature=0)[0]
    assert generate(model, [1], 3, temperature=0, stop_token=first) == []


def test_a_seed_repeats_and_nothing_of_a_training_run_changes(model):
    model.train()
    state = torch.get_rng_state()
    once = generate(model, [1, 2, 3], 12, seed=5)
    assert generate(model, [1, 2, 3], 12, seed=5) == once
    assert generate(model, [1, 2, 3], 12, seed=6) != once
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def draws(logits, **options):
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    generator = torch.Generator().manual_seed(0)
    return sample(logits.expand(2000, -1), generator=generator, **options).flatten()


def test_sampling_follows_the_probabilities_and_the_temperature():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    share = draws(p.log()).bincount(minlength=4) / 2000
    torch.testing.assert_close(share, p, atol=0.05, rtol=0)
    cold = draws(p.log(), temperature=0.5).bincount(minlength=4) / 2000
    torch.testing.assert_close(cold, p**2 / (p**2).sum(), atol=0.05, rtol=0)


def test_top_k_and_top_p_keep_the_likeliest():
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    assert set(draws(logits, top_k=2).tolist()) == {1, 3}
    assert set(draws(logits, top_k=9).tolist()) == {0, 1, 2, 3}
    assert set(draws(logits, top_p=0.6).tolist()) == {1, 3}  # 0.5 alone does not reach 0.6
    assert set(draws(logits, top_p=0.4).tolist()) == {1}


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt has 0 tokens"),
        ([1] * 24, {}, "from 1 to 23"),
        ([1], {"temperature": -1}, "temperature -1"),
        ([1], {"top_k": -1}, "top_k -1"),
        ([1], {"top_p": 0}, "top_p 0"),
        ([1], {"top_p": 1.5}, r"top_p 1\.5"),
    ],
)
def test_bad_arguments_are_refused(model, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompt, 3, **options)


def test_half_precision_generates(model):
    half = Llama(model.config, kernels.select("none", 2), torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.refresh_compute_weights()
    assert len(generate(half, [1], 5)) == 5
