"""A first_key that breaks its contract gives wrong numbers, and never an address outside of the tensors."""

import pytest
import torch

from kernels.attention.op import attention_torch, attention_triton
from tests.support import kernel_testing as kt

MOST, LEAST = 2**31 - 1, -(2**31)


@pytest.mark.parametrize(
    "values",
    [[MOST] * 50, [LEAST] * 50, [20] * 25 + [LEAST] * 25, [LEAST] * 25 + [MOST] * 25, [0] * 49 + [MOST]],
    ids=["most", "least", "falling", "both", "last"],
)
def test_values_past_both_ends_read_nothing_outside(values):
    q, k, v = kt.differentiable(*(kt.tensor(1, 50, 1, 24, seed=i) for i in range(3)))
    first_key = torch.tensor([values], dtype=torch.int32, device=kt.DEVICE)
    outputs, gradients = kt.run(lambda q, k, v: attention_triton(q, k, v, first_key), [q, k, v], [torch.ones_like(q)])
    assert all(x.isfinite().all() for x in outputs + gradients)


def test_the_twin_compiles_where_the_heads_vary():
    torch._dynamo.reset()
    compiled = torch.compile(attention_torch, backend="eager", fullgraph=True)
    for heads in (2, 4, 8, 2):
        q, k = kt.tensor(1, 5, heads, 16), kt.tensor(1, 5, 2, 16, seed=1)
        torch.testing.assert_close(compiled(q, k, k), attention_torch(q, k, k))
