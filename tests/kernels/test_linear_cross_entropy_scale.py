"""The loss head where the gradient that backward sends is known in advance: the same gradients, where they belong, once."""

import pytest
import torch

from kernels.linear_cross_entropy import chunked as kernel_file
from kernels.linear_cross_entropy.op import linear_cross_entropy_torch, linear_cross_entropy_triton
from tests.support import kernel_testing as kt

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
both_twins = pytest.mark.parametrize(
    "op", [linear_cross_entropy_torch, linear_cross_entropy_triton], ids=["torch", "triton"]
)


def inputs(n=37, d=24, v=101, dtype=FP32):
    hidden = kt.tensor(n, d, dtype=dtype).requires_grad_()
    weight = kt.tensor(v, d, seed=1, scale=d**-0.5).requires_grad_()
    targets = torch.randint(v, (n,), generator=torch.Generator().manual_seed(2)).to(kt.DEVICE)
    targets[::5] = -100
    return hidden, weight, targets


def gradients(op, hidden, weight, targets, scale, given, **options):
    """Of hidden, and what gradient_sum (where `given`) and weight.grad got together."""
    hidden.grad = weight.grad = None
    total = torch.zeros_like(weight)
    known = {"scale": scale} | ({"gradient_sum": total} if given else {})
    with kt.poisoned():
        loss = op(hidden, weight, targets, **known, **options)
        loss.backward(scale)
    return loss.detach(), hidden.grad, total if weight.grad is None else total + weight.grad


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(kernel_file, "tiled_chunk_rows", lambda *sizes: 16)


@both_twins
@pytest.mark.parametrize("v", [101, 8300], ids=["in registers", "in blocks"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("given", [False, True], ids=["alone", "with a sum of gradients"])
def test_a_scale_that_is_known_gives_the_gradients_that_it_would(small_chunks, op, v, reduction, given):
    hidden, weight, targets = inputs(v=v)
    scale = torch.tensor(0.3, device=kt.DEVICE)
    plain = op(hidden, weight, targets, reduction=reduction)
    wanted = (plain.detach(), *torch.autograd.grad(plain, (hidden, weight), scale))
    for a, b in zip(gradients(op, hidden, weight, targets, scale, given, reduction=reduction), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@both_twins
@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_half_precision_is_as_exact_as_without_a_scale(small_chunks, op, dtype):
    hidden, weight, targets = inputs(n=150, v=500, dtype=dtype)
    scale = torch.tensor(65536.0 / 3000, device=kt.DEVICE)
    used = weight.detach().to(dtype).double().requires_grad_()
    h = hidden.detach().double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(h @ used.T, targets, reduction="sum")
    wanted = torch.autograd.grad(loss, (h, used), scale.double())
    actual = gradients(op, hidden, weight, targets, scale, True, reduction="sum")[1:]
    plain = op(hidden, weight, targets, reduction="sum")
    plain = torch.autograd.grad(plain, (hidden, weight), scale)
    for x, other, right in zip(actual, plain, wanted, strict=True):
        assert x.dtype == other.dtype
        assert (x - right).norm() <= 2 * (other - right).norm() + 1e-6 * right.norm()


def test_float16_is_not_scaled_before_its_products():
    # p is about 1e-4 here, times 2^-20 nothing that float16 has.
    hidden, weight, targets = inputs(n=64, d=16, v=2000, dtype=FP16)
    targets.fill_(7)
    scale = torch.tensor(2.0**-20, device=kt.DEVICE)
    actual = gradients(linear_cross_entropy_triton, hidden, weight, targets, scale, True, reduction="sum")[2]
    plain = linear_cross_entropy_triton(hidden, weight, targets, reduction="sum")
    (wanted,) = torch.autograd.grad(plain, weight, scale)
    assert torch.equal(actual, wanted)
    assert (actual != 0).all()


def test_the_gradient_is_added_to_what_is_there_and_autograd_gets_none():
    hidden, weight, targets = inputs()
    scale, before = torch.tensor(2.0, device=kt.DEVICE), kt.tensor(101, 24, seed=7)
    total = before.clone()
    for _ in range(2):
        linear_cross_entropy_triton(hidden, weight, targets, scale=scale, gradient_sum=total).backward(scale)
    assert weight.grad is None
    (once,) = torch.autograd.grad(linear_cross_entropy_triton(hidden, weight, targets), weight, scale)
    torch.testing.assert_close(total, before + 2 * once)


def test_a_call_without_gradients_adds_none():
    hidden, weight, targets = inputs()
    scale, total = torch.tensor(2.0, device=kt.DEVICE), torch.zeros(101, 24, device=kt.DEVICE)
    with torch.no_grad():
        loss = linear_cross_entropy_triton(hidden, weight, targets, scale=scale, gradient_sum=total)
    assert loss == linear_cross_entropy_triton(hidden, weight, targets)
    linear_cross_entropy_triton(hidden, weight.detach(), targets, scale=scale, gradient_sum=total).backward(scale)
    linear_cross_entropy_triton(hidden.detach(), weight, targets, scale=scale, gradient_sum=total).backward(scale)
    torch.testing.assert_close(weight.grad, torch.autograd.grad(loss_of(hidden, weight, targets), weight, scale)[0])
    assert (total == 0).all()


def loss_of(hidden, weight, targets):
    return linear_cross_entropy_triton(hidden, weight, targets)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "aot_eager"])
def test_another_gradient_than_was_said_raises(compiled):
    hidden, weight, targets = inputs()
    scale = torch.tensor(2.0, device=kt.DEVICE)
    torch._dynamo.reset()
    op = linear_cross_entropy_triton
    op = torch.compile(op, backend="aot_eager", fullgraph=True) if compiled else op
    with pytest.raises(RuntimeError, match="backward came with another gradient than `scale`"):
        op(hidden, weight, targets, scale=scale).backward()
    with pytest.raises(RuntimeError, match="backward came with another gradient than `scale`"):
        (2 * op(hidden, weight, targets, scale=scale)).backward(scale)
    assert hidden.grad is None


def test_a_second_backward_pass_raises():
    hidden, weight, targets = inputs()
    scale = torch.tensor(2.0, device=kt.DEVICE)
    loss = linear_cross_entropy_triton(hidden, weight, targets, scale=scale)
    loss.backward(scale, retain_graph=True)
    with pytest.raises(RuntimeError, match="there is one backward pass, and it was made"):
        loss.backward(scale)


@both_twins
@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_compiles_into_one_graph(op, dtype):
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    args, scale = inputs(dtype=dtype), torch.tensor(0.25, device=kt.DEVICE)
    for given in (False, True):
        actual, wanted = (gradients(function, *args, scale, given) for function in (compiled, op))
        for a, b in zip(actual, wanted, strict=True):
            torch.testing.assert_close(a, b)


@both_twins
def test_a_second_derivative_raises(op):
    # What is saved is no function of hidden to autograd, whose second derivative would be wrong: without an error in a sum.
    hidden, weight, targets = inputs()
    with pytest.raises(RuntimeError, match="linear_cross_entropy: its gradient cannot be differentiated again"):
        torch.autograd.grad(op(hidden, weight, targets), hidden, create_graph=True)


@both_twins
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scale": torch.ones(2)},
            r"scale has shape \(2,\) and dtype torch.float32, wanted \(\) of torch.float32, dense",
        ),
        ({"scale": torch.ones((), dtype=BF16)}, r"scale has shape \(\) and dtype torch.bfloat16"),
        ({"scale": torch.ones((), device="meta")}, "scale is on meta, hidden is on cpu"),
        ({"gradient_sum": torch.zeros(4, 4)}, r"gradient_sum has shape \(4, 4\)"),
        ({"gradient_sum": torch.zeros(4, 5).T}, r"gradient_sum has shape \(5, 4\) .* dense"),
    ],
)
def test_bad_input_is_refused_by_name(op, change, message):
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "targets": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match="linear_cross_entropy: " + message):
        op(**arguments | change)
