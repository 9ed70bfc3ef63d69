"""Decoding against the cache gives what the full forward pass gives, and a prompt in a batch what it gets alone."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels.launch import HAVE_TRITON, INTERPRETED
from model import Llama, LlamaConfig
from model.generation import (
    Decoder,
    KVCache,
    OfOneToken,
    OfPrompts,
    copies_before,
    decode,
    generate,
    lay_out_for_decoding,
    prefill,
    uniform_numbers,
)
from model.sampling import Sampling

TINY = LlamaConfig(vocab_size=300, max_seq_len=24, dim=48, n_layers=2, n_heads=4, n_kv_heads=2, dropout=0.3)
GREEDY = Sampling(temperature=0)
PROMPTS = [[1, 7, 9], [1], [1, 50, 60, 70, 80, 90, 100], [1, 7, 9], [1, 2]]
"""Of unequal lengths, and one of them twice."""

needs_kernels = pytest.mark.skipif(
    not (HAVE_TRITON and (INTERPRETED or torch.cuda.is_available())), reason="needs a GPU or the interpreter"
)


def model_of(config, ops="none", dtype=torch.float32):
    torch.manual_seed(0)
    model = Llama(config, kernels.select(ops, config.n_layers), dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    model.refresh_compute_weights()
    return model


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request):
    return model_of(LlamaConfig(**vars(TINY) | {"tie_embeddings": request.param}))


# ------------------------------------------------------------------------------------------------ cached and uncached


@torch.no_grad()
def test_cached_decoding_gives_the_logits_of_the_full_forward_pass(model):
    tokens = torch.randint(300, (2, 24))
    wanted = model(tokens)
    cache = KVCache(model, 2, 24)
    lengths = torch.tensor([5, 3])
    logits = [prefill(model, tokens[:, :5], lengths, cache, cache.keeping(model.ops, OfPrompts))]
    ops = cache.keeping(model.ops, OfOneToken)
    for i in range(19):
        logits.append(decode(model, tokens[torch.arange(2), lengths + i], cache, ops))
    for b, n in enumerate(lengths):
        torch.testing.assert_close(torch.stack(logits, 1)[b], wanted[b, n - 1 : n + 19], atol=1e-4, rtol=1e-4)


def test_greedy_tokens_are_those_of_the_whole_sequence_again_for_each(model):
    for prompt, new in zip(PROMPTS, generate(model, PROMPTS, 10, GREEDY), strict=True):
        for i, token in enumerate(new):
            assert model(torch.tensor([prompt + new[:i]]))[0, -1].argmax() == token


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_kernels_give_the_tokens_of_the_torch_twins(dtype):
    model = model_of(LlamaConfig(**vars(TINY) | {"dim": 64}), "all", dtype).to(
        "cuda" if torch.cuda.is_available() else "cpu"
    )
    prompts = [[1, 7, 9], [1]]
    plain = generate(model, prompts, 5, GREEDY)
    assert generate(model, prompts, 5, GREEDY, ops=model.ops) == plain


@torch.no_grad()
def test_what_padding_makes_of_itself_reaches_no_text(model):
    """Float16 overflows in it at worst: what is no number must not be multiplied by a weight of zero."""
    with torch.no_grad():
        model.embedding.weight[0] = torch.inf  # the token that pads
    assert generate(model, [[1, 2, 3, 4, 5], [1, 7]], 8, GREEDY)[1] == generate(model, [[1, 7]], 8, GREEDY)[0]


def test_matrices_laid_out_for_decoding_hold_what_they_held_and_give_the_same_tokens(model):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    tokens = generate(model, PROMPTS, 10, GREEDY)
    lay_out_for_decoding(model)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.layers[0].w_gate_up.weight.stride(0) == 1
    assert model.layers[0].w_down.weight.stride(1) == 1
    assert generate(model, PROMPTS, 10, GREEDY) == tokens


# ------------------------------------------------------------------------------------------------- batches and draws


@pytest.mark.parametrize(
    "sampling",
    [GREEDY, Sampling(), Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2)],
    ids=["greedy", "all", "filtered"],
)
def test_a_batch_gives_each_prompt_the_tokens_it_gets_alone(model, sampling):
    texts = generate(model, PROMPTS, 12, sampling, seed=5)
    for i, prompt in enumerate(PROMPTS):
        if i != 3:  # the second of two equal ones
            assert generate(model, [prompt], 12, sampling, seed=5) == [texts[i]]
    assert (texts[0] == texts[3]) == (sampling is GREEDY)


def test_numbers_depend_on_the_seed_and_on_equal_prompts_before_alone():
    assert copies_before(PROMPTS) == [0, 0, 0, 1, 0]
    numbers = uniform_numbers(copies_before(PROMPTS), 40, seed=3)
    assert numbers.shape == (5, 40)
    assert torch.equal(numbers[0], numbers[1])
    assert not torch.equal(numbers[0], numbers[3])
    assert torch.equal(uniform_numbers([0], 9, seed=3)[0], numbers[0, :9])
    assert not torch.equal(uniform_numbers([0], 9, seed=4)[0], numbers[0, :9])
    assert numbers.min() >= 0
    assert numbers.max() < 1


def test_a_seed_repeats_and_nothing_of_a_training_run_changes(model):
    model.train()
    state = torch.get_rng_state()
    once = generate(model, [[1, 2, 3]], 12, seed=5)
    assert generate(model, [[1, 2, 3]], 12, seed=5) == once
    assert generate(model, [[1, 2, 3]], 12, seed=6) != once
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_a_penalty_counts_the_prompt_and_what_came_since(model):
    (plain,) = generate(model, [[1, 7]], 20, GREEDY)
    (spread,) = generate(model, [[1, 7]], 20, Sampling(temperature=0, repetition_penalty=1e6))
    assert len(set(spread) | {1, 7}) == 22
    assert len(set(plain)) < 20


# --------------------------------------------------------------------------------------------------- where a text ends


def test_generation_ends_at_the_length_the_limit_or_the_stop_token(model):
    assert [len(new) for new in generate(model, PROMPTS, 5)] == [5] * 5
    assert [len(new) for new in generate(model, PROMPTS, 1000)] == [24 - len(prompt) for prompt in PROMPTS]
    assert generate(model, PROMPTS, 0) == [[]] * 5
    (first, second, *_) = generate(model, [[1]], 3, GREEDY)[0]
    assert generate(model, [[1]], 3, GREEDY, stop_token=first) == [[]]
    if second != first:
        assert generate(model, [[1]], 3, GREEDY, stop_token=second) == [[first]]


def test_tokens_are_told_as_they_come_and_may_end_a_text(model):
    told, ended = [], []
    whole = generate(model, PROMPTS, 6, seed=2)
    texts = generate(
        model,
        PROMPTS,
        6,
        seed=2,
        on_token=lambda i, token: told.append((i, token)) or (i == 2 and len([j for j, _ in told if j == 2]) == 4),
        on_end=ended.append,
    )
    assert [texts[2], *texts[:2], *texts[3:]] == [whole[2][:4], *whole[:2], *whole[3:]]
    assert [[token for j, token in told if j == i] for i in range(5)] == texts
    assert ended == [2, 0, 1, 3, 4]
    assert told[:5] == [(i, new[0]) for i, new in enumerate(texts)]


def test_a_text_that_has_ended_leaves_its_neighbours_alone(model):
    """It goes on in the batch until the last has ended, past its room in the cache if need be."""
    texts = generate(model, [[1] * 23, [1, 2]], 1000, GREEDY)
    assert [len(new) for new in texts] == [1, 22]
    assert texts[1] == generate(model, [[1, 2]], 1000, GREEDY)[0]


@pytest.mark.parametrize(
    ("prompts", "sampling", "message"),
    [
        ([], {}, "there are no prompts"),
        ([[1], []], {}, "prompt 1 has 0 tokens"),
        ([[1] * 24], {}, "prompt 0 has 24 tokens; it must have from 1 to 23"),
        ([[1]], {"temperature": -1}, "temperature is -1"),
        ([[1]], {"top_p": 0}, "top_p is 0"),
    ],
)
def test_bad_arguments_are_refused(model, prompts, sampling, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, 3, Sampling(**sampling))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_generates(dtype):
    model = model_of(TINY, dtype=dtype)
    assert [len(new) for new in generate(model, PROMPTS, 5)] == [5] * 5


# --------------------------------------------------------------------------- the step: what a CUDA graph of it asks for


class _Watched(TorchDispatchMode):
    """Refuses what waits for the device or has a size that the device decides."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"), name
        return func(*args, **kwargs or {})


def tensors_of(decoder):
    cache = decoder._cache
    return [decoder.tokens, decoder.uniform, decoder._seen, cache.n_keys, cache.slots, *cache.keys, *cache.values]


@torch.no_grad()
def test_a_step_waits_for_nothing_and_leaves_everything_where_it_is(model):
    sampling = Sampling(top_k=9, top_p=0.9, min_p=0.1, repetition_penalty=1.1)
    decoder = Decoder(model, PROMPTS, 24, sampling)
    decoder.start()
    before = [x.data_ptr() for x in tensors_of(decoder)]
    with _Watched():
        decoder.step()
        decoder.step()
    assert [x.data_ptr() for x in tensors_of(decoder)] == before
    assert decoder._cache.n_keys.tolist() == [len(prompt) + 2 for prompt in PROMPTS]


def test_what_is_wrapped_is_called_for_each_token_but_the_first(model):
    calls = []

    def wrap(step):
        return lambda: calls.append(1) or step()

    assert generate(model, PROMPTS, 7, seed=3, wrap=wrap) == generate(model, PROMPTS, 7, seed=3)
    assert len(calls) == 6


def test_a_step_is_one_graph(model):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def wrap(step):
        return torch.compile(step, backend=backend, fullgraph=True, dynamic=False)

    torch._dynamo.reset()
    compiled = generate(model, PROMPTS, 9, seed=3, wrap=wrap)
    assert compiled == generate(model, PROMPTS, 9, seed=3)
    assert len(graphs) == 1


@pytest.mark.slow
def test_a_compiled_step_gives_the_tokens_of_the_plain_one(model):
    torch._dynamo.reset()
    compiled = generate(model, PROMPTS, 9, GREEDY, wrap=lambda step: torch.compile(step, fullgraph=True, dynamic=False))
    assert compiled == generate(model, PROMPTS, 9, GREEDY)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_gives_the_tokens_of_the_plain_one(model, capsys):
    from training.step.capture import Captured

    model = model.cuda()
    captured = generate(model, PROMPTS, 12, seed=3, wrap=lambda step: Captured(step, torch.cuda.Stream()))
    assert captured == generate(model, PROMPTS, 12, seed=3)
    assert capsys.readouterr().err == ""  # or it says why it could not be recorded
