"""Activation checkpointing changes what is kept and what is computed, by as much as is said, and no gradient."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels.launch import HAVE_TRITON
from model import Llama
from model.activations import kept_bytes, recomputed_flops_per_token
from model.config import RECOMPUTE
from tests.support import kernel_testing as kt
from tests.support.live_bytes import LiveBytes
from tests.support.step_testing import TINY, make_trainer, micro_batches
from training.config import TrainConfig

SMALL = {"vocab_size": 256, "max_seq_len": 16, "dim": 32, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 48}
triton = pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed here")


def small_batch():
    """A micro-batch of one row of 16 tokens."""
    return [(tokens % 256, targets % 256, None) for tokens, targets, _ in micro_batches(0, count=1, rows=1, length=16)]


def gradient(recompute, dtype, spec="none", **options):
    """The flat gradient and the loss of one step."""
    trainer = make_trainer(dtype, spec, recompute=recompute, grad_clip=0.0, **SMALL | options)
    torch.manual_seed(5)
    loss = trainer.step(small_batch(), 16, 0.0).loss
    return trainer.flat.gradients.clone(), loss


@pytest.mark.parametrize(
    ("dtype", "spec"),
    [
        (torch.float32, "none"),
        (torch.bfloat16, "none"),
        (torch.float16, "none"),
        pytest.param(torch.float32, "all", marks=triton),
        pytest.param(torch.float16, "all", marks=triton),
    ],
    ids=str,
)
def test_gradients_are_equal_to_the_bit(dtype, spec):
    """Dropout included; in half precision the products add to the step's sums, and would do so twice if they ran twice."""
    none, *others = (gradient(recompute, dtype, spec, dropout=0.1) for recompute in RECOMPUTE)
    for other in others:
        for mine, wanted in zip(other, none, strict=True):
            assert torch.equal(mine, wanted)
            assert mine.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "spec", "bound"),
    [
        (torch.float32, "none", 0),
        (torch.bfloat16, "none", 1e-2),  # Inductor rounds where its kernels end, and they end elsewhere
        pytest.param(torch.float16, "all", 0, marks=triton),
    ],
    ids=str,
)
def test_a_compiled_pass_recomputes_too(dtype, spec, bound):
    torch.use_deterministic_algorithms(True)
    try:
        found = {}
        for recompute in RECOMPUTE:
            torch._dynamo.reset()
            found[recompute], _ = gradient(recompute, dtype, spec, compile=True)
    finally:
        torch.use_deterministic_algorithms(False)
    for recompute in ("selective", "full"):
        assert (found[recompute] - found["none"]).norm() <= bound * found["none"].norm(), recompute


def kept_by(model, tokens) -> int:
    """Bytes that are alive after a forward pass through the layers."""
    with LiveBytes() as live:
        hidden = model.hidden(tokens)
        now = live.now
    del hidden
    return now


@triton
@pytest.mark.parametrize("spec", ["all", "all,-mlp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_is_kept_is_what_the_closed_form_says(dtype, spec):
    ((tokens, _, _),) = small_batch()
    for recompute in RECOMPUTE:
        kept, said = [], []
        for n_layers in (1, 2):  # their difference: the ends of the model keep the same in both
            config = TrainConfig(**SMALL | {"n_layers": n_layers}).shape()
            with kt.DEVICE:
                model = Llama(config, kernels.select(spec, n_layers), dtype, recompute=recompute)
            kept.append(kept_by(model, tokens))
            said.append(kept_bytes(config, tokens.numel(), recompute, dtype.itemsize, one_kernel=spec == "all"))
        assert kept[1] - kept[0] == said[1] - said[0], recompute


def test_what_is_computed_again_is_what_the_closed_form_says():
    config = dataclasses.replace(TrainConfig(**TINY).shape(), n_layers=3)
    tokens, targets, _ = micro_batches(0)[0]
    products = {}
    for recompute in RECOMPUTE:
        model = Llama(config, kernels.select("none", 3), recompute=recompute)
        with FlopCounterMode(display=False) as counter:
            model(tokens, targets).backward()
        counted = counter.get_flop_counts()["Global"].items()
        products[recompute] = sum(n for op, n in counted if str(op) in ("aten.mm", "aten.addmm"))
    attention = {"selective": 0, "full": 3 * 4 * config.dim * config.max_seq_len}  # not one of these products
    for recompute, of_attention in attention.items():
        said = recomputed_flops_per_token(config, recompute) - of_attention
        assert products[recompute] - products["none"] == said * tokens.numel(), recompute


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="recompute is 'some', wanted one of none, selective, full"):
        Llama(TrainConfig(**TINY).shape(), kernels.select("none", 2), recompute="some")
