"""The first value that is not finite is named by op, layer and direction, and the kernel or the mathematics blamed for it."""

import re

import pytest
import torch

import kernels
from tests.support import kernel_testing as kt
from tests.support.explain_testing import FEW, explained, plant
from tests.support.run_testing import TINY, arguments, finish, records, start_many
from tests.support.step_testing import make_trainer, micro_batches
from training.step.optimizer import LossScale
from training.step.trainer import Trainer
from training.step.watch import watching


class Wrong(torch.autograd.Function):
    """SwiGLU whose forward or backward pass divides by zero at one element."""

    @staticmethod
    def forward(ctx, gate_up, backward):
        ctx.backward = backward
        ctx.save_for_backward(gate_up)
        y = kernels.TORCH.swiglu(gate_up)
        y[0, 3, 5] /= 1.0 if backward else 0.0
        return y

    @staticmethod
    def backward(ctx, dy):
        (gate_up,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate_up.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(kernels.TORCH.swiglu(leaf), leaf, dy)
        gradient[0, 3, 5] /= 0.0 if ctx.backward else 1.0
        return gradient, None


@pytest.mark.parametrize(
    ("dtype", "recompute"),
    [(torch.float32, "none"), (torch.float32, "full"), (torch.float16, "none"), (torch.float16, "selective")],
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_kernel_that_divides_by_zero_is_named(dtype, recompute, direction):
    trainer = make_trainer(dtype, recompute=recompute)
    plant(trainer, 1, swiglu=lambda gate_up: Wrong.apply(gate_up, direction == "backward"))
    lines = explained(trainer)
    name = "y" if direction == "forward" else "gradient of gate_up"
    size = 4 * 32 * (96 if direction == "forward" else 192)
    assert lines.startswith(
        f"first not finite: layer 1, swiglu, {direction}, gives {name}: 1 of {size:,} values not finite\n"
    )
    assert re.search(
        r"its torch twin gives finite values, up to [\d.e-]+: the kernel is to blame; -swiglu@1 in --kernels", lines
    )
    before = "layer 1, w_gate_up y" if direction == "forward" else "layer 1, w_down gradient of x"
    assert re.search(rf"and before that: .*{before} [\d.e-]+$", lines, re.M)


def test_an_overflow_in_float16_is_named_and_the_mathematics_blamed():
    trainer = make_trainer(torch.float16)
    with torch.no_grad():
        trainer.model.layers[1].w_gate_up.weight.mul_(5e5)
        trainer.model.refresh_compute_weights()
    lines = explained(trainer)
    assert lines.startswith("first not finite: layer 1, w_gate_up, forward, gives y: ")
    assert re.search(r"in float64 it is up to [\d.]+e\+\d\d, more than float16 holds \(6\.55e\+04\)$", lines)
    assert "kernel is to blame" not in lines


def test_a_loss_scale_that_is_too_large_is_blamed_for_a_gradient():
    trainer = make_trainer(torch.float16)
    trainer.loss_scale.scale.fill_(2.0**40)
    lines = explained(trainer)
    assert re.match(r"first not finite: .*, backward, gives gradient of \w+: ", lines)
    assert "more than float16 holds" in lines
    assert lines.endswith(
        "the loss scale of the step made it so large, and has been halved since, as float16 needs now and then"
    )


def test_a_twin_that_is_not_finite_either_acquits_the_kernel():
    trainer = make_trainer(torch.float16)
    plant(trainer, 0, swiglu=lambda gate_up: kernels.TORCH.swiglu(gate_up))
    with torch.no_grad():
        trainer.model.layers[0].w_gate_up.weight.mul_(2e3)
        trainer.model.refresh_compute_weights()
    lines = explained(trainer)
    assert lines.startswith("first not finite: layer 0, swiglu, forward, gives y: ")
    assert "what swiglu@0 is given is to blame, and not its kernel" in lines


def test_a_parameter_that_is_not_finite_is_named():
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.layers[1].wo.weight[2, 3] = torch.nan
    assert explained(trainer).startswith("the parameter layers.1.wo.weight itself has 1 of 4,096 values not finite\n")


def test_a_parameter_that_its_copy_cannot_hold_is_named():
    trainer = make_trainer(torch.float16)
    with torch.no_grad():
        trainer.model.layers[0].wo.weight[2, 3] = 1e6
        trainer.model.refresh_compute_weights()
    assert explained(trainer) == "the parameter layers.0.wo.weight is up to 1e+06, more than float16 holds (6.55e+04)"


@pytest.mark.parametrize(
    ("dtype", "spec", "recompute"),
    [
        (torch.float32, "none", "none"),
        (torch.float32, "none", "full"),
        (torch.float16, "none", "none"),
        (torch.float16, "all,-rope", "none"),
        (torch.float16, "all,-mlp", "none"),
    ],
)
def test_what_is_watched_computes_to_the_bit_as_ever_and_is_put_back(dtype, spec, recompute):
    trainer = make_trainer(dtype, spec, device=kt.DEVICE, recompute=recompute)
    batches = micro_batches(0, **FEW)
    ops = trainer.model.ops
    loss, sights = trainer.replay(batches, 32), []
    gradients = trainer.flat.gradients.clone()
    with watching(trainer.model, sights.append):
        assert torch.equal(trainer.replay(batches, 32), loss)
    assert torch.equal(trainer.flat.gradients, gradients)
    assert trainer.model.ops == ops
    seen = {(sight.call.layer, sight.call.op, sight.direction) for sight in sights if sight.gives}
    in_layers = {"wqkv", "wo", "add_rms_norm"}
    in_layers |= {"rope_attention"} if spec == "all,-mlp" else {"rope", "attention"}
    in_layers |= {"mlp"} if spec == "all,-rope" else {"w_gate_up", "swiglu", "w_down"}
    for direction in ("forward", "backward"):
        assert {(1, op, direction) for op in in_layers} == {place for place in seen if place[::2] == (1, direction)}
    assert {
        (0, "rms_norm", "forward"),
        ("out", "embedding", "forward"),
        ("out", "linear_cross_entropy", "forward"),
    } <= seen
    before = len(sights)
    trainer.replay(batches, 32)
    assert len(sights) == before


# ------------------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture
def divides(monkeypatch):
    """Makes the swiglu of layer 1 divide by zero in some steps of every run: those whose batch has this first token."""
    take_step, step = Trainer.step, iter(range(10**6))

    def step_and_plant(self, *batch):
        ops = self.model.ops
        if next(step) in (4, 5, 8):
            plant(self, 1, swiglu=lambda gate_up: Wrong.apply(gate_up, False))
        result = take_step(self, *batch)
        if not result.skipped:
            self.model.ops = ops
        return result

    monkeypatch.setattr(Trainer, "step", step_and_plant)


@pytest.mark.fault(
    "a kernel, float16 or a parameter makes a step not finite",
    "op, layer and direction are named, and whether the kernel is to blame (`--explain-skips`)",
)
def test_the_first_skipped_step_of_a_run_is_explained(run, tmp_path, divides):
    assert run(dropout=0.1).status == 0
    notes = [line["text"] for line in records(tmp_path / "out", "note")]
    explained = [note for note in notes if "was skipped" in note]
    assert len(explained) == 1
    assert explained[0].startswith(
        "step 4 was skipped; done again op by op, from the same parameters:\n  first not finite: layer 1, swiglu"
    )


def test_more_skipped_steps_are_explained_on_request_and_none_where_it_is_off(run, tmp_path, divides):
    assert run(explain_skips=0).status == 0
    assert not [line for line in records(tmp_path / "out", "note") if "was skipped" in line["text"]]


def test_of_steps_that_are_skipped_in_a_row_each_is_explained(run, tmp_path, divides):
    assert run(explain_skips=2).status == 0
    notes = [line["text"] for line in records(tmp_path / "out", "note") if "was skipped" in line["text"]]
    assert [note.partition(";")[0] for note in notes] == ["step 4 was skipped", "step 5 was skipped"]


def test_explaining_changes_no_loss(run, tmp_path, monkeypatch):
    build = LossScale.__init__

    def start_high(self, enabled, device):
        build(self, enabled, device)
        self.scale.fill_(2.0**20)

    monkeypatch.setattr(LossScale, "__init__", start_high)
    options = {"dtype": "float16", "dropout": 0.1}
    for n in (0, 3):
        assert run(explain_skips=n, out_dir=tmp_path / f"out{n}", **options).status == 0
    without, explained = (
        [(line["loss"], line["grad_norm"]) for line in records(tmp_path / f"out{n}", "step")] for n in (0, 3)
    )
    assert without == explained
    notes = [line["text"] for line in records(tmp_path / "out3", "note") if "was skipped" in line["text"]]
    assert 1 <= len(notes) <= 3
    assert all("first not finite: " in note and ", backward, " in note for note in notes)


ONE_DIVIDES = """
import os, train
from tests.support.explain_testing import plant
from tests.training.test_explain import Wrong
from training.step.trainer import Trainer
swiglu, set_up = lambda gate_up: Wrong.apply(gate_up, False), Trainer._set_up
def set_up_and_plant(self, *given):
    set_up(self, *given)
    if os.environ["RANK"] == "1":
        plant(self, 1, swiglu=swiglu)
Trainer._set_up = set_up_and_plant
train.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_of_many_processes_the_one_whose_op_it_is_is_named(tmp_path, text, parallel):
    """Shares of the gradient are spoilt on all of them."""
    options = {
        "gradient_accumulation_steps": 2,
        "max_skipped_steps": 1,
        "out_dir": tmp_path / "out",
        "parallel": parallel,
    }
    options |= {"activation_checkpointing": "full", "eval_iters": 1}
    results = [finish(p) for p in start_many(arguments(**TINY | text | options), code=ONE_DIVIDES)]
    assert [result.status for result in results] == [1, 1], results
    assert "step 0 was skipped; done again op by op, from the same parameters (rank 1):\n" in results[0].out
    assert "first not finite: layer 1, swiglu, forward, gives y: 1 of " in results[0].out
    assert "the kernel is to blame" in results[0].out


OF_SHARES = """
import torch
from tests.support.explain_testing import assert_watching_changes_no_bit
from tests.support.step_testing import TINY, micro_batches
from training.config import TrainConfig
from training.distributed import joined
from training.step.explain import explain
from training.step.start import new_trainer

def explained(world, scale, **options):
    config = TrainConfig(**TINY, gradient_accumulation_steps=2, parallel="fsdp", **options)
    torch.manual_seed(0)
    trainer = new_trainer(config, world, torch.device("cpu"), torch.float16)
    trainer.loss_scale.scale.fill_(scale)
    if scale == 2.0:
        trainer.here(trainer.model.layers[0].wo.weight).fill_(1e6)
    if scale == 1.0:
        for product in ("wqkv", "wo"):
            trainer.here(getattr(trainer.model.layers[0], product).weight).mul_(5e4)
    if "activation_checkpointing" in options:
        assert_watching_changes_no_bit(trainer, micro_batches(world.rank, 1))
    lines = explain(trainer, micro_batches(world.rank, 1), 256)
    if world.is_main:
        print(*lines, "", sep="\\n")

torch.set_num_threads(1)
with joined(TrainConfig(**TINY, gradient_accumulation_steps=2, device="cpu")) as world:
    explained(world, 1.0)
    explained(world, 2.0)
    explained(world, 2.0**40, tie_embeddings=False, activation_checkpointing="full")
    explained(world, 4.0, activation_checkpointing="selective")
"""


def test_what_a_product_of_shares_gives_is_explained():
    """though its matrix, which was gathered for its layer's pass, is freed by then: reading it ended the run (SIGSEGV)."""
    results = [finish(process) for process in start_many([], code=OF_SHARES)]
    assert [result.status for result in results] == [0, 0], results
    forward, parameter, backward = results[0].out.split("\n\n")[:3]
    assert forward.startswith("first not finite: layer 0, wo, forward, gives y: ")
    assert "more than float16 holds" in forward
    assert parameter == "the parameter layers.0.wo.weight is up to 1e+06, more than float16 holds (6.55e+04)"
    assert re.match(r"first not finite: .*, backward, gives gradient of \w+: ", backward)
    assert "the loss scale of the step made it so large" in backward
