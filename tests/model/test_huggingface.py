"""Names and packing of weights in and out."""

import pytest
import torch

import kernels
from model import Llama, LlamaConfig, huggingface

TINY = LlamaConfig(vocab_size=300, max_seq_len=16, dim=32, n_layers=2, n_heads=4, n_kv_heads=2)


def weights(tie=True):
    config = LlamaConfig(**vars(TINY) | {"tie_embeddings": tie})
    model = Llama(config, kernels.select("none", 2))
    return config, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_packing_undoes_unpacking_to_the_bit(tie):
    config, ours = weights(tie)
    back = huggingface.pack(config, huggingface.unpack(config, ours))
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)


def test_names_and_shapes_are_those_of_hugging_face():
    config, ours = weights(tie=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in huggingface.unpack(config, ours).items()}
    assert shapes.pop("model.embed_tokens.weight") == shapes.pop("lm_head.weight") == (300, 32)
    assert shapes.pop("model.norm.weight") == (32,)
    for i in range(2):
        layer = f"model.layers.{i}."
        assert (
            shapes.pop(layer + "self_attn.q_proj.weight") == shapes.pop(layer + "self_attn.o_proj.weight") == (32, 32)
        )
        assert (
            shapes.pop(layer + "self_attn.k_proj.weight") == shapes.pop(layer + "self_attn.v_proj.weight") == (16, 32)
        )
        assert shapes.pop(layer + "mlp.gate_proj.weight") == shapes.pop(layer + "mlp.up_proj.weight") == (96, 32)
        assert shapes.pop(layer + "mlp.down_proj.weight") == (32, 96)
        assert (
            shapes.pop(layer + "input_layernorm.weight")
            == shapes.pop(layer + "post_attention_layernorm.weight")
            == (32,)
        )
    assert not shapes


def test_parts_are_the_rows_in_order():
    config, ours = weights()
    theirs = huggingface.unpack(config, ours)
    packed = ours["layers.1.wqkv.weight"]
    assert torch.equal(theirs["model.layers.1.self_attn.k_proj.weight"], packed[32:48])
    assert torch.equal(theirs["model.layers.0.mlp.up_proj.weight"], ours["layers.0.w_gate_up.weight"][96:])


def test_tensors_that_do_not_fit_are_named():
    config, ours = weights()
    theirs = huggingface.unpack(config, ours)
    theirs["lm_head.weight"] = theirs.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"missing model\.norm\.weight; not part of it lm_head\.weight"):
        huggingface.pack(config, theirs)
