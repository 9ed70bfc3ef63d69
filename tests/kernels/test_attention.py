import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.attention import backward as attention_backward
from kernels.attention import forward as attention_forward
from kernels.attention.op import attention_torch, attention_triton
from kernels.attention.tiles import Tile
from tests.support import kernel_testing as kt

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def documents(*lengths):
    """First keys, one row of a batch, of documents of these lengths one after the other."""
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    return starts.repeat_interleave(torch.tensor(lengths)).int()


def window(time, width):
    return (torch.arange(time) - width + 1).clamp(min=0).int()


def batch_of(*rows):
    return torch.stack(rows).to(kt.DEVICE)


def attend(op, first_key):
    return lambda q, k, v: op(q, k, v, first_key)


def case(batch, time, q_heads, k_heads, head_dim, dtype=FP32, layout="packed"):
    """q, k and v that require a gradient; packed: slices of one tensor."""
    heads = (q_heads, k_heads, k_heads)
    if layout == "packed":
        packed = kt.tensor(batch, time, sum(heads) * head_dim, dtype=dtype)
        views = packed.split([n * head_dim for n in heads], dim=-1)
        return kt.differentiable(*(x.unflatten(-1, (-1, head_dim)) for x in views))
    place = kt.LAYOUTS[layout]
    return kt.differentiable(
        *(place(kt.tensor(batch, time, n, head_dim, dtype=dtype, seed=i)) for i, n in enumerate(heads))
    )


def gradient_of(q, layout="dense"):
    return [kt.LAYOUTS[layout](kt.tensor(*q.shape, dtype=q.dtype, seed=9))]


def assert_agrees(inputs, upstream, first_key):
    """Output and gradients, each by the two rules."""
    exact, exact_grads = kt.run(attend(attention_torch, first_key), kt.double(inputs), kt.double(upstream))
    twin, twin_grads = kt.run(attend(attention_torch, first_key), inputs, upstream)
    with kt.poisoned():
        actual, grads = kt.run(attend(attention_triton, first_key), inputs, upstream)
    kt.assert_matches(actual[0], twin[0], exact[0])
    for a, t, e in zip(grads, twin_grads, exact_grads, strict=True):
        kt.assert_matches(a, t, e, backward=True)


MASKS = {
    "causal": None,
    "ends on block edges": lambda time: documents(64, 64, time - 128),
    "ends off block edges": lambda time: documents(5, 1, 40, 37, time - 83),
    "single tokens": lambda time: documents(*[1] * (time - 20), 20),
    "window 7": lambda time: window(time, 7),
    "window 100": lambda time: window(time, 100),
    "window 150": lambda time: window(
        time, 150
    ),  # blocks that it cuts, blocks it does not, blocks that the diagonal cuts
}

# Not the full product: each time, ratio of heads, mask and layout appears, and each pair that could interact.
GRID = [
    # batch, time, heads of q, of k and v, head dim, dtype, mask, layout of q, k, v, of the upstream gradient
    (2, 2, 2, 1, 16, FP32, "causal", "packed", "dense"),  # the narrowest head
    (1, 63, 2, 2, 36, FP16, "causal", "packed", "dense"),  # the reference head: tiles of 32 + 16
    (1, 64, 8, 1, 64, FP32, "window 7", "dense", "expanded"),  # the largest group
    (2, 65, 2, 2, 20, FP16, "causal", "strided", "transposed"),  # one row past a block
    (1, 65, 1, 1, 128, FP32, "window 7", "transposed", "dense"),  # nothing dense: copies
    (1, 127, 2, 1, 96, FP16, "window 100", "packed", "strided"),  # tiles of 64 + 32
    (1, 129, 4, 1, 36, FP32, "ends off block edges", "packed", "expanded"),
    (1, 129, 2, 2, 80, BF16, "ends on block edges", "dense", "transposed"),  # tiles of 64 + 16
    (2, 129, 2, 1, 64, FP16, "single tokens", "packed", "dense"),
    (1, 256, 2, 1, 36, BF16, "causal", "packed", "dense"),  # the reference's length
    (1, 256, 1, 1, 64, FP32, "window 150", "strided", "dense"),
    (1, 256, 2, 1, 44, FP16, "ends off block edges", "dense", "dense"),
    (1, 66, 1, 1, 256, FP32, "causal", "packed", "dense"),  # the widest head
    (1, 66, 1, 1, 200, FP16, "window 7", "packed", "dense"),
]
SLOW_GRID = [
    (1, 1000, 2, 1, 36, FP32, "causal", "packed", "dense"),
    (2, 1000, 2, 2, 64, FP16, "ends off block edges", "packed", "transposed"),
    (1, 1000, 2, 1, 128, BF16, "window 100", "packed", "dense"),
    (1, 1000, 8, 1, 96, FP16, "window 7", "strided", "dense"),
    (1, 129, 8, 2, 128, FP32, "ends on block edges", "packed", "dense"),
    (1, 256, 8, 8, 36, FP16, "causal", "packed", "dense"),
    (1, 129, 3, 1, 192, BF16, "ends off block edges", "packed", "expanded"),
]


def name(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@pytest.mark.parametrize(
    ("batch", "time", "q_heads", "k_heads", "head_dim", "dtype", "mask", "layout", "upstream_layout"),
    GRID + [pytest.param(*row, marks=pytest.mark.slow) for row in SLOW_GRID],
    ids=name,
)
def test_is_as_exact_as_torch_and_close_to_float64(
    batch, time, q_heads, k_heads, head_dim, dtype, mask, layout, upstream_layout
):
    inputs = case(batch, time, q_heads, k_heads, head_dim, dtype, layout)
    first_key = None
    if MASKS[mask]:  # another one for each row of the batch
        first_key = batch_of(*[MASKS[mask](time), window(time, 50)][:batch])
    assert_agrees(inputs, gradient_of(inputs[0], upstream_layout), first_key)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", range(16, 257, 4))
def test_every_head_dim(head_dim):
    inputs, first_key = case(1, 65, 1, 1, head_dim, FP32), batch_of(window(65, 40))
    upstream = gradient_of(inputs[0])
    exact, exact_grads = kt.run(attend(attention_torch, first_key), kt.double(inputs), kt.double(upstream))
    with kt.poisoned():
        actual, grads = kt.run(attend(attention_triton, first_key), inputs, upstream)
    # By the RMS alone: the largest of few errors depends on the order of NumPy's sums, whose dots of wide heads are not
    # as good as torch's.
    for a, e in zip(actual + grads, exact + exact_grads, strict=True):
        assert kt.relative_rms(a, e) <= kt.RELATIVE_RMS[FP32]


# ------------------------------------------------------------------------------------------------------- tiles and grids


@pytest.fixture
def tiles(monkeypatch):
    """Sets the tile of all three kernels."""

    def set_to(*tile):
        for module in (attention_forward, attention_backward):
            monkeypatch.setattr(module, "tile_of", lambda *_: Tile(*tile))

    return set_to


@pytest.mark.parametrize("mask", ["causal", "documents", "window"])
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (16, 64), (64, 16), (32, 128)])
def test_blocks_of_queries_and_of_keys_may_have_any_sizes(tiles, block_m, block_n, mask):
    tiles(block_m, block_n, 4, 1)
    inputs = case(1, 70, 1, 1, 16)
    first_key = {"causal": None, "documents": documents(3, 13, 16, 1, 30, 7), "window": window(70, 40)}[mask]
    assert_agrees(inputs, gradient_of(inputs[0]), None if first_key is None else batch_of(first_key))


@pytest.mark.parametrize("at_once", [1, 3, 5])
def test_every_block_of_every_head_is_done_however_many_heads_share_the_cache(tiles, monkeypatch, at_once):
    tiles(16, 16, 4, 1)
    for module in (attention_forward, attention_backward):
        monkeypatch.setattr(module, "heads_in_cache", lambda *_: at_once)
    inputs = case(2, 20, 4, 2, 16)
    assert_agrees(inputs, gradient_of(inputs[0]), None)


@pytest.fixture
def multiprocessors(monkeypatch):
    """Sets how many multiprocessors the launches are chosen for."""

    def set_to(n):
        target_of = attention_backward.target_of
        monkeypatch.setattr(attention_backward, "target_of", lambda x: replace(target_of(x), multiprocessors=n))

    return set_to


@pytest.mark.parametrize(("n", "dtype"), [(3, FP32), (1000, FP32), (1000, FP16)], ids=["3 shares", "6 shares", "half"])
def test_a_group_that_is_split_adds_up_to_the_same_gradients(multiprocessors, n, dtype):
    multiprocessors(n)
    inputs = case(1, 60, 6, 1, 16, dtype)
    assert_agrees(inputs, gradient_of(inputs[0]), batch_of(window(60, 25)))


# -------------------------------------------------------------------------------------------------------- what is visible


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=name)
@pytest.mark.parametrize("scale", [1, 100])
def test_a_query_that_sees_one_key_returns_its_value_to_the_bit(dtype, scale):
    q, k, v = (kt.tensor(2, 70, n, 36, dtype=dtype, seed=i, scale=scale) for i, n in enumerate((4, 2, 2)))
    own = torch.arange(70, dtype=torch.int32, device=kt.DEVICE).expand(2, 70)
    values = v.repeat_interleave(2, dim=2)
    assert torch.equal(attention_triton(q, k, v, own), values)
    assert torch.equal(attention_triton(q, k, v)[:, 0], values[:, 0])


@pytest.mark.parametrize("time", [1, 40])
def test_a_token_alone_passes_its_gradient_to_its_value_and_nothing_to_query_and_key(time):
    own = torch.arange(time, dtype=torch.int32, device=kt.DEVICE).expand(2, time)
    q, k, v = case(2, time, 4, 2, 36)
    upstream = gradient_of(q)
    _, (dq, dk, dv) = kt.run(attend(attention_triton, own), (q, k, v), upstream)
    torch.testing.assert_close(dv, upstream[0].unflatten(2, (2, 2)).sum(3), rtol=0, atol=1e-6)
    for gradient in (dq, dk):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-5)


def test_equal_scores_give_the_mean_of_the_visible_values():
    q, k, v = case(1, 130, 1, 1, 16)
    seen = torch.arange(1, 131, device=kt.DEVICE)[None, :, None, None]
    for same in (torch.zeros_like(k), torch.full_like(k, 1e4)):
        o = attention_triton(torch.ones_like(q), same, v)
        torch.testing.assert_close(o, v.cumsum(1) / seen, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "scale"), [(FP32, 1e4), (FP16, 100), (BF16, 1e4)], ids=name)
def test_scores_past_the_range_of_exp_do_not_overflow(dtype, scale):
    q, k, v = case(1, 70, 2, 1, 36, dtype)
    inputs = kt.differentiable(q * scale, k * scale, v)
    upstream = gradient_of(q)
    exact, _ = kt.run(attention_torch, kt.double(inputs))
    actual, grads = kt.run(attention_triton, inputs, upstream)
    assert kt.relative_rms(actual[0], exact[0]) < 1e-2  # one key takes all: what is left is the rounding of near ties
    assert all(x.isfinite().all() for x in grads)


def test_blocks_that_no_query_sees_are_never_loaded():
    first_key = batch_of(documents(128, 128))
    inputs = case(1, 256, 2, 1, 16, layout="dense")
    upstream = gradient_of(inputs[0])
    clean, clean_grads = kt.run(attend(attention_triton, first_key), inputs, upstream)
    for poisoned, other in ((slice(0, 128), slice(128, 256)), (slice(128, 256), slice(0, 128))):
        nan_inputs = [x.detach().clone().requires_grad_() for x in inputs]
        nan_upstream = [upstream[0].clone()]
        with torch.no_grad():
            for x in (*nan_inputs, *nan_upstream):
                x[:, poisoned] = torch.nan
        actual, grads = kt.run(attend(attention_triton, first_key), nan_inputs, nan_upstream)
        for a, b in zip(actual + grads, clean + clean_grads, strict=True):
            kt.assert_same_bits([a[:, other]], [b[:, other]])
            assert a[:, poisoned].isnan().all()


BROKEN = {
    "nothing visible": torch.full((100,), 10_000),
    "negative": torch.full((100,), -10_000),
    "one past the query": torch.arange(100) + 1,
    "decreasing": torch.arange(100).flip(0),
    "random": torch.randint(-200, 400, (100,), generator=torch.Generator().manual_seed(0)),
    # Queries that saw nothing are in the middle of what the keys' side takes for a range that sees all of a block.
    "nothing visible in between": torch.tensor([0] * 65 + [10_000] * 63 + [0] * 128),
}


@pytest.mark.parametrize("which", BROKEN)
def test_a_first_key_that_breaks_its_contract_reads_nothing_out_of_bounds_and_makes_no_nan(which):
    first_key = batch_of(BROKEN[which].int())

    def within_nan(x):
        around = torch.full((3, *x.shape[1:]), torch.nan, device=x.device)
        around[1] = x
        return around[1:2]

    inputs = kt.differentiable(*(within_nan(x.detach()) for x in case(1, first_key.shape[1], 2, 1, 16)))
    upstream = [within_nan(x) for x in gradient_of(inputs[0])]
    with kt.poisoned():
        actual, grads = kt.run(attend(attention_triton, first_key), inputs, upstream)
    assert all(x.isfinite().all() for x in actual + grads)
    if which == "nothing visible":
        assert not any(x.any() for x in actual + grads)


# ------------------------------------------------------------------------------------------- strides, gradients, offsets


def test_one_first_key_for_all_rows_need_not_be_repeated_in_memory():
    q, k, v = case(2, 70, 2, 1, 16)
    one = batch_of(window(70, 9))
    shared = attention_triton(q, k, v, one.expand(2, 70))
    assert torch.equal(shared, attention_triton(q, k, v, one.repeat(2, 1)))
    transposed = torch.stack([one[0], one[0]], dim=1).T
    assert torch.equal(shared, attention_triton(q, k, v, transposed))


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 0, 0)])
def test_only_the_inputs_that_want_a_gradient_get_one(wanted):
    inputs = [x.detach().requires_grad_(bool(want)) for x, want in zip(case(1, 20, 2, 1, 36), wanted, strict=True)]
    upstream = gradient_of(inputs[0])
    _, twin = kt.run(attention_torch, inputs, upstream)
    _, grads = kt.run(attention_triton, inputs, upstream)
    assert len(grads) == sum(wanted)
    for a, t in zip(grads, twin, strict=True):
        torch.testing.assert_close(a, t)


@pytest.mark.parametrize("shape", [(0, 5, 2, 36), (2, 0, 2, 36), (2, 5, 0, 36)])
def test_an_empty_input_gives_an_empty_output_and_zero_gradients(shape):
    q, upstream = kt.tensor(*shape), [kt.tensor(*shape)]
    k = kt.tensor(*shape[:2], 2, 36)
    first_key = torch.zeros(shape[:2], dtype=torch.int32, device=kt.DEVICE)
    with kt.poisoned():
        actual, grads = kt.run(attend(attention_triton, first_key), kt.differentiable(q, k, k.clone()), upstream)
    assert actual[0].shape == shape
    assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]
    assert not any(x.any() for x in grads)


def test_a_run_repeats_to_the_last_bit(multiprocessors):
    multiprocessors(1000)
    inputs = case(1, 80, 4, 1, 36, FP16)
    upstream, first_key = gradient_of(inputs[0]), batch_of(documents(30, 50))
    first, second = (kt.run(attend(attention_triton, first_key), inputs, upstream) for _ in range(2))
    kt.assert_same_bits(first[0] + first[1], second[0] + second[1])


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "time", "head"])
def test_offsets_past_two_to_the_31_elements_do_not_wrap(dim):
    shapes = [[2, 2, 3, 16] for _ in range(3)]
    for shape in shapes:
        shape[dim] = 3
    near = [kt.tensor(*shape, dtype=FP16, seed=i) for i, shape in enumerate((*shapes, shapes[0]))]
    results = []
    for q, k, v, do in (near, [kt.far_apart(x.movedim(dim, 0)).movedim(0, dim) for x in near]):
        results.append(kt.run(attention_triton, kt.differentiable(q, k, v), [do]))
    kt.assert_same_bits(results[0][0] + results[0][1], results[1][0] + results[1][1])


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(1, 2),
    time=st.integers(1, 70),
    k_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim=st.integers(4, 12).map(lambda n: 4 * n),
    gap=st.integers(0, 9),
    dtype=st.sampled_from([FP32, FP16]),
    lengths=st.none() | st.lists(st.integers(1, 30), min_size=70, max_size=70),
)
def test_any_shape_strides_and_documents_agree_with_torch(batch, time, k_heads, group, head_dim, gap, dtype, lengths):
    def gapped(heads, seed):
        return kt.tensor(batch, time + 1, heads, head_dim + gap, dtype=dtype, seed=seed)[:, 1:, :, gap:]

    first_key = None if lengths is None else documents(*lengths)[:time].expand(batch, time).to(kt.DEVICE)
    inputs = kt.differentiable(gapped(k_heads * group, 0), gapped(k_heads, 1), gapped(k_heads, 2))
    upstream = [gapped(k_heads * group, 3)]
    twin, twin_grads = kt.run(attend(attention_torch, first_key), inputs, upstream)
    with kt.poisoned():
        actual, grads = kt.run(attend(attention_triton, first_key), inputs, upstream)
    tolerance = {"rtol": 1e-4, "atol": 2e-5} if dtype == FP32 else {"rtol": 1e-2, "atol": 1e-2}
    for a, t in zip(actual + grads, twin + twin_grads, strict=True):
        torch.testing.assert_close(a, t, **tolerance)


# --------------------------------------------------------------------------------------------- compilation, registration


def masked(op):
    """q, k, v and first_key, as an op of four tensors that `kt.run` can call."""
    return lambda q, k, v, first_key=None: op(q, k, v, first_key)


def compile_case(time, with_first_key=True):
    inputs = case(1, time, 2, 1, 36)
    return [*inputs, batch_of(window(time, 9))] if with_first_key else inputs


# Two lengths for one graph: PyTorch makes a graph of its own where a size is 1, and at other lengths, on a GPU, the number of
# blocks is. These two have two blocks of 32 each.
LENGTHS = (40, 60)


@pytest.mark.parametrize("with_first_key", [False, True], ids=["causal", "first_key"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_into_one_graph(dynamic, with_first_key):
    cases = [compile_case(time, with_first_key) for time in (LENGTHS if dynamic else LENGTHS[:1])]
    kt.assert_compiles(masked(attention_triton), cases, "aot_eager", dynamic, exact=True)


@pytest.mark.slow
def test_inductor_compiles_it_into_one_graph():
    cases = [compile_case(time) for time in LENGTHS]
    kt.assert_compiles(masked(attention_triton), cases, "inductor", True, exact=False)


@pytest.mark.parametrize("with_first_key", [False, True], ids=["causal", "first_key"])
def test_the_registered_ops_keep_pytorchs_rules(with_first_key):
    ops = torch.ops.triton_llama
    q, k, v = case(1, 9, 2, 1, 36)
    first_key = batch_of(window(9, 3)) if with_first_key else None
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.attention.default, (q, k, v, first_key), test_utils=checks)
    q, k, v = (x.detach() for x in (q, k, v))
    o, lse = ops.attention(q, k, v, first_key)
    torch.library.opcheck(ops.attention_backward.default, (torch.ones_like(o), q, k, v, o, lse, first_key, None, None))


def test_the_saved_log_sum_exp_is_that_of_the_scaled_scores_in_base_2():
    q, k, v = (x.detach() for x in case(1, 70, 2, 1, 36))
    _, lse = torch.ops.triton_llama.attention(q, k, v, None)
    scores = torch.einsum("bihd,bjd->bhij", q.double(), k[:, :, 0].double()) / 6
    scores.masked_fill_(torch.ones(70, 70, device=kt.DEVICE).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1) / math.log(2), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- refusals


def zeros(*shape, **options):
    return torch.zeros(shape, **{"device": kt.DEVICE} | options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": zeros(2, 9, 32)}, r"q has shape \(2, 9, 32\), wanted \(B, T, H, D\)"),
        ({"k": zeros(2, 9, 3, 16), "v": zeros(2, 9, 3, 16)}, "q has 4 heads, .* the 3 heads"),
        ({"v": zeros(2, 9, 1, 16)}, r"v has shape \(2, 9, 1, 16\), wanted \(2, 9, 2, 16\)"),
        ({"k": zeros(2, 9, 2, 16, dtype=BF16)}, r"k has dtype torch\.bfloat16, wanted torch\.float32"),
        ({"q": zeros(2, 9, 4, 16, dtype=torch.float64)}, r"q has dtype torch\.float64, wanted torch\.float32 or"),
        ({"first_key": zeros(2, 9, dtype=torch.int64)}, r"first_key has dtype torch\.int64, wanted torch\.int32"),
        ({"first_key": zeros(2, 9, dtype=torch.int32, device="meta")}, "first_key is on meta"),
        ({"v": [0.0]}, "v is a list, wanted a tensor"),
    ],
)
def test_bad_input_is_refused_before_any_launch(change, message):
    arguments = {"q": zeros(2, 9, 4, 16), "k": zeros(2, 9, 2, 16), "v": zeros(2, 9, 2, 16)}
    with pytest.raises(ValueError, match="attention: " + message):
        attention_triton(**arguments | change)


@pytest.mark.parametrize("head_dim", [0, 4, 12, 18, 258, 260])
def test_head_dims_without_a_tile_are_refused(head_dim):
    x = zeros(1, 2, 1, head_dim)
    with pytest.raises(ValueError, match=f"q has head dim {head_dim}, wanted a multiple of 4 from 16 to 256"):
        attention_triton(x, x, x)
