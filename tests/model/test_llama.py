"""The model against published counts, an independent float64 forward pass, and its own contracts."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import kernels
from model import Llama, LlamaConfig
from model.config import PRESETS, preset
from model.flops import parameters
from model.llama import INIT_STD
from model.rope import rope_frequencies, rope_tables

TINY = LlamaConfig(vocab_size=300, max_seq_len=32, dim=48, n_layers=3, n_heads=4, n_kv_heads=2)
PUBLISHED = {
    "reference": 8_483_616,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
}


def build(config=TINY, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Llama(config, kernels.select("none", config.n_layers), dtype)


def batch(config=TINY, rows=2, length=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (rows, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_published_number_of_parameters(name):
    config = preset(name)
    with torch.device("meta"):
        model = Llama(config, kernels.select("none", config.n_layers))
    counted = sum(p.numel() for p in model.parameters())
    assert counted == parameters(config)
    assert counted == PUBLISHED.get(name, counted)


def plain_forward(model, tokens, first_key=None):
    """Llama 3 written out by its equations in float64, sharing no code with the model."""
    c = model.config
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    b, t = tokens.shape

    def norm(x, weight):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + c.norm_eps) * weight

    position = torch.arange(t).double()
    frequency = torch.tensor([c.rope_theta ** (-2 * i / c.head_dim) for i in range(c.head_dim // 2)]).double()
    turn = torch.polar(torch.ones(t, c.head_dim // 2).double(), torch.outer(position, frequency))

    def rotate(x):
        first, second = x.chunk(2, dim=-1)
        y = torch.complex(first, second) * turn[None, :, None]
        return torch.cat([y.real, y.imag], dim=-1)

    x = w["embedding.weight"][tokens]
    for i in range(c.n_layers):
        p = f"layers.{i}."
        h = norm(x, w[p + "attention_norm"]) @ w[p + "wqkv.weight"].T
        kv = c.n_kv_heads * c.head_dim
        q, k, v = h.split([c.dim, kv, kv], dim=-1)
        q, k, v = (y.reshape(b, t, -1, c.head_dim) for y in (q, k, v))
        q, k = rotate(q), rotate(k)
        out = torch.zeros_like(q)
        for row in range(b):
            for head in range(c.n_heads):
                key, value = (y[row, :, head * c.n_kv_heads // c.n_heads] for y in (k, v))
                for i_q in range(t):
                    low = 0 if first_key is None else int(first_key[row, i_q])
                    score = key[low : i_q + 1] @ q[row, i_q, head] / math.sqrt(c.head_dim)
                    out[row, i_q, head] = torch.softmax(score, 0) @ value[low : i_q + 1]
        x = x + out.flatten(-2) @ w[p + "wo.weight"].T
        gate, up = (norm(x, w[p + "ffn_norm"]) @ w[p + "w_gate_up.weight"].T).chunk(2, dim=-1)
        x = x + (gate * torch.sigmoid(gate) * up) @ w[p + "w_down.weight"].T
    return norm(x, w["final_norm"]) @ w.get("head.weight", w["embedding.weight"]).T


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("packed", [False, True], ids=["causal", "packed documents"])
def test_forward_agrees_with_the_equations_in_float64(tie, packed):
    config = dataclasses.replace(TINY, tie_embeddings=tie)
    model = build(config)
    with torch.no_grad():  # larger weights than at the start, so that every part of the model matters
        for p in model.parameters():
            p.mul_(5) if p.ndim == 2 else p.add_(torch.rand_like(p))
    tokens, targets = batch(config, length=16)
    starts = torch.zeros(2, 16, dtype=torch.int32)
    starts[0, 5:], starts[0, 12:], starts[1, 1:] = 5, 12, 1
    first_key = starts if packed else None
    wanted = plain_forward(model, tokens, first_key)
    torch.testing.assert_close(model(tokens, first_key=first_key).double(), wanted, atol=2e-4, rtol=2e-4)
    loss = F.cross_entropy(wanted.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(tokens, targets, first_key).double(), loss, atol=1e-5, rtol=1e-5)
    total = model(tokens, targets, first_key, reduction="sum")
    torch.testing.assert_close(total.double(), loss * targets.numel(), atol=1e-3, rtol=1e-5)


def test_documents_do_not_see_each_other():
    model = build()
    tokens, _ = batch(length=20)
    first_key = torch.zeros(2, 20, dtype=torch.int32)
    first_key[:, 8:] = 8
    changed = tokens.clone()
    changed[:, :8] = (changed[:, :8] + 1) % TINY.vocab_size
    kept = model(tokens, first_key=first_key)[:, 8:]
    assert torch.equal(kept, model(changed, first_key=first_key)[:, 8:])
    assert not torch.equal(model(tokens)[:, 8:], model(changed)[:, 8:])


def test_later_tokens_change_nothing_before_them():
    model = build()
    tokens, _ = batch(length=20)
    changed = tokens.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % TINY.vocab_size
    torch.testing.assert_close(model(tokens)[:, :15], model(changed)[:, :15], atol=0, rtol=0)


def test_loss_at_the_start_is_near_that_of_guessing():
    tokens, targets = batch(rows=16)
    assert abs(build()(tokens, targets).item() - math.log(TINY.vocab_size)) < 0.05


def test_residual_projections_start_smaller():
    model = build(dataclasses.replace(TINY, dim=256, n_layers=8))
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, torch.ones_like(p)), name
            continue
        scale = 1 / math.sqrt(2 * 8) if name.endswith(("wo.weight", "w_down.weight")) else 1
        # four standard errors of the deviation of a normal sample
        assert abs(p.std().item() / (INIT_STD * scale) - 1) < 4 / math.sqrt(2 * p.numel()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_float32_parameters_and_gradients(dtype):
    model, exact = build(dtype=dtype), build()
    tokens, targets = batch()
    assert model.hidden(tokens).dtype == dtype
    losses = [m(tokens, targets) for m in (model, exact)]
    for loss in losses:
        loss.backward()
    assert losses[0].dtype == torch.float32
    assert abs(losses[0] - losses[1]) < 0.01
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert p.dtype == p.grad.dtype == torch.float32, name
        assert torch.equal(p, q), name
        assert (p.grad - q.grad).norm() < 0.05 * q.grad.norm(), name


def test_a_weight_gradient_is_not_rounded_to_half_precision():
    model = build(dtype=torch.bfloat16)
    tokens, targets = batch()
    model(tokens, targets).backward()
    for name, p in model.named_parameters():
        if p.ndim == 2 and name != "embedding.weight":
            assert not torch.equal(p.grad, p.grad.bfloat16().float()), name


def test_compute_weights_follow_the_parameters_only_when_refreshed():
    model = build(dtype=torch.bfloat16)
    layer = model.layers[0].wo
    storage = layer.compute_weight.data_ptr()
    assert torch.equal(layer.compute_weight, layer.weight.bfloat16())
    with torch.no_grad():
        layer.weight.add_(1)
    assert not torch.equal(layer.compute_weight, layer.weight.bfloat16())
    model.refresh_compute_weights()
    assert torch.equal(layer.compute_weight, layer.weight.bfloat16())
    assert layer.compute_weight.data_ptr() == storage
    assert not any("compute_weight" in name for name in model.state_dict())


def test_dropout_acts_in_training_only_and_adds_nothing_at_zero():
    tokens, targets = batch()
    model = build(dataclasses.replace(TINY, dropout=0.5))
    assert not torch.equal(model(tokens, targets), model(tokens, targets))
    model.eval()
    assert torch.equal(model(tokens, targets), build()(tokens, targets))
    state = torch.get_rng_state()
    build_free = build()
    torch.set_rng_state(state)
    build_free(tokens, targets).backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_ignored_targets_do_not_count():
    model = build()
    tokens, targets = batch()
    masked = targets.clone()
    masked[:, 10:] = -100
    torch.testing.assert_close(model(tokens, masked), model(tokens[:, :10], targets[:, :10]), atol=1e-6, rtol=1e-6)


def test_llama31_scaling_keeps_high_frequencies_and_divides_low_ones():
    plain = preset("llama3.1-8b")
    plain.rope_scaling_factor = 1.0
    scaled, free = rope_frequencies(preset("llama3.1-8b")), rope_frequencies(plain)
    wavelength = 2 * math.pi / free
    high, low = wavelength < 8192 / 4, wavelength > 8192
    assert torch.equal(scaled[high], free[high])
    torch.testing.assert_close(scaled[low], free[low] / 8, atol=0, rtol=1e-15)
    between = ~high & ~low
    assert between.any()
    assert ((scaled < free) & (scaled > free / 8))[between].all()
    # pair 32 of 64 lies between: 500000^(-1/2) turns 1.84 times in 8192 positions
    f = 500000**-0.5
    kept = (8192 * f / (2 * math.pi) - 1) / 3
    assert 0.28 < kept < 0.29
    assert scaled[32].item() == pytest.approx(kept * f + (1 - kept) * f / 8, rel=1e-12)


def test_rope_tables_are_float32_of_float64_angles():
    config = dataclasses.replace(TINY, max_seq_len=4096)
    cos, sin = rope_tables(config)
    assert cos.shape == sin.shape == (4096, config.head_dim // 2)
    angle = 4095 * rope_frequencies(config)[1].item()
    assert cos[4095, 1].item() == pytest.approx(math.cos(angle), abs=6e-8)
    assert sin[4095, 1].item() == pytest.approx(math.sin(angle), abs=6e-8)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"dim": 50}, "--dim 50 .*--n-heads 4"),
        ({"n_kv_heads": 3}, "--n-heads 4 .*--n-kv-heads 3"),
        ({"dim": 12}, "odd head dim, 3"),
        ({"vocab_size": 255}, "--vocab-size is 255.*256"),
        ({"n_layers": 0}, "--n-layers is 0"),
        ({"n_layers": 10_001}, "--n-layers is 10001; it must be at most 10000"),
        ({"dropout": 1.0}, "--dropout is 1.0"),
        ({"rope_scaling_factor": 0.5}, "--rope-scaling-factor"),
        ({"rope_low_freq_factor": 4.0}, "--rope-low-freq-factor"),
        ({"norm_eps": 0.0}, "--norm-eps"),
        ({"ffn_dim": -1}, "--ffn-dim"),
    ],
)
def test_a_shape_that_no_model_can_have_is_refused(change, names):
    with pytest.raises(ValueError, match=names):
        build(dataclasses.replace(TINY, **change))


def test_wrong_arguments_are_refused():
    model = build()
    tokens, targets = batch()
    with pytest.raises(ValueError, match=r"ops has 3 entries, wanted n_layers \+ 1 = 4"):
        Llama(TINY, kernels.select("none", 2))
    with pytest.raises(ValueError, match=r"compute_dtype is torch\.float64"):
        Llama(TINY, kernels.select("none", 3), torch.float64)
    with pytest.raises(ValueError, match="tokens has shape"):
        model(torch.zeros(1, 33, dtype=torch.int64))
    with pytest.raises(ValueError, match="targets has shape"):
        model(tokens, targets[:, 1:])
    with pytest.raises(ValueError, match="reduction is 'none'"):
        model(tokens, targets, reduction="none")


def test_unknown_preset_lists_those_there_are():
    with pytest.raises(ValueError, match="'7b'; allowed: reference, smoke"):
        preset("7b")


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_the_model_compiles_as_one_graph(dtype):
    tokens, targets = batch()
    model = build(dtype=dtype)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first_key = torch.zeros(2, 32, dtype=torch.int32)
    loss, wanted = compiled(tokens, targets, first_key), model(tokens, targets, first_key)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    wanted.backward()
    for (name, p), grad in zip(model.named_parameters(), grads, strict=True):
        torch.testing.assert_close(grad, p.grad, atol=1e-5, rtol=1e-3 if dtype == torch.float32 else 5e-2, msg=name)
