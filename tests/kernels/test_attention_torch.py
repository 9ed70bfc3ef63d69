"""The torch twin of attention against the equations in float64, written as loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import TORCH
from kernels.attention import op as attention_op


def inputs(b=2, t=9, h=4, hkv=2, d=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(b, t, n, d, generator=generator).to(dtype).requires_grad_() for n in (h, hkv, hkv)]


def exact(q, k, v, first_key=None):
    q, k, v = (x.double() for x in (q, k, v))
    b, t, h, d = q.shape
    rows = []
    for i in range(b):
        for j in range(t):
            low = 0 if first_key is None else int(first_key[i, j])
            for head in range(h):
                keys, values = (x[i, low : j + 1, head // (h // k.shape[2])] for x in (k, v))
                rows.append(torch.softmax(keys @ q[i, j, head] / math.sqrt(d), 0) @ values)
    return torch.stack(rows).reshape(b, t, h, d)


def documents(b, t):
    """Documents of length 1, 3 and the rest in row 0, a window of 4 in the others."""
    first_key = (torch.arange(t, dtype=torch.int32) - 3).clamp(min=0).repeat(b, 1)
    first_key[0] = torch.tensor([0, *[1] * 3, *[4] * (t - 4)])[:t]
    return first_key


@pytest.mark.parametrize("packed", [False, True], ids=["causal", "first_key"])
@pytest.mark.parametrize(("h", "hkv"), [(4, 4), (4, 2), (6, 2), (8, 1)], ids=lambda n: str(n))
@pytest.mark.parametrize(("t", "d"), [(1, 16), (9, 36), (33, 64)], ids=lambda n: str(n))
def test_output_and_gradients_agree_with_the_equations(t, d, h, hkv, packed):
    q, k, v = inputs(2, t, h, hkv, d)
    first_key = documents(2, t) if packed else None
    o = TORCH.attention(q, k, v, first_key)
    wanted = exact(q, k, v, first_key)
    assert (o.shape, o.dtype) == (q.shape, q.dtype)
    torch.testing.assert_close(o.double(), wanted, atol=2e-6, rtol=2e-6)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(o, (q, k, v), do)
    right = torch.autograd.grad(wanted, (q, k, v), do.double())
    for x, y in zip(got, right, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("d", "passed"), [(36, 40), (64, 64)])
def test_a_mask_on_a_gpu_is_given_what_the_memory_efficient_form_takes(monkeypatch, d, passed):
    """As many heads of keys as of queries, and head dims in multiples of 8. On the meta device, which is no CPU either."""
    given, sdpa = [], F.scaled_dot_product_attention

    def watched(q, k, v, **options):
        given.append((q.shape, k.shape, v.shape, options.get("enable_gqa", False)))
        return sdpa(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    q, k, v = (x.detach().to("meta") for x in inputs(2, 9, 4, 2, d))
    first_key = documents(2, 9).to("meta")
    assert TORCH.attention(q, k, v, first_key).shape == q.shape
    assert given == [((2, 4, 9, passed),) * 3 + (False,)]


@pytest.mark.parametrize(("h", "hkv", "d"), [(4, 2, 36), (4, 4, 20), (6, 2, 16)])
def test_the_form_of_a_gpu_computes_what_the_cpus_does(h, hkv, d):
    q, k, v = inputs(2, 9, h, hkv, d)
    position = torch.arange(9)
    mask = (position >= documents(2, 9).unsqueeze(-1)) & (position <= position.unsqueeze(-1))
    o = attention_op._masked_on_a_gpu(*(x.transpose(1, 2) for x in (q, k, v)), mask.unsqueeze(1)).transpose(1, 2)
    wanted = TORCH.attention(q, k, v, documents(2, 9))
    torch.testing.assert_close(o, wanted)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1))
    for x, y in zip(torch.autograd.grad(o, (q, k, v), do), torch.autograd.grad(wanted, (q, k, v), do), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("h", "hkv", "d"), [(4, 2, 36), (8, 2, 64), (4, 4, 20)])
def test_the_memory_efficient_form_serves_any_heads_with_a_mask(h, hkv, d, dtype):
    q, k, v = (x.detach().cuda().requires_grad_() for x in inputs(2, 33, h, hkv, d, dtype))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):  # and no other: where it can't serve, this raises
        o = TORCH.attention(q, k, v, documents(2, 33).cuda())
        o.sum().backward()
    wanted = exact(q.cpu(), k.cpu(), v.cpu(), documents(2, 33))
    assert (o.cpu().double() - wanted).norm() / wanted.norm() < (5e-3 if dtype == torch.bfloat16 else 1e-5)
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    q, k, v = inputs(dtype=dtype)
    o = TORCH.attention(q, k, v, documents(2, 9))
    assert o.dtype == dtype
    error = (o.double() - exact(q, k, v, documents(2, 9))).norm() / o.double().norm()
    assert error < {torch.bfloat16: 5e-3, torch.float16: 5e-4, torch.float64: 1e-14}[dtype]


def test_views_of_one_packed_product():
    packed = torch.randn(2, 9, (4 + 2 + 2) * 8, requires_grad=True)
    views = [x.unflatten(-1, (-1, 8)) for x in packed.split([32, 16, 16], dim=-1)]
    copies = [x.detach().contiguous() for x in views]
    assert torch.equal(TORCH.attention(*views), TORCH.attention(*copies))


@pytest.mark.parametrize("shape", [(0, 9), (2, 0)], ids=["no rows", "no tokens"])
def test_an_empty_batch_gives_empty_gradients(shape):
    q, k, v = inputs(*shape)
    o = TORCH.attention(q, k, v)
    assert o.shape == q.shape
    o.sum().backward()
    assert [x.grad.shape for x in (q, k, v)] == [x.shape for x in (q, k, v)]


def test_large_logits_do_not_overflow():
    q, k, v = inputs(dtype=torch.float16)
    o = TORCH.attention(q * 100, k * 100, v)
    assert o.isfinite().all()


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_as_one_graph(packed):
    q, k, v = inputs()
    first_key = documents(2, 9) if packed else None
    compiled = torch.compile(TORCH.attention, fullgraph=True, backend="aot_eager")
    o, wanted = compiled(q, k, v, first_key), TORCH.attention(q, k, v, first_key)
    torch.testing.assert_close(o, wanted)
    for x, y in zip(torch.autograd.grad(o.sum(), (q, k, v)), torch.autograd.grad(wanted.sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 9, 32)}, r"q has shape \(2, 9, 32\), wanted \(B, T, H, D\)"),
        ({"k": torch.zeros(2, 9, 3, 16), "v": torch.zeros(2, 9, 3, 16)}, "q has 4 heads, .* the 3 heads"),
        ({"k": torch.zeros(2, 8, 2, 16), "v": torch.zeros(2, 8, 2, 16)}, r"k has shape \(2, 8, 2, 16\)"),
        ({"v": torch.zeros(2, 9, 1, 16)}, r"v has shape \(2, 9, 1, 16\), wanted \(2, 9, 2, 16\)"),
        ({"k": torch.zeros(2, 9, 2, 16, dtype=torch.bfloat16)}, r"k has dtype torch\.bfloat16, wanted torch\.float32"),
        ({"q": torch.zeros(2, 9, 4, 16, dtype=torch.int64)}, r"q has dtype torch\.int64"),
        ({"first_key": torch.zeros(2, 8, dtype=torch.int32)}, r"first_key has shape \(2, 8\)"),
        ({"first_key": torch.zeros(2, 9, dtype=torch.int64)}, r"first_key has dtype torch\.int64"),
        ({"first_key": torch.zeros(2, 9, dtype=torch.int32, device="meta")}, "first_key is on meta, wanted cpu"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    arguments = {name: torch.zeros(2, 9, n, 16) for name, n in (("q", 4), ("k", 2), ("v", 2))}
    with pytest.raises(ValueError, match="attention: " + message):
        TORCH.attention(**arguments | change)
