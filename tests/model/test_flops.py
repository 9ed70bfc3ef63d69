"""The closed forms of model/flops.py against PyTorch's own counter and against a small case counted by hand."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
from model import Llama, LlamaConfig
from model.config import preset
from model.flops import flops_per_token, matmul_parameters, parameters, step_costs
from training.step.flat import FlatParameters

TINY = LlamaConfig(vocab_size=512, max_seq_len=64, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_matrix_products_agree_with_the_flop_counter(tie, dtype):
    config = dataclasses.replace(TINY, tie_embeddings=tie)
    model = Llama(config, kernels.select("none", 2), dtype)
    tokens = torch.zeros(3, 64, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    counted = {str(op).removeprefix("aten."): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in counted.items() if op in ("mm", "addmm", "bmm"))
    assert products == 3 * 64 * 6 * matmul_parameters(config)


def test_the_flop_counter_sees_the_products_of_a_training_step_too():
    model = Llama(TINY, kernels.select("none", 2), torch.bfloat16)
    tokens = torch.zeros(3, 64, dtype=torch.int64)
    counted = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            model(tokens, tokens).backward()
        counted.append(counter.get_total_flops())
        FlatParameters(model)  # from here on products add to its gradients
    assert counted[0] == counted[1] > 0


def test_attention_term_agrees_with_the_flop_counter():
    # The counter recomputes the scores in a flash backward (5 products to the forward's 2); ours is 2 and 4.
    q = torch.zeros(1, 4, 64, 16, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        scores = q @ q.transpose(2, 3)
        (scores @ q).sum().backward()
    per_token = counter.get_total_flops() / 64
    assert flops_per_token(TINY) - 6 * matmul_parameters(TINY) == TINY.n_layers * per_token


def test_reference_counts_by_hand():
    config = preset("reference")
    layer = 288 * 576 + 288 * 288 + 3 * 288 * 768  # wqkv (8 + 4 + 4 heads of 36), wo, gate, up and down
    assert matmul_parameters(config) == 8 * layer + 4096 * 288
    assert parameters(config) == 8_483_616
    assert flops_per_token(config) == 6 * (8 * layer + 4096 * 288) + 12 * 8 * 8 * 36 * 256
    assert flops_per_token(config, 128) < flops_per_token(config)


def test_costs_of_a_step_by_hand():
    config = LlamaConfig(vocab_size=256, max_seq_len=4, dim=8, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=16)
    costs = step_costs(config, micro_batch=2, micro_steps=3, activation_bytes=2)
    m = 8  # tokens of a micro-step
    assert costs["swiglu"].bytes == 3 * m * (32 + 16 + 16 + 32 + 32) * 2
    assert costs["rope"].bytes == 3 * m * 2 * (8 + 4) * 2  # attention's backward turns the gradients back
    assert costs["rms_norm"].bytes == 3 * m * 8 * 2 * (5 + 2 * 8)
    shapes = [(8, 16), (8, 8), (8, 32), (16, 8)]  # wqkv, wo, w_gate_up, w_down
    by_hand = 0
    for i, o in shapes:
        forward = (m * i + i * o + m * o) * 2
        gradient_of_input = (m * o + i * o + m * i) * 2
        gradient_of_weight = (m * o + m * i) * 2 + i * o * (4 + 4)  # the float32 gradient is read and written
        by_hand += forward + gradient_of_input + gradient_of_weight
    assert costs["linear"].bytes == 3 * by_hand
    assert costs["optimizer"].bytes == 7 * 4 * parameters(config) + 2 * (8 * 16 + 8 * 8 + 8 * 32 + 16 * 8 + 256 * 8)
    assert costs["linear"].flops + costs["linear_cross_entropy"].flops == 3 * m * 6 * matmul_parameters(config)
    total = sum(cost.flops for cost in costs.values())
    assert total == 3 * m * flops_per_token(config)


def test_bytes_grow_with_the_work_and_shrink_with_the_dtype():
    def total(**kwargs):
        settings = {"micro_batch": 4, "micro_steps": 2, "activation_bytes": 2} | kwargs
        return sum(cost.bytes for cost in step_costs(TINY, **settings).values())

    assert total(activation_bytes=4) > total() < total(micro_batch=8)
    optimizer = step_costs(TINY, 4, 2)["optimizer"].bytes
    assert total(micro_steps=4) - total() == total() - optimizer
