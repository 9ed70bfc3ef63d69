"""Attention of one query a sequence over a cache: against float64, and bits that depend on a sequence's own keys alone."""

import pytest
import torch

import kernels
from kernels.attention import decode
from kernels.attention.decode import (
    SPLIT_KEYS,
    combine_launch,
    decode_attention_torch,
    decode_attention_triton,
    decode_launch,
)
from kernels.attention.op import attention_torch
from kernels.launch import TARGETS, Target
from tests.support import kernel_testing as kt

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def name(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def counts(*n):
    return torch.tensor(n, dtype=torch.int32, device=kt.DEVICE)


def case(batch, slots, q_heads, k_heads, head_dim, dtype=FP32, layout="heads first"):
    """A query a sequence, keys and values; heads first: as the model's cache lies, with the slots of a head side by side."""
    q = kt.tensor(batch, q_heads, head_dim, dtype=dtype)
    caches = [kt.tensor(batch, slots, k_heads, head_dim, dtype=dtype, seed=i) for i in (1, 2)]
    if layout == "heads first":
        return q, *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in caches)
    place = kt.LAYOUTS[layout]
    return place(q), *map(place, caches)


def attend(op, n_keys):
    return lambda q, k, v: op(q, k, v, n_keys)


def assert_agrees(inputs, n_keys):
    exact, _ = kt.run(attend(decode_attention_torch, n_keys), kt.double(inputs))
    twin, _ = kt.run(attend(decode_attention_torch, n_keys), inputs)
    with kt.poisoned():
        actual, _ = kt.run(attend(decode_attention_triton, n_keys), inputs)
    kt.assert_matches(actual[0], twin[0], exact[0])


# Not the full product: each ratio of heads, dtype, layout and place of the last key among blocks and splits appears.
GRID = [
    # sequences' keys, room, heads of q, of k and v, head dim, dtype, layout
    ((1,), 1, 1, 1, 16, FP32, "dense"),  # the narrowest head, one key
    ((256, 1), 256, 8, 4, 36, FP32, "heads first"),  # the reference: tiles of 32 + 16, two splits
    ((129, 128, 127), 200, 4, 1, 36, FP16, "heads first"),  # either side of a split
    ((64, 63), 100, 8, 1, 64, FP16, "strided"),  # the largest group; one split
    ((33, 31), 40, 2, 2, 20, FP32, "transposed"),  # nothing dense: copies
    ((300,), 300, 6, 2, 80, BF16, "heads first"),  # tiles of 64 + 16, three queries a group, three splits
    ((5, 150), 160, 2, 1, 128, FP16, "dense"),
    ((140,), 140, 1, 1, 256, FP32, "dense"),  # the widest head
    ((30,), 40, 34, 2, 16, FP32, "dense"),  # a group of 17: two tiles' worth of rows
    ((140,), 150, 21, 1, 16, FP16, "heads first"),  # more heads than one program combines
]


@pytest.mark.parametrize(("n", "slots", "q_heads", "k_heads", "head_dim", "dtype", "layout"), GRID, ids=name)
def test_is_as_exact_as_torch_and_close_to_float64(n, slots, q_heads, k_heads, head_dim, dtype, layout):
    assert_agrees(case(len(n), slots, q_heads, k_heads, head_dim, dtype, layout), counts(*n))


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", range(16, 257, 4))
def test_every_head_dim(head_dim):
    assert_agrees(case(1, 150, 2, 1, head_dim), counts(140))


@pytest.mark.parametrize("twin", [decode_attention_torch, decode_attention_triton])
def test_is_the_last_row_of_causal_attention(twin):
    n, slots = (5, 20), 24
    q, k, v = case(2, slots, 4, 2, 36)
    o = twin(q, k, v, counts(*n))
    for b, count in enumerate(n):
        queries = torch.zeros(1, count, 4, 36, device=kt.DEVICE)
        queries[:, -1] = q[b]
        wanted = attention_torch(queries, k[b : b + 1, :count], v[b : b + 1, :count])[:, -1]
        torch.testing.assert_close(o[b : b + 1], wanted)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=name)
def test_a_query_that_sees_one_key_returns_its_value_to_the_bit(dtype):
    q, k, v = case(2, 150, 4, 2, 36, dtype)
    assert torch.equal(decode_attention_triton(q * 100, k, v, counts(1, 1)), v[:, 0].repeat_interleave(2, dim=1))


@pytest.mark.parametrize(("dtype", "scale"), [(FP32, 1e4), (FP16, 100), (BF16, 1e4)], ids=name)
def test_scores_past_the_range_of_exp_do_not_overflow(dtype, scale):
    q, k, v = case(1, 150, 2, 1, 36, dtype)
    inputs = (q * scale, k * scale, v)
    exact, _ = kt.run(attend(decode_attention_torch, counts(150)), kt.double(inputs))
    assert kt.relative_rms(decode_attention_triton(*inputs, counts(150)), exact[0]) < 1e-2


# ------------------------------------------------------------------------------------ what a sequence's bits depend on


@pytest.mark.parametrize("n", [3, 64, 128, 129, 200])
def test_neither_other_sequences_nor_more_room_change_a_bit(n):
    q, k, v = case(3, 300, 4, 2, 36, FP16)
    together = decode_attention_triton(q, k, v, counts(250, n, 1))
    alone = [x[1:2] for x in (q, k, v)]
    for slots in {n, n + 1, 300}:
        with kt.poisoned():
            by_itself = decode_attention_triton(alone[0], alone[1][:, :slots], alone[2][:, :slots], counts(n))
        kt.assert_same_bits([by_itself], [together[1:2]])


def test_a_run_repeats_to_the_last_bit():
    inputs = case(2, 300, 4, 1, 36, FP16)
    kt.assert_same_bits(*([decode_attention_triton(*inputs, counts(290, 7))] for _ in range(2)))


@pytest.mark.parametrize("slots", [100, 300])
def test_what_lies_behind_the_last_key_is_never_loaded(slots):
    q, k, v = case(2, slots, 2, 1, 16)
    n_keys = counts(70, 3)
    clean = decode_attention_triton(q, k, v, n_keys)
    for b, n in enumerate(n_keys.tolist()):
        k[b, n:] = v[b, n:] = torch.nan
    kt.assert_same_bits([decode_attention_triton(q, k, v, n_keys)], [clean])


@pytest.mark.parametrize("slots", [20, 300])
def test_counts_out_of_range_read_nothing_out_of_bounds_and_make_no_nan(slots):
    around = [torch.full((4, slots, 1, 16), torch.nan, device=kt.DEVICE) for _ in range(2)]
    q, k, v = case(2, slots, 2, 1, 16)
    for x, cache in zip(around, (k, v), strict=True):
        x[1:3] = cache
    broken, in_range = counts(10_000, -10_000), counts(slots, 0)
    o = [decode_attention_triton(q, around[0][1:3], around[1][1:3], n) for n in (broken, in_range)]
    kt.assert_same_bits(o[:1], o[1:])
    assert o[0].isfinite().all()
    assert not o[0][1].any()


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "slot", "head"])
def test_offsets_past_two_to_the_31_elements_do_not_wrap(dim):
    shape = [2, 2, 2, 16]
    shape[dim] = 3
    near = [kt.tensor(*shape, dtype=FP16, seed=i) for i in range(2)]
    far = [kt.far_apart(x.movedim(dim, 0)).movedim(0, dim) for x in near]
    q = kt.tensor(shape[0], shape[2], 16, dtype=FP16, seed=2)
    n_keys = counts(*[shape[1]] * shape[0])
    kt.assert_same_bits(*([decode_attention_triton(q, *cache, n_keys)] for cache in (near, far)))


@pytest.mark.parametrize("shape", [(0, 2, 36), (2, 0, 36)])
def test_an_empty_query_gives_an_empty_output(shape):
    k = kt.tensor(shape[0], 5, 2, 36)
    for twin in (decode_attention_torch, decode_attention_triton):
        assert twin(kt.tensor(*shape), k, k, counts(*[1] * shape[0])).shape == shape


# --------------------------------------------------------------------------------------------- launches, compilation


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_split_is_whole_blocks_that_fit_into_shared_memory(target: Target, itemsize):
    for head_dim in range(16, 257, 4):
        tiles = decode_launch(1, 8, 4, head_dim, 3, itemsize, target).tiles
        assert SPLIT_KEYS % tiles["BLOCK_N"] == 0
        width = tiles["BLOCK_D"] + tiles["BLOCK_D2"]
        assert 4 * tiles["BLOCK_N"] * width * itemsize <= target.shared_memory


def test_the_launch_depends_on_shapes_and_the_room_alone(monkeypatch):
    """So that a captured one serves for any number of keys."""
    launches = []

    def recorded(make):
        return lambda *arguments: launches.append(make(*arguments)) or launches[-1]

    monkeypatch.setattr(decode, "decode_launch", recorded(decode_launch))
    monkeypatch.setattr(decode, "combine_launch", recorded(combine_launch))
    inputs = case(2, 300, 4, 2, 36)
    for n in (counts(1, 1), counts(300, 300)):
        decode_attention_triton(*inputs, n)
    assert launches[:2] == launches[2:]
    assert launches[0].grid == (2 * 2 * 3,)


@pytest.mark.parametrize("slots", [100, 300])
def test_compiles_into_one_graph(slots):
    inputs = [*case(2, slots, 2, 1, 36), counts(40, slots)]
    kt.assert_compiles(decode_attention_triton, [inputs], "aot_eager", False, exact=True)


def test_the_registered_op_keeps_pytorchs_rules():
    inputs = (*case(2, 140, 2, 1, 36), counts(9, 140))
    torch.library.opcheck(torch.ops.triton_llama.decode_attention.default, inputs)


# ------------------------------------------------------------------------------------------------- the switch, refusals


def test_it_is_turned_by_the_switch_attention():
    for spec, triton in (("attention", True), ("all", True), ("all,-attention", False), ("rope", False)):
        ops = kernels.select(spec, 1)[0]
        assert ops.decode_attention is (decode_attention_triton if triton else decode_attention_torch)
    assert kernels.TORCH.decode_attention is decode_attention_torch
    assert kernels.TRITON.decode_attention is decode_attention_triton


def zeros(*shape, **options):
    return torch.zeros(shape, **{"device": kt.DEVICE} | options)


@pytest.mark.parametrize("twin", [decode_attention_torch, decode_attention_triton])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": zeros(2, 1, 4, 16)}, r"q has shape \(2, 1, 4, 16\), wanted \(B, H, D\)"),
        ({"k_cache": zeros(2, 9, 3, 16), "v_cache": zeros(2, 9, 3, 16)}, "q has 4 heads, .* the 3 heads"),
        ({"k_cache": zeros(3, 9, 2, 16)}, r"k_cache has shape \(3, 9, 2, 16\), wanted \(2, T, Hkv, 16\)"),
        ({"k_cache": zeros(2, 0, 2, 16), "v_cache": zeros(2, 0, 2, 16)}, "k_cache has room for 0 keys"),
        ({"v_cache": zeros(2, 9, 1, 16)}, r"v_cache has shape \(2, 9, 1, 16\), wanted \(2, 9, 2, 16\)"),
        ({"k_cache": zeros(2, 9, 2, 16, dtype=BF16)}, r"k_cache has dtype torch\.bfloat16, wanted torch\.float32"),
        ({"n_keys": zeros(2, dtype=torch.int64)}, r"n_keys has dtype torch\.int64, wanted torch\.int32"),
        ({"n_keys": zeros(3, dtype=torch.int32)}, r"n_keys has shape \(3\), wanted \(2\)|n_keys has shape \(3,\)"),
        ({"n_keys": zeros(2, dtype=torch.int32, device="meta")}, "n_keys is on meta"),
        ({"n_keys": 9}, "n_keys is a int, wanted a tensor"),
        ({"v_cache": zeros(2, 9, 2, 16, requires_grad=True)}, r"v_cache requires a gradient, .* torch\.no_grad"),
    ],
)
def test_bad_input_is_refused_before_any_launch(twin, change, message):
    arguments = {"q": zeros(2, 4, 16), "k_cache": zeros(2, 9, 2, 16), "v_cache": zeros(2, 9, 2, 16)}
    with pytest.raises(ValueError, match="decode_attention: " + message):
        twin(**arguments | {"n_keys": counts(9, 9)} | change)


@pytest.mark.parametrize("head_dim", [0, 4, 18, 260])
def test_head_dims_without_a_tile_are_refused(head_dim):
    x = zeros(1, 2, 1, head_dim)
    with pytest.raises(ValueError, match=f"q has head dim {head_dim}, wanted a multiple of 4 from 16 to 256"):
        decode_attention_triton(x[:, 0], x, x, counts(2))
