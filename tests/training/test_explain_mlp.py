"""Of the feed-forward that is one kernel: what it gives that is not finite is explained as of the ops that it stands for.

Tests of the explanation at large are in test_explain.py.
"""

import re
from functools import partial

import pytest
import torch

import kernels
import kernels.mlp.op
from tests.support import kernel_testing as kt
from tests.support.explain_testing import FEW, explained, plant
from tests.support.run_testing import TINY, arguments, finish, start_many
from tests.support.step_testing import make_trainer
from training.step.trainer import Trainer


class Spoilt(torch.autograd.Function):
    """A tensor of which one element is divided by zero: forward or backward, and of the last element."""

    @staticmethod
    def forward(ctx, x, backward):
        ctx.backward = backward
        return _with_a_zero_divided(x, not backward)

    @staticmethod
    def backward(ctx, dx):
        return _with_a_zero_divided(dx, ctx.backward), None


def _with_a_zero_divided(x, divide):
    x = x.clone()
    x[-1, -1, -1] /= 0.0 if divide else 1.0
    return x


def spoilt_mlp(x, *weights, direction, **keywords):
    """The kernel, whose result or whose gradient of x is spoilt."""
    if direction == "backward":
        return kernels.TRITON.mlp(Spoilt.apply(x, True), *weights, **keywords)
    return Spoilt.apply(kernels.TRITON.mlp(x, *weights, **keywords), False)


def spoil_what_backward_gives(setattr, which: int) -> None:
    """Let the feed-forward's backward kernel give no number at one place of its gate_up gradient, of y, or of x's gradient."""
    made = kernels.mlp.op._mlp_backward

    def spoilt(*given):
        results = made(*given)
        results[which][..., -1, -1] = torch.nan
        return results

    setattr(kernels.mlp.op, "_mlp_backward", spoilt)


@pytest.mark.parametrize(
    ("dtype", "spec", "recompute"),
    [
        (torch.float32, "mlp", "none"),
        (torch.float32, "mlp", "full"),
        (torch.float16, "all", "none"),
        (torch.float16, "mlp", "selective"),
    ],
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_feed_forward_s_kernel_that_divides_by_zero_is_named(dtype, spec, recompute, direction):
    trainer = make_trainer(dtype, spec, device=kt.DEVICE, recompute=recompute)
    plant(trainer, 1, mlp=partial(spoilt_mlp, direction=direction))
    lines = explained(trainer, **FEW)
    name = "out" if direction == "forward" else "gradient of x"
    assert lines.startswith(
        f"first not finite: layer 1, mlp, {direction}, gives {name}: 1 of {2 * 16 * 64:,} values not finite\n"
    )
    assert re.search(
        r"its torch twin gives finite values, up to [\d.e-]+: the kernel is to blame; -mlp@1 in --kernels", lines
    )
    if direction == "forward":
        before = r"layer 1, add_rms_norm of ffn_norm y [\d.e-]+, summed [\d.e-]+"
    else:  # whose kernel gives those of its matrices first
        before = r"layer 1, mlp gradient of \w+_weight [\d.e-]+"
    assert re.search(f"and before that: .*{before}$", lines, re.M)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("which", "name", "shape"), [(0, "gate_up_weight", (192, 64)), (1, "down_weight", (64, 96))])
def test_a_gradient_of_a_matrix_is_its_kernel_s_wherever_it_goes(monkeypatch, dtype, which, name, shape):
    """In half precision past autograd, to where the step sums it."""
    spoil_what_backward_gives(monkeypatch.setattr, which)
    trainer = make_trainer(dtype, "mlp", device=kt.DEVICE)
    lines = explained(trainer, **FEW)
    assert lines.startswith(f"first not finite: layer 1, mlp, backward, gives gradient of {name}: ")
    assert f" of {shape[0] * shape[1]:,} values not finite\n" in lines
    assert "the kernel is to blame; -mlp@1 in --kernels leaves it out" in lines


def scaled_mlp(dtype, gate_up: float, down: float) -> Trainer:
    """A trainer of the kernel, with matrices of layer 1 that are so many times larger."""
    trainer = make_trainer(dtype, "mlp", device=kt.DEVICE)
    with torch.no_grad():
        trainer.model.layers[1].w_gate_up.weight.mul_(gate_up)
        trainer.model.layers[1].w_down.weight.mul_(down)
        trainer.model.refresh_compute_weights()
    return trainer


ON_THE_WAY = r"in float64 it is finite, up to [\d.e+-]+: what float16 rounds or cannot hold on the way is to blame"
NOT_ITS_KERNEL = "its torch twin gives the same kind of values: what mlp@1 is given is to blame, and not its kernel"
LOSS_SCALE = "the loss scale of the step made it so large, and has been halved since, as float16 needs now and then"


def test_an_overflow_within_the_feed_forward_s_kernel_is_not_its_fault():
    lines = explained(scaled_mlp(torch.float16, 5e5, 1.0), **FEW)
    assert lines.startswith("first not finite: layer 1, mlp, forward, gives out: ")
    assert NOT_ITS_KERNEL in lines
    assert re.search(r"in float64 it is up to [\d.]+e\+\d\d, more than float16 holds \(6\.55e\+04\)$", lines)
    assert "kernel is to blame" not in lines
    lines = explained(scaled_mlp(torch.float16, 2e3, 1e-3), **FEW)
    assert lines.startswith("first not finite: layer 1, mlp, forward, gives out: ")
    assert re.search(f"{NOT_ITS_KERNEL}\n{ON_THE_WAY}$", lines)


def test_a_loss_scale_is_blamed_for_what_overflows_within_the_feed_forward_s_backward_kernel():
    lines = explained(scaled_mlp(torch.float16, 1e-3, 1e6), **FEW)
    assert re.match(r"first not finite: layer 1, mlp, backward, gives gradient of \w+: ", lines)
    assert re.search(f"{NOT_ITS_KERNEL}\n{ON_THE_WAY}\n{LOSS_SCALE}$", lines)


def test_what_the_feed_forward_is_given_is_named_by_the_op_that_gave_it():
    trainer = make_trainer(torch.float16, "mlp", device=kt.DEVICE)
    norm = kernels.TORCH.add_rms_norm

    def spoilt_norm(x, residual, weight, eps, *rows):
        y, summed = norm(x, residual, weight, eps, *rows)
        return Spoilt.apply(y, False), summed

    plant(trainer, 1, add_rms_norm=spoilt_norm)
    assert explained(trainer, **FEW).startswith("first not finite: layer 1, add_rms_norm of attention_norm, forward, ")


# -------------------------------------------------------------------------------------------------------- many processes


ONE_DIVIDES = """
import os, train
from functools import partial
from tests.support.explain_testing import plant
from tests.training.test_explain_mlp import spoilt_mlp
from training.step.trainer import Trainer
set_up = Trainer._set_up
def set_up_and_plant(self, *given):
    set_up(self, *given)
    if os.environ["RANK"] == "1":
        plant(self, 1, mlp=partial(spoilt_mlp, direction="forward"))
Trainer._set_up = set_up_and_plant
train.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_of_many_processes_the_one_whose_feed_forward_it_is_is_named(tmp_path, text, parallel):
    options = {
        "gradient_accumulation_steps": 2,
        "max_skipped_steps": 1,
        "out_dir": tmp_path / "out",
        "parallel": parallel,
        "kernels": "mlp",
        "compile": False,
        "activation_checkpointing": "full",
        "eval_iters": 1,
    }
    processes = start_many(arguments(**TINY | text | options), code=ONE_DIVIDES, TRITON_INTERPRET="1")
    results = [finish(process) for process in processes]
    assert [result.status for result in results] == [1, 1], results
    assert "step 0 was skipped; done again op by op, from the same parameters (rank 1):\n" in results[0].out
    assert "first not finite: layer 1, mlp, forward, gives out: 1 of " in results[0].out
    assert "the kernel is to blame; -mlp@1 in --kernels" in results[0].out


OF_SHARES = """
import torch
from tests.support.explain_testing import FEW, assert_watching_changes_no_bit
from tests.support.step_testing import TINY, micro_batches
from tests.training.test_explain_mlp import spoil_what_backward_gives
from training.config import TrainConfig
from training.distributed import joined
from training.step.explain import explain
from training.step.start import new_trainer

def explained(world, gate_up, down, scale=2.0**16, spoil=None, **options):
    config = TrainConfig(**TINY, gradient_accumulation_steps=2, parallel="fsdp", kernels="mlp", **options)
    torch.manual_seed(0)
    trainer = new_trainer(config, world, torch.device("cpu"), torch.float16)
    for product, times in (("w_gate_up", gate_up), ("w_down", down)):
        trainer.here(getattr(trainer.model.layers[1], product).weight).mul_(times)
    trainer.loss_scale.scale.fill_(scale)
    if spoil is not None:
        spoil_what_backward_gives(setattr, spoil)
    else:
        assert_watching_changes_no_bit(trainer, micro_batches(world.rank, **FEW))
    lines = explain(trainer, micro_batches(world.rank, **FEW), 64)
    if world.is_main:
        print(*lines, "", sep="\\n")

torch.set_num_threads(1)
with joined(TrainConfig(**TINY, gradient_accumulation_steps=2, device="cpu")) as world:
    explained(world, 2e3, 1e-3)
    explained(world, 1e-3, 1e6, 2.0**17)
    explained(world, 1.0, 1.0, spoil=1, activation_checkpointing="full")
"""


def test_what_the_kernel_makes_of_shares_of_a_model_is_explained():
    results = [finish(process) for process in start_many([], code=OF_SHARES, TRITON_INTERPRET="1")]
    assert [result.status for result in results] == [0, 0], results
    forward, backward, spoilt = results[0].out.split("\n\n")[:3]
    assert forward.startswith("first not finite: layer 1, mlp, forward, gives out: ")
    assert re.search(f"{NOT_ITS_KERNEL}\n{ON_THE_WAY}$", forward)
    assert backward.startswith("first not finite: layer 1, mlp, backward, gives gradient of ")
    assert re.search(f"{NOT_ITS_KERNEL}\n{ON_THE_WAY}\n{LOSS_SCALE}$", backward)
    assert spoilt.startswith("first not finite: layer 1, mlp, backward, gives gradient of down_weight: ")
    assert "the kernel is to blame; -mlp@1 in --kernels leaves it out" in spoilt
