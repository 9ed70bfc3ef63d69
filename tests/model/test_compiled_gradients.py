"""Each parameter's gradient of a compiled step is the eager one's: none is lost, whatever is selected and whoever compiles.

PyTorch 2.11 loses, without a word, the gradient of an `autograd.Function` whose output passes a cast to the dtype that it has.
"""

import pytest
import torch

from kernels.launch import HAVE_TRITON
from tests.support.kernel_testing import DEVICE
from tests.support.step_testing import make_trainer, micro_batches

F32, F16 = torch.float32, torch.float16
CASES = [
    ("none", F32),
    ("none", F16),
    ("all", F32),
    ("all,-attention@0,-rms_norm@1,-mlp@1", F16),
    ("linear_cross_entropy", F32),
]
# What a compiled sum may round otherwise, as a share of a gradient's root mean square.
BOUND = {F32: 1e-4, F16: 2e-2}


def gradients(compile_step, dtype, spec) -> dict[str, torch.Tensor]:
    """By parameter, of one micro-step."""
    with torch.device(DEVICE):
        trainer = make_trainer(dtype, spec)
    loss_sum = compile_step(trainer._loss_sum)
    ((tokens, targets, _),) = micro_batches(0, count=1, rows=2, length=16)
    scale = torch.tensor(0.25, device=DEVICE)  # known before the forward pass, as in every step of a trainer
    loss = loss_sum(tokens.contiguous().to(DEVICE), targets.contiguous().to(DEVICE), None, scale)
    loss.backward(scale)
    flat = trainer.flat
    flat.finish_gradients()  # those of norms are in rows
    return {name: flat.view(flat.gradients, name).clone() for name, _ in trainer.model.named_parameters()}


def compiled(backend):
    def compile_step(step):
        torch._dynamo.reset()
        return torch.compile(step, fullgraph=True, dynamic=False, backend=backend)

    return compile_step


def check(backend, dtype, spec):
    wanted, found = gradients(lambda step: step, dtype, spec), gradients(compiled(backend), dtype, spec)
    wrong = []
    for name, gradient in wanted.items():
        size, error = (x.square().mean().sqrt().item() for x in (gradient, found[name] - gradient))
        assert size > 0, f"{name}: the eager gradient is zero"
        if not error <= BOUND[dtype] * size:
            wrong.append(f"{name}: {error / size:.1e} of its size off, {found[name].abs().max().item():.1e} at most")
    assert wrong == []


@pytest.mark.parametrize(("spec", "dtype"), CASES, ids=str)
def test_each_gradient_of_a_compiled_step_is_the_eager_one(spec, dtype):
    if spec != "none" and not HAVE_TRITON:
        pytest.skip("Triton is not installed here")
    check("aot_eager", dtype, spec)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["none", "all"])
def test_inductor_loses_no_gradient(spec):
    if spec != "none" and not HAVE_TRITON:
        pytest.skip("Triton is not installed here")
    check("inductor", F32, spec)
