"""The embedding: values by row, gradients as exact sums however often a token occurs, and nothing out of bounds."""

import pytest
import torch
import torch.nn.functional as F

from kernels.embedding import SEGMENT, embedding_torch, embedding_triton, join_launch, segment_launch
from kernels.launch import TARGETS
from tests.support import kernel_testing as kt

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
both_twins = pytest.mark.parametrize("op", [embedding_torch, embedding_triton], ids=["torch", "triton"])


def draw(kind, n, v, seed=0):
    """Tokens (n,) of a vocabulary of v."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "one":
        tokens = torch.full((n,), v // 2)
    elif kind == "each once":
        tokens = torch.randperm(v, generator=generator)[:n]
    elif kind == "of text":  # a few are frequent, most are rare
        tokens = (v ** torch.rand(n, generator=generator)).long() - 1
    else:
        tokens = torch.randint(v, (n,), generator=generator)
    return tokens.to(kt.DEVICE)


def table(v, d, dtype=FP32):
    return kt.tensor(v, d, dtype=dtype, seed=1).requires_grad_()


def assert_sums(gradient, tokens, upstream):
    """The gradient against sums in float64, by how many rows each has: of a token that does not occur it is exactly 0."""
    wanted = torch.zeros_like(gradient, dtype=torch.float64)
    wanted.index_add_(0, tokens.flatten(), upstream.double().flatten(0, -2))
    count = torch.bincount(tokens.flatten(), minlength=len(gradient))
    assert ((gradient - wanted).abs().amax(1) <= 5e-6 * count.sqrt()).all()


GRID = [
    # tokens, how they repeat, V, D, dtype of x, layout of the upstream gradient
    (1, "random", 1, 1, FP32, "dense"),  # the least there is
    (31, "one", 3, 36, FP32, "dense"),  # less than a segment
    (32, "one", 3, 36, FP16, "dense"),
    (33, "one", 3, 36, FP32, "transposed"),  # a segment and one position of the next
    (300, "one", 2, 5, FP16, "strided"),
    (300, "each once", 300, 36, FP32, "expanded"),
    (64, "each once", 5000, 33, BF16, "dense"),
    (150, "of text", 64, 288, FP16, "dense"),
    (150, "of text", 64, 288, BF16, "transposed"),
    (97, "random", 5, 100, FP32, "strided"),
    (70, "random", 40_000, 24, FP16, "expanded"),  # keys of four bytes
    (40, "random", 3, 1030, FP32, "dense"),  # more columns than a tile
]


@pytest.mark.parametrize(("n", "kind", "v", "d", "dtype", "layout"), GRID, ids=str)
def test_rows_are_those_of_the_tokens_and_gradients_are_their_sums(n, kind, v, d, dtype, layout):
    tokens, weight = draw(kind, n, v), table(v, d)
    upstream = kt.LAYOUTS[layout](kt.tensor(n, d, dtype=dtype, seed=2))
    before = upstream.clone()
    with kt.poisoned():
        x = embedding_triton(tokens, weight, dtype)
        (gradient,) = torch.autograd.grad(x, weight, upstream)
    twin = embedding_torch(tokens, weight, dtype)
    if dtype == BF16:  # the interpreter's stores cut off where a GPU's round
        torch.testing.assert_close(x, twin, rtol=2**-7, atol=0)
    else:
        assert torch.equal(x, twin)
    assert x.dtype == dtype
    assert gradient.dtype == FP32
    assert torch.equal(upstream, before)
    assert_sums(gradient, tokens, upstream)


@both_twins
@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_the_gradient_has_the_dtype_of_the_weight(op, dtype):
    tokens, weight = draw("of text", 70, 9), table(9, 20, dtype)
    x = op(tokens, weight)
    assert x.dtype == dtype
    (gradient,) = torch.autograd.grad(x, weight, torch.ones_like(x))
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient[:, 0], torch.bincount(tokens, minlength=9).to(dtype))


def test_the_copy_is_read_and_the_sum_of_gradients_is_added_to():
    tokens, weight = draw("of text", 100, 12).view(4, 25), table(12, 20)
    unread = torch.full_like(weight, torch.nan).requires_grad_()
    before = kt.tensor(12, 20, seed=5)
    total, upstream = before.clone(), kt.tensor(4, 25, 20, dtype=FP16, seed=2)
    copy = weight.detach().half()
    for _ in range(2):
        x = embedding_triton(tokens, unread, FP16, copy, total)
        x.backward(upstream)
    assert torch.equal(x, embedding_torch(tokens, weight, FP16))
    assert unread.grad is None
    assert_sums((total - before) / 2, tokens, upstream)


def test_the_same_bits_each_time_and_with_a_sum_of_gradients():
    tokens, weight = draw("of text", 200, 20), table(20, 36)
    upstream = kt.tensor(200, 36, seed=3)
    first, second = (torch.autograd.grad(embedding_triton(tokens, weight), weight, upstream) for _ in range(2))
    total = torch.zeros_like(weight)
    embedding_triton(tokens, weight, gradient_sum=total).backward(upstream)
    kt.assert_same_bits(first, second)
    kt.assert_same_bits(first, [total])


def test_tokens_past_the_table_make_their_rows_nan_and_add_to_nothing():
    tokens, weight = draw("random", 80, 10), table(10, 36)
    bad = torch.tensor([0, 17, 40, 79], device=kt.DEVICE)
    wrong = tokens.index_copy(0, bad, torch.tensor([10, -1, 2**40, -(2**33)], device=kt.DEVICE))
    upstream = kt.tensor(80, 36, seed=4)
    x = embedding_triton(wrong, weight)
    (gradient,) = torch.autograd.grad(x, weight, upstream)
    good = (wrong == tokens).unsqueeze(1)
    assert x[bad].isnan().all()
    assert torch.equal(x.where(good, 0.0), embedding_torch(tokens, weight).where(good, 0.0))
    assert_sums(gradient, tokens, upstream * good)


def test_a_gradient_that_is_not_finite_stays_with_its_token():
    tokens, weight = draw("of text", 90, 8), table(8, 20)
    upstream = kt.tensor(90, 20, seed=4)
    upstream[tokens == 3] = torch.inf
    (gradient,) = torch.autograd.grad(embedding_triton(tokens, weight), weight, upstream)
    assert gradient[3].isinf().all()
    assert gradient[torch.arange(8, device=kt.DEVICE) != 3].isfinite().all()


@both_twins
@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 3, 4), ()], ids=str)
def test_tokens_of_any_shape(op, shape):
    tokens, weight = torch.ones(shape, dtype=torch.int64, device=kt.DEVICE), table(5, 8)
    x = op(tokens, weight)
    assert x.shape == (*shape, 8)
    (gradient,) = torch.autograd.grad(x, weight, torch.ones_like(x))
    assert gradient.sum() == 8 * tokens.numel()


@both_twins
def test_strided_tokens_and_tables(op):
    tokens, weight = draw("random", 60, 9), table(9, 20)
    wide = torch.stack([tokens, tokens + 100], 1)[:, 0].view(12, 5)
    for layout in (kt.strided, kt.transposed):
        other = layout(weight.detach()).requires_grad_()
        upstream = kt.tensor(12, 5, 20, seed=3)
        (gradient,) = torch.autograd.grad(op(wide, other), other, upstream)
        assert torch.equal(op(wide, other), weight[wide])
        assert_sums(gradient, wide, upstream)


def test_offsets_past_two_to_the_31_elements_do_not_wrap():
    tokens, weight = torch.tensor([2, 0, 1, 2], device=kt.DEVICE), kt.far_apart(kt.tensor(3, 36, dtype=FP16))
    assert torch.equal(embedding_triton(tokens, weight), weight.clone()[tokens])
    near, order = kt.tensor(3, 36, dtype=FP16, seed=1), torch.tensor([1, 0, 1], device=kt.DEVICE)
    (far, wanted) = (
        torch.autograd.grad(embedding_triton(order, leaf), leaf, dx)[0]
        for dx, leaf in ((kt.far_apart(near), table(2, 36, FP16)), (near, table(2, 36, FP16)))
    )
    assert torch.equal(far, wanted)


def test_no_program_has_many_rows_and_the_last_sum_many_at_a_time():
    target = TARGETS["sm_90"]
    for width in (1, 36, 288, 768, 2048, 8192):
        launch = segment_launch(32768, width, target)
        assert launch.tiles["SEGMENT"] == SEGMENT
        assert launch.tiles["BLOCK_M"] * launch.tiles["BLOCK_D"] <= 16 * 32 * launch.num_warps
        segments = 32768 // SEGMENT  # were all tokens one
        assert segments / join_launch(32768, width, target).tiles["BLOCK_M"] <= 16


@both_twins
def test_a_second_derivative_is_right_or_raises(op):
    tokens, weight = draw("random", 9, 5), table(5, 8)
    loss = op(tokens, weight).square().sum()
    if op is embedding_triton:
        with pytest.raises(RuntimeError, match="embedding: its gradient cannot be differentiated again"):
            torch.autograd.grad(loss, weight, create_graph=True)
    else:
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), weight)
        torch.testing.assert_close(second, 2 * torch.bincount(tokens, minlength=5)[:, None].expand(5, 8).float())


def case(rows):
    return draw("of text", 3 * rows, 12).view(rows, 3), table(12, 20)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@both_twins
def test_compiles_into_one_graph(op, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (20, 31):
        tokens, weight = case(rows)
        results = []
        for function in (op, compiled):
            total = torch.zeros_like(weight)
            weight.grad = None
            x = function(tokens, weight, FP16, weight.detach().half(), total)
            x.backward(torch.ones_like(x))
            results.append((x.detach(), total if weight.grad is None else weight.grad))
        kt.assert_same_bits(*results)
        assert results[0][1].sum() == 20 * 3 * rows


@pytest.mark.slow
@both_twins
def test_inductor_compiles_it_into_one_graph(op):
    tokens, weight = case(20)
    kt.assert_compiles(lambda w: op(tokens, w), [(weight,)], "inductor", dynamic=False, exact=False)


def test_the_registered_ops_keep_pytorchs_rules():
    tokens, weight = case(4)
    ops = torch.ops.triton_llama
    torch.library.opcheck(ops.embedding.default, (tokens, weight.detach(), FP16))
    total = torch.zeros_like(weight.detach())
    torch.library.opcheck(ops.add_embedding_gradient.default, (kt.tensor(4, 3, 20, dtype=FP16), tokens, total))


def test_float64_is_for_the_reference_only():
    tokens, weight = case(2)
    assert torch.equal(embedding_torch(tokens, weight.double()), F.embedding(tokens, weight.double()))
    with pytest.raises(ValueError, match=r"embedding: weight has dtype torch\.float64"):
        embedding_triton(tokens, weight.double())


@both_twins
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(3, dtype=torch.int32)}, "tokens has dtype torch.int32, wanted torch.int64"),
        ({"tokens": [1, 2]}, "tokens is a list"),
        ({"weight": torch.zeros(5)}, r"weight has shape \(5,\), wanted \(V, D\)"),
        ({"weight": torch.zeros(5, 4, dtype=torch.int64)}, "weight has dtype torch.int64"),
        ({"weight": torch.zeros(5, 4, device="meta")}, "weight is on meta, wanted cpu"),
        ({"dtype": torch.int64}, "dtype is torch.int64, wanted torch.float32"),
        ({"compute_weight": torch.zeros(5, 4)}, "compute_weight has dtype torch.float32, wanted torch.float16"),
        ({"compute_weight": torch.zeros(4, 4, dtype=FP16)}, r"compute_weight has shape \(4, 4\), wanted \(5, 4\)"),
        ({"gradient_sum": torch.zeros(5, 4, dtype=FP16)}, "gradient_sum has dtype torch.float16"),
        ({"gradient_sum": torch.zeros(4, 5).T}, r"gradient_sum has strides \(1, 5\), wanted a dense tensor"),
    ],
)
def test_bad_input_is_refused_by_name(op, change, message):
    arguments = {"tokens": torch.zeros(3, dtype=torch.int64), "weight": torch.zeros(5, 4), "dtype": FP16}
    with pytest.raises(ValueError, match="embedding: " + message):
        op(**arguments | change)


@pytest.mark.parametrize("n", [SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT, 3 * SEGMENT + 1])
def test_what_the_second_launch_reads_the_first_has_written(n):
    tokens, weight = draw("one", n, 4), table(4, 8)
    with kt.poisoned():
        (gradient,) = torch.autograd.grad(embedding_triton(tokens, weight), weight, torch.ones(n, 8, device=kt.DEVICE))
    assert (gradient[2] == n).all()
