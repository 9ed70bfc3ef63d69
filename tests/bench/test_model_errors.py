"""Errors of whole models: what is held against what, and that it is exact where it must be."""

from dataclasses import replace

import pytest
import torch

import kernels
from bench.parity.model_errors import Models
from training.config import TrainConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = TrainConfig(
    vocab_size=300, max_seq_len=8, dim=32, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=48, batch_size=2, seed=5
)
NORMS = ["input_layernorm", "post_attention_layernorm"]
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(dtype=torch.float32, select=kernels.select, **changes):
    return Models(replace(TINY, **changes), DEVICE, dtype, select)


@pytest.fixture(scope="module")
def float32_models():
    return make()


def test_there_is_a_row_for_the_loss_and_one_for_each_gradient(float32_models):
    rows = float32_models.errors("none")
    assert sorted(row["tensor"] for row in rows if row["layer"] == 1) == sorted(NORMS + MATRICES)
    ends = {(row["layer"], row["tensor"], row["pass"]) for row in rows if row["layer"] in ("in", "out")}
    assert ends == {("in", "embed_tokens", "gradient"), ("out", "norm", "gradient"), ("out", "loss", "output")}
    assert all(row["excess"] is None for row in rows)


def test_float64_gradients_are_the_slope_of_the_loss():
    models, name = make(), "layers.0.wo.weight"
    weight = models.model.get_parameter(name)
    direction = torch.randn_like(weight)
    slope = (models.exact["model.layers.0.self_attn.o_proj.weight"] * direction).sum().item()
    losses = []
    for step in (2**-12, -(2**-11)):
        weight.data += step * direction
        losses.append(models.run_exact()["loss"])
    assert losses[0].dtype == torch.float64
    assert (losses[0] - losses[1]).item() / 2**-11 == pytest.approx(slope, rel=1e-5)


def test_no_float64_gradient_is_rounded_to_float32_on_its_way(float32_models):
    assert all(not torch.equal(x, x.float().double()) for x in float32_models.exact.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_errors_of_plain_are_of_the_size_of_its_dtype(dtype):
    gradients = [row["plain"] for row in make(dtype).errors("none") if row["pass"] == "gradient"]
    eps = torch.finfo(dtype).eps
    assert all(eps / 4 < error < 20 * eps for error in gradients)


def test_weights_are_numbers_of_the_compute_dtype():
    model = make(torch.float16).model
    assert all(torch.equal(p, p.half().float()) for p in model.parameters())
    linear = model.layers[1].w_gate_up
    assert torch.equal(linear.compute_weight, linear.weight.half())
    assert not torch.equal(model.final_norm, torch.ones(32, device=DEVICE))


def test_weights_and_tokens_are_those_of_the_seed():
    one, again, other = make(), make(), make(seed=6)
    assert torch.equal(one.tokens, again.tokens)
    assert torch.equal(one.plain["loss"], again.plain["loss"])
    assert not torch.equal(one.tokens, other.tokens)
    assert not torch.equal(one.model.embedding.weight, other.model.embedding.weight)


def test_a_loss_scale_that_overflows_is_lowered():
    models = make(torch.float16, batch_size=1, max_seq_len=1)  # one token bears the whole loss
    assert 1 < models.scale < 65536
    assert all(x.isfinite().all() for x in models.plain.values())
    alone = ("q_proj", "k_proj")  # with one key there is nothing to choose: their gradients are zero
    assert all(row["plain"] < 0.01 for row in models.errors("none") if row["tensor"] not in alone)


def test_the_calls_are_those_of_the_plain_model_at_its_scale(float32_models):
    calls = float32_models.calls()
    assert len(calls) == 1 + 2 * len(["attention_norm", "rope", "attention", "ffn_norm", "swiglu", "mlp"]) + 2
    (upstream,) = calls[-1].upstream
    assert upstream.item() == pytest.approx(1 / 16)  # of a sum over the 2 x 8 targets
    assert all(p.grad is None for p in float32_models.model.parameters())


def test_ops_come_from_the_given_selection():
    asked = []

    def select(spec, n_layers):
        asked.append((spec, n_layers))
        return kernels.select("none", n_layers)

    rows = make(select=select).errors("swiglu@1")
    assert asked == [("none", 2), ("swiglu@1", 2)]
    assert all(row["ratio"] == 1 for row in rows)
