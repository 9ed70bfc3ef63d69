"""Small models trained with Triton kernels follow the run of the torch twins, whatever the layers are given."""

from dataclasses import replace

import pytest
import torch

import kernels
from tests.support import kernel_testing as kt
from tests.support.step_testing import make_trainer, micro_batches, train

SHAPE = {"dim": 32, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 48, "max_seq_len": 16}
BATCH = {"count": 1, "rows": 4, "length": 16}

# Float32 kernels differ from the twins by the order of their sums; 50 steps of learning amplify it to a few 1e-7 of the loss.
# Float16 rounds each activation, and two orders of the same arithmetic part by about its precision. Measured in the interpreter:
# 2e-7 and 3e-4; a SwiGLU wrong by a thousandth in one layer shows as 6e-5.
BOUND = {torch.float32: 2e-6, torch.float16: 5e-4}
# How far apart the parameters end, over how far they moved. Measured, as a root mean square: 3e-6 and 9e-3.
MOVED = {torch.float32: 2e-5, torch.float16: 3e-2}


def run(spec, dtype=torch.float32, steps=50, change=None, **options):
    """Losses of a run, and the parameters at its end. change: ops that replace those of layer 1."""
    trainer = make_trainer(dtype, spec, device=kt.DEVICE, **SHAPE | options)
    model = trainer.model
    if change:
        model.ops = (model.ops[0], replace(model.ops[1], **change), model.ops[2])
    with torch.no_grad():
        for p in trainer.model.parameters():
            if p.ndim == 2:  # at the start the branches hardly count: nothing in them would show in the loss
                p.mul_(8)
    model.refresh_compute_weights()
    start = trainer.flat.values.clone()
    losses = train(trainer, steps, lr=3e-3, **BATCH)
    return losses, trainer.flat.values - start


def curve(spec, *arguments, **options):
    """The losses alone."""
    return run(spec, *arguments, **options)[0]


@pytest.fixture(scope="module")
def torch_curve():
    return curve("none")


def furthest(losses, wanted):
    return max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True))


@pytest.mark.parametrize(("spec", "steps"), [("all,-rope@0,-mlp@1", 10), ("swiglu@1,rms_norm@out", 15)], ids=str)
def test_float32_training_tracks_the_torch_twins(torch_curve, spec, steps):
    losses = curve(spec, steps=steps)
    assert furthest(losses, torch_curve[:steps]) < BOUND[torch.float32]


@pytest.mark.parametrize("steps", [10, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_training_with_every_kernel_and_their_optimizer_tracks_torch(dtype, steps):
    """In losses, and in how far the parameters moved, as a root mean square: Adam makes whole steps of a gradient that is noise."""
    losses, moved = run("all", dtype, steps, kernels="adamw")
    wanted, wanted_moved = run("none", dtype, steps)
    assert furthest(losses, wanted) < BOUND[dtype]
    assert (moved - wanted_moved).norm() / wanted_moved.norm() < MOVED[dtype]


@pytest.mark.parametrize(
    "wrong",
    [
        {"swiglu": lambda gate_up: kernels.TORCH.swiglu(gate_up) * 1.001},
        {"mlp": lambda *given, **by_name: kernels.TORCH.mlp(*given, **by_name) * 1.001},
        {"rope": lambda qkv, cos, sin, *heads: kernels.TORCH.rope(qkv, cos, sin * 1.001, *heads)},
        {"add_rms_norm": lambda x, r, weight, eps: kernels.TORCH.add_rms_norm(x, r, weight, 10 * eps)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_the_bound_would_show_a_wrong_kernel_in_one_layer(wrong, torch_curve):
    assert furthest(curve("none", steps=20, change=wrong), torch_curve[:20]) > BOUND[torch.float32]


@pytest.mark.parametrize("packed", [False, True], ids=["causal", "packed documents"])
def test_the_whole_model_with_all_kernels_compiles_as_one_graph(packed):
    fused, plain = (make_trainer(spec=spec, device=kt.DEVICE, **SHAPE) for spec in ("all", "none"))
    ((tokens, targets, _),) = micro_batches(0, **BATCH)
    tokens, targets = tokens.to(kt.DEVICE), targets.to(kt.DEVICE)
    first_key = None
    if packed:
        first_key = torch.zeros(4, 16, dtype=torch.int32, device=kt.DEVICE)
        first_key[:, 6:] = 6
    loss = torch.compile(fused.model, fullgraph=True, backend="aot_eager")(tokens, targets, first_key)
    wanted = plain.model(tokens, targets, first_key)
    torch.testing.assert_close(loss, wanted, atol=0, rtol=1e-5)
    loss.backward()
    wanted.backward()
    for (name, p), q in zip(fused.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_all_kernels_train_under_inductor():
    assert furthest(curve("all", steps=10, compile=True), curve("none", steps=10)) < 1e-4
