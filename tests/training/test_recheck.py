"""A step that is made twice has the same bits twice; where it has not the run stops, and says what differed and where."""

import itertools
import re
from dataclasses import replace

import pytest
import torch

import kernels
import kernels.mlp.op
from tests.support import kernel_testing as kt
from tests.support.run_testing import TINY as RUN
from tests.support.run_testing import arguments, finish, records, start_many
from tests.support.step_testing import TINY, make_trainer, micro_batches, to_device
from training.checkpoint import files as checkpoint
from training.config import TrainConfig
from training.distributed import World
from training.progress import Progress
from training.step.recheck import Rechecked, StepDiffersError
from training.step.trainer import Trainer


class WrongOnce(torch.autograd.Function):
    """SwiGLU of which one pass of one call flips a bit of one number."""

    calls = 0
    wrong_call, backward_pass = 0, False

    @classmethod
    def plant(cls, call: int, backward_pass: bool) -> None:
        cls.calls, cls.wrong_call, cls.backward_pass = 0, call, backward_pass

    @staticmethod
    def forward(ctx, gate_up):
        WrongOnce.calls += 1
        ctx.is_wrong = WrongOnce.calls == WrongOnce.wrong_call
        ctx.save_for_backward(gate_up)
        y = kernels.TORCH.swiglu(gate_up)
        if ctx.is_wrong and not WrongOnce.backward_pass:
            y.view(torch.int32)[0, 3, 5] ^= 1 << 20
        return y

    @staticmethod
    def backward(ctx, dy):
        (gate_up,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate_up.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(kernels.TORCH.swiglu(leaf), leaf, dy)
        if ctx.is_wrong and WrongOnce.backward_pass:
            gradient.view(torch.int32)[0, 3, 5] ^= 1 << 20
        return gradient


def swiglu(gate_up):
    return WrongOnce.apply(gate_up)


def planted(model) -> None:
    model.ops = tuple(replace(of, swiglu=swiglu) if place == 1 else of for place, of in enumerate(model.ops))


def rechecked(**options) -> tuple[Rechecked, Trainer]:
    trainer = make_trainer(**options)
    planted(trainer.model)
    config = TrainConfig(**TINY, check_steps=1)
    return Rechecked(config, trainer, Progress(step=8), World()), trainer


def take(step: Rechecked, count: int = 2):
    return step.step(micro_batches(0, count=count), count * 4 * 32, 1e-3)


@pytest.mark.parametrize(("call", "which"), [(2, "first"), (4, "second")])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_an_op_that_is_wrong_once_is_named_and_the_state_is_as_before(call, which, direction):
    """Calls 1 and 2 are of the first making, 3 and 4 of the second, of two micro-batches each."""
    step, trainer = rechecked()
    before = [x.clone() for x in trainer.state()]
    WrongOnce.plant(call, direction == "backward")
    with pytest.raises(StepDiffersError) as found:
        take(step)
    differs = "y" if direction == "forward" else "gradient of gate_up"
    agrees = "w_gate_up, forward, y" if direction == "forward" else "w_down, backward, gradient of \\w+"
    figures = r"loss [\d.]+ and [\d.]+, gradient norm [\d.]+ and [\d.]+"
    where = rf"first in layer 1, swiglu, {direction}, {differs} \(call 2\), after layer 1, {agrees} \(call 2\) agreed"
    verdict = f"a third one agrees with the other: the {which} was wrong, once"
    whole = rf"step 8, made twice from the same state, differs \(--check-steps\): {figures}; {where}; {verdict}; .*"
    assert re.fullmatch(whole, str(found.value)), found.value
    assert all(map(torch.equal, trainer.state(), before))


def test_an_op_that_is_wrong_every_time_otherwise_is_told():
    class Random(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: kernels.TORCH.swiglu(x) * (1 + 1e-3 * torch.rand(())))
        backward = staticmethod(lambda ctx, dy: torch.cat([dy, dy], -1))

    step, trainer = rechecked()
    trainer.model.ops = tuple(replace(of, swiglu=lambda gate_up: Random.apply(gate_up)) for of in trainer.model.ops)
    with pytest.raises(StepDiffersError, match=r"first in layer 0, swiglu, forward, y.*; a third one is like neither"):
        take(step)


def test_of_a_captured_step_the_gradient_that_differs_first_is_named():
    step, _ = rechecked()
    step._op_by_op = False  # as of a step that is compiled or captured
    WrongOnce.plant(2, True)
    where = r"the gradient of layers\.1\.w_gate_up\.weight, after the gradient of layers\.1\.w_down\.weight agreed"
    with pytest.raises(StepDiffersError, match=f"first in {where}; replays op by op agree; a third one agrees"):
        take(step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("kernel", "result", "differs"),
    [
        ("_mlp", 0, "forward, out"),
        ("_mlp_backward", 0, "backward, gradient of gate_up_weight"),
        ("_mlp_backward", 1, "backward, gradient of down_weight"),
        ("_mlp_backward", 2, "backward, gradient of x"),
    ],
)
def test_whatever_the_feed_forward_s_kernel_gets_wrong_once_is_named(monkeypatch, dtype, kernel, result, differs):
    """Gradients that go past autograd, as those of matrices do in half precision, as well."""
    made, calls = getattr(kernels.mlp.op, kernel), itertools.count(1)

    def wrong_once(*given):
        results = made(*given)
        if next(calls) == (4 if kernel == "_mlp" else 3):  # layer 1 of the second micro-batch of the first making
            x = results[result]
            bits, bit = {4: (torch.int32, 1 << 20), 2: (torch.int16, 1 << 8)}[x.element_size()]
            x.view(bits)[-1, -1, -1] ^= bit
        return results

    monkeypatch.setattr(kernels.mlp.op, kernel, wrong_once)
    trainer = make_trainer(dtype, "mlp", device=kt.DEVICE)
    step = Rechecked(TrainConfig(**TINY, check_steps=1), trainer, Progress(step=8), World())
    with pytest.raises(StepDiffersError) as found:
        step.step(to_device(micro_batches(0, count=2, rows=1, length=16)), 32, 1e-3)
    where = rf"first in layer 1, mlp, {differs} \(call 2\), after .* \(call 2\) agreed"
    verdict = "a third one agrees with the other: the first was wrong, once"
    assert re.search(f"; {where}; {verdict}; ", str(found.value)), found.value


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float16, {}),
        (torch.float32, {"optimizer": "muon"}),
        (torch.float16, {"spec": "adamw", "kernels": "adamw"}),
        (torch.float16, {"spec": "mlp"}),
    ],
)
def test_a_step_that_was_made_twice_is_the_step(dtype, options):
    trainers = [make_trainer(dtype, device=kt.DEVICE, **options) for _ in range(2)]
    steps = [trainers[0], Rechecked(TrainConfig(**TINY, check_steps=2), trainers[1], Progress(), World())]
    for i in range(4):
        results = []
        for step in steps:
            batches = [(t.to(kt.DEVICE), y.to(kt.DEVICE), None) for t, y, _ in micro_batches(i, count=1, rows=2)]
            results.append(step.step(batches, 64, 1e-3))
        steps[1]._progress.step += 1
        assert results[0].loss == results[1].loss
        assert results[0].grad_norm == results[1].grad_norm
    assert all(map(torch.equal, *(trainer.state() for trainer in trainers)))


# ------------------------------------------------------------------------------------------------------------ whole runs


def plant(setattr, step: int, backward_pass: bool = False) -> None:
    """Makes layer 1's SwiGLU wrong once: in the first making of this step, where no earlier one is made twice."""
    set_up, take_step, steps = Trainer._set_up, Trainer.step, iter(range(100))

    def set_up_and_plant(self, model, *rest):
        planted(model)
        set_up(self, model, *rest)

    def step_and_arm(self, *batch):
        WrongOnce.plant(1 if next(steps) == step else 0, backward_pass)
        return take_step(self, *batch)

    setattr(Trainer, "_set_up", set_up_and_plant)
    setattr(Trainer, "step", step_and_arm)


def test_a_run_that_checks_its_steps_is_the_run_that_does_not(run, tmp_path):
    folders = [tmp_path / "without", tmp_path / "with"]
    for n, folder in zip((0, 3), folders, strict=True):
        assert run(out_dir=folder, check_steps=n, dropout=0.1).status == 0
    without, checked = ([(line["loss"], line["grad_norm"]) for line in records(folder, "step")] for folder in folders)
    assert without == checked


@pytest.mark.fault(
    "a kernel or the hardware computes wrong now and then",
    "with `--check-steps N` the run stops, saved before that step, and names op and layer",
)
def test_a_step_that_differs_ends_the_run_saved_before_it(run, tmp_path, monkeypatch):
    options = {"eval_interval": 6, "always_save_checkpoint": True, "dropout": 0.1}
    whole, out_dir = tmp_path / "whole", tmp_path / "out"
    assert run(out_dir=whole, **options).status == 0
    plant(monkeypatch.setattr, 7)
    result = run(check_steps=8, **options)
    assert result.status == 1
    assert result.err.startswith(
        "train.py: error: step 7, made twice from the same state, differs (--check-steps): loss "
    )
    assert "; first in layer 1, swiglu, forward, y, after layer 1, w_gate_up, forward, y agreed; " in result.err
    assert "the first was wrong, once; " in result.err
    assert checkpoint.load(out_dir).step == 7
    monkeypatch.undo()
    assert run(init_from="resume", check_steps=2).status == 0
    losses = {line["step"]: line["loss"] for line in records(out_dir, "step")}
    assert losses == {line["step"]: line["loss"] for line in records(whole, "step")}


def test_it_is_refused_where_bits_are_not_promised(run):
    assert (
        "--check-steps compares to the bit, and --no-deterministic lifts that"
        in run(check_steps=5, deterministic=False).err
    )


ONE_IS_WRONG = """
import os, train
from tests.training.test_recheck import plant
plant(setattr, 3 if os.environ["RANK"] == "1" else 100, backward_pass=True)
train.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_of_many_processes_the_one_that_is_wrong_is_named(tmp_path, text, parallel):
    options = {"gradient_accumulation_steps": 2, "check_steps": 4, "out_dir": tmp_path / "out", "parallel": parallel}
    results = [finish(p) for p in start_many(arguments(**RUN | text | options), code=ONE_IS_WRONG)]
    assert [result.status for result in results] == [1, 1], results
    err = "".join(result.err for result in results)
    assert "first in layer 1, swiglu, backward, gradient of gate_up of rank 1, after" in err
    assert err.count("\n") == 1
    assert checkpoint.load(tmp_path / "out").step == 3
