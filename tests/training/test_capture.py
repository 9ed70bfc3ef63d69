"""The step as a CUDA graph: what it needs to be one, everywhere; that it then computes the same, on a GPU."""

import contextlib
import gc

import pytest
import torch

import training.step.trainer
from kernels import select
from model import Llama
from tests.support import kernel_testing as kt
from tests.support.step_testing import TINY, make_trainer, micro_batches, to_device, train
from training.config import TrainConfig
from training.device import set_determinism
from training.distributed import World
from training.step import optimizer
from training.step.capture import Captured
from training.step.readback import Readback
from training.step.trainer import Trainer


def places(trainer):
    """Where everything lies that a step reads or writes."""
    tensors = dict(trainer.model.named_parameters())
    tensors |= {f"gradient of {name}": p.grad for name, p in trainer.model.named_parameters()}
    tensors |= dict(trainer.model.named_buffers())
    tensors |= {f"copy of {name}": copy for name, copy in trainer.model.compute_copies().items()}
    for i, state in enumerate(trainer.optimizer.state.values()):
        tensors |= {f"{key} of parameter {i}": x for key, x in state.items()}
    for i, batch in enumerate(trainer._micro_batches):
        tensors |= {f"input {i} {j}": x for j, x in enumerate(batch) if x is not None}
    scale = trainer.loss_scale
    tensors |= {"scale": scale.scale, "growth": scale.growth_tracker, "lr": trainer.optimizer.lr}
    tensors |= {"result": trainer._result, "valid": trainer._valid_tokens}
    return {name: x.data_ptr() for name, x in tensors.items()}


@pytest.mark.parametrize("kernels", ["none", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nothing_moves_between_steps_not_for_an_evaluation_or_a_checkpoint_either(kernels, dtype):
    trainer = make_trainer(dtype, kernels=kernels, device=kt.DEVICE)
    train(trainer, 1)
    before = places(trainer)
    train(trainer, 2)
    trainer.evaluate(to_device(micro_batches(0)))
    model = trainer.model
    saved = optimizer.moments(model, trainer.optimizer)
    saved = {moment: {key: x.clone() for key, x in named.items()} for moment, named in saved.items()}
    optimizer.restore(model, trainer.optimizer, lambda moment, name: saved[moment][name], 2)
    trainer.loss_scale.load_state_dict(trainer.loss_scale.state_dict())
    trainer.optimizer.load_state_dict(trainer.optimizer.state_dict())
    model.refresh_compute_weights()
    train(trainer, 1)
    assert places(trainer) == before


def test_a_step_never_asks_the_device(monkeypatch):
    """Tensors of the meta device have no values: whatever asks for one fails. Torch's update has no form for them."""
    config = TrainConfig(**TINY)
    with torch.device("meta"):
        model = Llama(config.shape(), select("none", config.n_layers), torch.bfloat16)
    trainer = Trainer(model, config, World())
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
    result = trainer.step(micro_batches(0), 256, 1e-3)
    assert result.loss.device.type == "meta"


class CountingCapture:
    """Stands in for a CUDA graph where there is none: runs the function, and knows how often."""

    made: list["CountingCapture"]

    def __init__(self, function, stream):
        self.function, self.calls = function, 0
        self.made.append(self)

    def __call__(self):
        self.calls += 1
        self.function()


@pytest.fixture
def captures(monkeypatch):
    """Every capture that is made, and a trainer that makes some."""
    CountingCapture.made = []
    monkeypatch.setattr(training.step.trainer, "Captured", CountingCapture)
    trainer = make_trainer()
    trainer.captures, trainer._stream = True, None
    return trainer, CountingCapture.made


def test_steps_of_one_shape_share_one_capture(captures):
    trainer, made = captures
    losses = train(trainer, 3)
    assert [capture.calls for capture in made] == [3]
    assert losses == train(make_trainer(), 3)


def test_another_shape_is_another_capture(captures):
    trainer, made = captures
    train(trainer, 2)
    train(trainer, 1, rows=2)
    train(trainer, 2, count=1)
    first_key = torch.zeros(4, 32, dtype=torch.int32)
    trainer.step([(t, y, first_key) for t, y, _ in micro_batches(0, count=1)], 128, 1e-3)
    assert [capture.calls for capture in made] == [2, 1, 2, 1]


class FakeGpu:
    """What a recording needs of CUDA: inside it nothing is launched, and whatever asks the GPU makes it fail twice."""

    def __init__(self, monkeypatch):
        self.recording, self.stream, self.recorded = False, "outside", []
        for name in ("CUDAGraph", "graph", "current_stream", "set_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def wait_stream(self, other):
        pass

    def current_stream(self):
        return self

    def set_stream(self, stream):
        self.stream = "outside" if stream is self else stream

    class CUDAGraph:
        def replay(self):
            self.function()

    @contextlib.contextmanager
    def graph(self, graph, stream, capture_error_mode):
        self.recording, self.stream, failed = True, stream, True
        try:
            yield
            failed = False
        finally:
            self.recording = False
            if failed:  # and so the stream that was current before is not put back
                raise RuntimeError("operation failed due to a previous error during capture")
        self.stream = "outside"
        graph.function = self.recorded.pop()


@pytest.fixture
def gpu(monkeypatch):
    return FakeGpu(monkeypatch)


def stepping(gpu, trainer, asks=False):
    """The trainer's step as a GPU has it: recorded while it records, run otherwise. asks: it reads a value from the GPU."""
    step = trainer._step

    def run():
        if not gpu.recording:
            step()
        elif asks:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with ...")
        else:
            gpu.recorded.append(step)

    return run


@pytest.mark.parametrize("asks", [False, True], ids=["captured", "can't be"])
def test_a_step_that_cannot_be_captured_goes_on_without_and_says_so_once(gpu, capsys, asks):
    trainer = make_trainer()
    trainer._step = stepping(gpu, trainer, asks)
    trainer.captures, trainer._stream = True, gpu
    assert train(trainer, 6) == train(make_trainer(), 6)
    replays = trainer._run._graph is not None
    assert replays is not asks
    assert gpu.stream == "outside"
    said = "the step runs without a CUDA graph, as with --no-capture: RuntimeError: CUDA error: operation not permitted"
    assert capsys.readouterr().err == (f"{said} when stream is capturing\n" if asks else "")


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_before_a_recording_and_not_during_it(gpu, enabled):
    happened = []

    def function():
        happened.append((gpu.recording, gc.isenabled()))
        gpu.recorded.append(lambda: None)

    captured = Captured(function, gpu)
    captured(), captured()
    callback = lambda phase, info: happened.append(f"collected {phase}") if info["generation"] == 2 else None  # noqa: E731
    gc.callbacks.append(callback)
    try:
        gc.enable() if enabled else gc.disable()
        captured()
        assert gc.isenabled() is enabled
    finally:
        gc.callbacks.remove(callback)
        gc.enable()
    assert happened[-3:] == ["collected start", "collected stop", (True, False)]


def test_results_outlive_the_next_step():
    trainer = make_trainer()
    first = trainer.step(micro_batches(0), 256, 1e-3)
    loss = first.loss.item()
    trainer.step(micro_batches(1), 256, 1e-3)
    assert first.loss.item() == loss
    assert Readback(first).wait() == (loss, first.grad_norm.item(), False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_that_asks_the_gpu_goes_on_uncaptured(capsys, determinism_put_back):
    set_determinism(True)

    def run(asks):
        trainer = make_trainer(torch.bfloat16, "all", device="cuda", kernels="all")
        if asks:
            loss_sum = trainer.loss_sum
            trainer.loss_sum = lambda *batch: (loss := loss_sum(*batch), loss.item())[0]
        return train(trainer, 6)

    assert run(asks=True) == run(asks=False)
    assert "the step runs without a CUDA graph" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_a_captured_step_computes_the_same_bits(dtype, compile, determinism_put_back):
    set_determinism(True)  # as train.py: else the compiled embedding's gradient is summed in any order
    torch.compiler.reset()  # the trainers of other tests are graphs of the same function

    def run(capture):
        torch.manual_seed(0)
        options = TINY | {"kernels": "all", "compile": compile, "capture": capture}
        config = TrainConfig(**options)
        trainer = Trainer(Llama(config.shape(), select("all", config.n_layers), dtype).cuda(), config, World())
        assert trainer.captures is capture
        losses = train(trainer, 6)
        trainer.evaluate(to_device(micro_batches(9)))
        return losses + train(trainer, 2), [p.detach().clone() for p in trainer.model.parameters()]

    captured, uncaptured = run(True), run(False)
    assert captured[0] == uncaptured[0]
    assert all(torch.equal(p, q) for p, q in zip(captured[1], uncaptured[1], strict=True))
