"""What is done to the logits, against a direct computation in NumPy, and draws that follow from it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.sampling import UNITS, Sampling, draw, masses


def directly(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities of one row, as the words of `Sampling` have them."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    if 0 < top_k < len(p):
        p = np.where(p >= np.sort(p)[-top_k], p, 0)
        p /= p.sum()
    if top_p < 1:
        mass = 0.0
        for likeliest in np.sort(p)[::-1]:
            mass += likeliest
            if mass >= top_p:
                break
        p = np.where(p >= likeliest, p, 0)
        p /= p.sum()
    p = np.where(p >= min_p * p.max(), p, 0)
    return p / p.sum()


def probabilities(logits, **options):
    mass = masses(logits, Sampling(**options)).double()
    return mass / mass.sum(-1, keepdim=True)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 3, 17, 100]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-9]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_the_probabilities_are_those_of_a_direct_computation(seed, **options):
    logits = torch.randn(3, 17, generator=torch.Generator().manual_seed(seed)) * 3
    wanted = np.stack([directly(row, **options) for row in logits.double().numpy()])
    np.testing.assert_allclose(probabilities(logits, **options).numpy(), wanted, atol=1e-10)


def test_tokens_as_likely_as_the_last_that_is_kept_are_kept():
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    for options in ({"top_k": 2}, {"top_p": 0.6}):
        assert (probabilities(logits, **options) > 0).tolist() == [[True, True, True, False]]


def draws(logits, n=4000, **options):
    """Tokens by n numbers that lie evenly in [0, 1)."""
    return draw(logits.expand(n, -1), torch.arange(n, dtype=torch.float64) / n, Sampling(**options))


def test_evenly_spaced_numbers_draw_each_token_as_often_as_it_is_likely():
    p = torch.tensor([0.5, 0.3, 0.0, 0.15, 0.05], dtype=torch.float64)
    share = draws(p.log()).bincount(minlength=5) / 4000
    torch.testing.assert_close(share.double(), p, atol=1 / 4000, rtol=0)
    cold = draws(p.log(), temperature=0.5).bincount(minlength=5) / 4000
    torch.testing.assert_close(cold.double(), p**2 / (p**2).sum(), atol=1 / 4000, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_the_ends_of_the_interval_draw_tokens_that_are_kept(uniform):
    logits = torch.full((1, 9), -torch.inf)
    logits[0, 4] = 0
    assert draw(logits, torch.tensor([uniform], dtype=torch.float64), Sampling()).tolist() == [4]
    kept = draw(torch.arange(9.0)[None], torch.tensor([uniform], dtype=torch.float64), Sampling(top_k=2))
    assert kept.item() in (7, 8)


def test_what_a_sequence_draws_does_not_depend_on_its_neighbours():
    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(temperature=0.9, top_k=50, top_p=0.9, min_p=0.01)
    together = draw(logits, uniform, sampling)
    assert torch.equal(together, torch.cat([draw(logits[i : i + 1], uniform[i : i + 1], sampling) for i in range(8)]))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300, 5e-324])
def test_a_temperature_near_zero_takes_the_likeliest(temperature):
    logits = torch.tensor([[1.0, 3e38, 2.0, -3e38], [0.0, 1e-30, 0.0, -1.0]])
    uniform = torch.tensor([0.999, 0.999], dtype=torch.float64)
    assert draw(logits[:1], uniform[:1], Sampling(temperature=temperature)).tolist() == [1]
    if temperature < 1e-32:
        assert draw(logits, uniform, Sampling(temperature=temperature)).tolist() == [1, 1]


def test_temperature_zero_takes_the_likeliest_whatever_the_number():
    logits = torch.randn(20, 9, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(20, dtype=torch.float64)
    assert torch.equal(draw(logits, uniform, Sampling(temperature=0)), logits.argmax(-1))


def test_logits_that_are_no_numbers_draw_a_token_of_the_vocabulary():
    for bad in (torch.nan, torch.inf):
        token = draw(torch.full((2, 9), bad), torch.tensor([0.0, 0.9], dtype=torch.float64), Sampling())
        assert ((token >= 0) & (token < 9)).all()


def test_a_penalty_makes_tokens_that_were_seen_less_likely_and_no_other():
    logits = torch.tensor([[2.0, -2.0, 1.9, -1.9]]).repeat(2, 1)
    seen = torch.tensor([[True, True, False, False], [False] * 4])
    uniform = torch.zeros(2, dtype=torch.float64)
    greedy = Sampling(temperature=0, repetition_penalty=1.5)
    assert draw(logits, uniform, greedy, seen).tolist() == [2, 0]
    numbers = torch.arange(4000, dtype=torch.float64) / 4000
    shares = draw(logits[:1].expand(4000, -1), numbers, Sampling(repetition_penalty=1.5), seen[:1].expand(4000, -1))
    wanted = directly(np.array([2 / 1.5, -3.0, 1.9, -1.9]))
    np.testing.assert_allclose(shares.bincount(minlength=4).numpy() / 4000, wanted, atol=1 / 4000)


def test_the_likeliest_token_has_the_whole_unit():
    assert masses(torch.tensor([[5.0, 4.0]]), Sampling()).tolist() == [[UNITS, round(UNITS * np.exp(-1.0))]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it must be at least 0, and finite"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be more than 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": -0.1}, "min_p is -0.1; it must be at least 0 and at most 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be more than 0, and finite"),
    ],
)
def test_what_no_sampling_can_mean_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options).check()
