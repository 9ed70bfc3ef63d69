"""What each op is given when it is measured, and what it must move and compute."""

from dataclasses import replace

import pytest
import torch

from bench.ops.attention import documents
from bench.ops.catalogue import SHEETS
from bench.ops.sizes import ALL_SIZES, cut, size
from kernels import TORCH
from model.config import PRESETS
from model.flops import Cost
from training.config import TrainConfig
from training.errors import UserError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
META = torch.device("meta")
SMALL = TrainConfig(max_seq_len=6, batch_size=2, dim=32, n_heads=4, n_kv_heads=2, ffn_dim=24, vocab_size=256)
POINTWISE = ["rms_norm", "add_rms_norm", "rope", "swiglu"]


def costs(op, dtype=torch.bfloat16):
    return SHEETS[op].case(SMALL, dtype, META).costs


# ------------------------------------------------------------------------------------------------------- bytes and FLOPs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", POINTWISE)
def test_bytes_are_those_of_the_tensors_that_are_read_and_written(op, dtype):
    case = SHEETS[op].case(SMALL, dtype, DEVICE)
    activations = [x for x in case.wanted if x.ndim > 1]  # a norm's weight is nothing beside them
    outputs = getattr(TORCH, op)(*case.arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    rstd = 4 * 12 if "norm" in op else 0
    tables = 2 * 6 * 4 * 4 if op == "rope" else 0
    untouched = 2 * outputs[2].nbytes if op == "rope" else 0  # v, which is neither read nor written
    assert case.costs["forward"].bytes == sum(x.nbytes for x in (*activations, *outputs)) + rstd + tables - untouched
    # Backward reads what was saved (x, the sum or the packed input; rope none) and the upstream gradients, and writes one gradient
    # for each input; but x and residual share theirs.
    saved = 0 if op == "rope" else activations[0].nbytes
    written = sum(x.nbytes for x in activations) // (2 if op == "add_rms_norm" else 1)
    assert case.costs["backward"].bytes == saved + sum(x.nbytes for x in outputs) + written + rstd + tables


def test_bytes_by_hand():
    # 12 tokens of width 32, two bytes each; 4 + 2 heads of 8; a feed-forward of 24
    assert {op: tuple((cost.bytes, cost.flops) for cost in costs(op).values()) for op in POINTWISE} == {
        "rms_norm": ((2 * 768 + 48, 0), (3 * 768 + 48, 0)),
        "add_rms_norm": ((4 * 768 + 48, 0), (4 * 768 + 48, 0)),
        "rope": ((2 * 12 * 6 * 8 * 2 + 192, 0), (2 * 12 * 8 * 8 * 2 + 192, 0)),
        "swiglu": ((3 * 12 * 24 * 2, 0), (5 * 12 * 24 * 2, 0)),
    }


def test_attention_by_hand():
    # 12 tokens, 4 query heads and 2 of keys of 8, two bytes each; the statistics are float32, one a token and head. The backward
    # has two launches: q, k, v, do are read by both, o by one; dq, dk, dv are written once.
    q, k, statistics = 12 * 4 * 8 * 2, 12 * 2 * 8 * 2, 12 * 4 * 4
    # Two products of 8 multiply-adds for each of 4 heads and of the 1 + 2 + ... + 6 visible pairs of each of two sequences.
    flops = 2 * 2 * 8 * 4 * (2 * 21)
    assert costs("attention") == {
        "forward": Cost(2 * q + 2 * k + statistics, flops),
        "backward": Cost((2 * 2 + 1 + 1) * q + (2 * 2 + 2) * k + 4 * statistics, 5 * flops // 2),
    }


def test_attention_of_a_token_reads_a_full_cache_once():
    # 2 sequences: 4 heads of 8 queried and written, 2 of keys and of values read at 6 places; two bytes each
    case = SHEETS["decode_attention"].case(SMALL, torch.bfloat16, META)
    assert case.costs == {"evaluation": Cost(2 * (2 * 2 * 4 * 8 + 2 * 2 * 2 * 6 * 8))}
    assert case.shape == "2 x (4 + 2 x 2 x 6) x 8"
    assert not case.wanted


def test_attention_of_packed_documents_counts_what_is_visible(monkeypatch):
    first_key = torch.tensor([[0, 0, 2, 2, 2, 5], [0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    monkeypatch.setattr("bench.ops.attention.documents", lambda batch, length: first_key)
    whole, packed = costs("attention"), costs("packed_attention")
    visible = (1 + 2) + (1 + 2 + 3) + 1 + 21
    assert packed["forward"] == Cost(whole["forward"].bytes + 12 * 4, 2 * 2 * 8 * 4 * visible)
    assert packed["backward"] == Cost(whole["backward"].bytes + 12 * 4, 5 * 2 * 8 * 4 * visible)


def test_the_loss_head_by_hand(monkeypatch):
    # 12 tokens in chunks of 8, width 32, 256 tokens in the vocabulary. Each of two chunks reads its hidden states and the whole
    # weight twice; logits are written, read once, written over and read twice; the second chunk also reads the weight's
    # gradient. Then both gradients are read in float32, and written in two bytes.
    monkeypatch.setattr("bench.ops.linear_cross_entropy.chunk_rows", lambda n_rows, vocab_size, element_size: 8)
    hidden, weight, logits = 12 * 32, 256 * 32, 12 * 256
    product = 2 * 12 * 32 * 256
    with_gradients = 2 * (2 * hidden + 4 * weight + 5 * logits) + 4 * (hidden + 3 * weight)
    assert costs("linear_cross_entropy") == {
        "evaluation": Cost(2 * (hidden + 2 * weight + 2 * logits), product),
        "both": Cost(with_gradients + (4 + 2) * (hidden + weight), 3 * product),
    }


def test_the_update_by_hand():
    # p, g, m, v read and p, m, v written in float32, and the matrices' copies in two bytes
    config = replace(SMALL, n_layers=1)
    matrices = 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 24 + 256 * 32
    case = SHEETS["adamw"].case(config, torch.bfloat16, META)
    assert case.costs == {"update": Cost(28 * (matrices + 3 * 32) + 2 * matrices)}
    assert case.keywords["n_decayed"] == matrices
    assert SHEETS["adamw"].case(config, torch.float32, META).costs == {"update": Cost(28 * (matrices + 3 * 32))}


# ----------------------------------------------------------------------------------------------------- sizes and layouts


def test_every_size_is_a_case_of_every_op():
    shapes = {
        name: {op: SHEETS[op].case(size(name), torch.bfloat16, META).shape for op in SHEETS} for name in ALL_SIZES
    }
    assert shapes["reference"]["rms_norm"] == "32768 x 288"
    assert shapes["reference"]["attention"] == "128 x 256 x (8 + 2 x 4) x 36"
    assert shapes["llama3.1-405b"]["add_rms_norm"] == "8192 x 16384"
    assert shapes["8192x2048"]["swiglu"] == "8192 x 2 x 2048"
    assert shapes["8192x2048"]["linear_cross_entropy"] == "8192 x 2048 x 128256"
    assert shapes["llama3.1-8b"]["rope"] == "8192 x (32 + 2 x 8) x 128"
    assert shapes["4x4096x128"]["attention"] == "4 x 4096 x (32 + 2 x 8) x 128"
    assert shapes["4x4096x64"]["packed_attention"] == "4 x 4096 x (32 + 2 x 8) x 64"
    assert shapes["124m"]["adamw"] == "123587328"


def test_sizes_of_an_op_are_sizes():
    assert {name for sheet in SHEETS.values() for name in sheet.sizes} == set(ALL_SIZES)
    assert all(set(PRESETS) <= set(SHEETS[op].sizes) for op in (*POINTWISE, "attention"))
    with pytest.raises(
        UserError, match=r"--preset is 'gpt2'; allowed: reference, .*, 8192x8192, 4x4096x128, 4x4096x64"
    ):
        size("gpt2")


def test_a_cut_size_keeps_its_widths():
    small = cut(size("llama3.1-8b"), 1024)
    assert (small.batch_size, small.max_seq_len, small.dim) == (1, 1024, 4096)
    assert cut(size("smoke"), 1024).batch_size == 8
    assert cut(size("smoke"), 100).max_seq_len == 100


@pytest.mark.parametrize("op", ["attention", "packed_attention"])
def test_queries_and_keys_are_slices_of_a_packed_product_and_leaves(op):
    q, k, *_ = SHEETS[op].case(SMALL, torch.float32, DEVICE).arguments
    assert q.stride() == k.stride() == (6 * 64, 64, 8, 1)
    assert q.is_leaf
    assert k.is_leaf


def test_sequences_are_packed_from_documents_of_an_eighth_in_the_mean():
    first_key = documents(16, 256)
    assert first_key.dtype == torch.int32
    assert torch.equal(first_key, documents(16, 256))
    position = torch.arange(256)
    assert ((first_key >= 0) & (first_key <= position)).all()
    assert (first_key.diff(dim=1) >= 0).all()
    assert [len(row.unique()) for row in first_key] == [8] * 16
    assert torch.equal(first_key.gather(1, first_key.long()), first_key)  # a document's first token is in it
    assert len({tuple(row.unique().tolist()) for row in first_key}) == 16
    assert documents(1, 2).tolist() == [[0, 1]]
