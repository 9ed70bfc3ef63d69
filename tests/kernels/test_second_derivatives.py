"""A second derivative of any op, of either twin, is right or raises: it is never a wrong number."""

from dataclasses import fields

import pytest
import torch

import kernels
from tests.support import kernel_testing as kt

EPS = 1e-5
TOKENS = torch.tensor([0, 2, 2, 1], device=kt.DEVICE)


def cases():
    """Inputs of each op, and the op as a function of those that are differentiated."""
    qkv = kt.tensor(1, 4, 4 * 16, seed=1)
    q, k, v = (x.contiguous() for x in qkv.view(1, 4, 4, 16).split([2, 1, 1], dim=2))
    cos, sin = kt.tensor(4, 8, seed=2), kt.tensor(4, 8, seed=3)
    return {
        "rms_norm": (lambda ops, x, w: ops.rms_norm(x, w, EPS), (kt.tensor(3, 8), kt.tensor(8, seed=1))),
        "add_rms_norm": (
            lambda ops, x, r, w: sum(ops.add_rms_norm(x, r, w, EPS)),
            (kt.tensor(3, 8), kt.tensor(3, 8, seed=2), kt.tensor(8, seed=1)),
        ),
        "rope": (lambda ops, x: torch.cat(ops.rope(x, cos, sin, 2, 1), 2), (qkv,)),
        "rope_attention": (lambda ops, x: ops.rope_attention(x, cos, sin, 2, 1), (qkv,)),
        "swiglu": (lambda ops, x: ops.swiglu(x), (kt.tensor(3, 8),)),
        "mlp": (
            lambda ops, x, w, down: ops.mlp(x, w, down),
            (kt.tensor(3, 8), kt.tensor(10, 8, seed=1), kt.tensor(8, 5, seed=2)),
        ),
        "attention": (lambda ops, q, k, v: ops.attention(q, k, v), (q, k, v)),
        "embedding": (lambda ops, w: ops.embedding(TOKENS, w), (kt.tensor(3, 8),)),
        "linear_cross_entropy": (
            lambda ops, h, w: ops.linear_cross_entropy(h, w, TOKENS % 3),
            (kt.tensor(4, 8), kt.tensor(3, 8, seed=1)),
        ),
    }


def test_every_op_has_a_case():
    without_a_gradient = {"decode_attention"}  # tests/kernels/test_decode_attention.py
    assert set(cases()) == {field.name for field in fields(kernels.Ops)} - without_a_gradient


def second(ops, name, dtype):
    """Gradient of a sum in which the first gradient stands beside the output, so that another way leads to the inputs."""
    function, inputs = cases()[name]
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    y = function(ops, *inputs)
    first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
    return torch.autograd.grad(y.sum() + sum(g.square().sum() for g in first), inputs)


@pytest.mark.parametrize("name", list(cases()))
@pytest.mark.parametrize("twin", ["TORCH", "TRITON"])
def test_it_is_right_or_raises(twin, name):
    # Neither twin of the loss head has one, nor have SDPA's fused kernels. A rotation's gradient is a rotation, which has one.
    if name in ("linear_cross_entropy", "attention", "rope_attention") or (twin == "TRITON" and name != "rope"):
        with pytest.raises(
            RuntimeError, match=r"differentiated again|autograd formula|derivative .* is not implemented"
        ):
            second(getattr(kernels, twin), name, torch.float32)
        return
    actual = second(getattr(kernels, twin), name, torch.float32)
    wanted = second(kernels.TORCH, name, torch.float64)
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)
