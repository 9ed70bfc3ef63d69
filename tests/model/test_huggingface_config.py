"""config.json both ways: what is written is read back, in the spelling of either major version, and what is no Llama is named."""

import json

import pytest

from model import LlamaConfig
from model.config import PRESETS
from model.huggingface.config import config_json, generation_config_json, shape_of

SHAPE = {"vocab_size": 300, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64, "ffn_dim": 96}


def written(**options) -> dict:
    return json.loads(json.dumps(config_json(LlamaConfig(**SHAPE | options), dtype="float32", bos_id=1, end_ids=[1])))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_read_back(preset):
    config = LlamaConfig(**PRESETS[preset])
    shape = shape_of(json.loads(json.dumps(config_json(config, dtype="bfloat16", bos_id=1, end_ids=[1]))))
    for name, value in shape.items():
        assert value == (config.hidden_dim if name == "ffn_dim" else getattr(config, name)), name


SCALED = {
    "rope_theta": 500000.0,
    "rope_scaling_factor": 32.0,
    "rope_low_freq_factor": 1.5,
    "rope_high_freq_factor": 3.0,
    "rope_original_max_seq_len": 16,
    "norm_eps": 1e-6,
    "tie_embeddings": False,
}


@pytest.mark.parametrize("options", [{}, SCALED, {"rope_theta": 12345.0}])
@pytest.mark.parametrize("left_out", [(), ("rope_scaling", "rope_theta"), ("rope_parameters",)])
def test_both_spellings_of_rope_are_read(options, left_out):
    table = {key: value for key, value in written(**options).items() if key not in left_out}
    assert LlamaConfig(**shape_of(table)) == LlamaConfig(**SHAPE | options)


def test_the_published_configuration_of_llama_3_2_is_its_preset():
    published = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    }
    assert LlamaConfig(**shape_of(published)) == LlamaConfig(**PRESETS["llama3.2-1b"] | {"max_seq_len": 131072})


def test_what_old_files_leave_out_is_as_transformers_has_it():
    table = written()
    for key in ("num_key_value_heads", "rope_theta", "rope_scaling", "rope_parameters", "head_dim", "rms_norm_eps"):
        del table[key]
    del table["tie_word_embeddings"], table["attention_bias"], table["mlp_bias"]
    shape = shape_of(table)
    assert (shape["n_kv_heads"], shape["rope_theta"], shape["norm_eps"]) == (4, 10000.0, 1e-6)
    assert shape["tie_embeddings"] is False
    assert shape_of(table | {"num_key_value_heads": None, "head_dim": None}) == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
            "'MistralForCausalLM'.*'mistral': only Llama",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": None}, "model_type None: only Llama"),
        ({"attention_bias": True}, "attention_bias is True; only False is read"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"head_dim": 16}, r"head_dim is 16 and hidden_size / num_attention_heads 32 / 4"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size is '32', wanted an integer"),
        ({"hidden_size": True}, "hidden_size is True, wanted an integer"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, wanted a finite number"),
        ({"num_key_value_heads": 3}, "--n-heads 4 is not divisible by --n-kv-heads 3"),
        ({"num_attention_heads": 0}, "--n-heads is 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', wanted true or false"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is of type 'linear'; default and llama3"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters is of type 'yarn'"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters .* contradict"),
        ({"rope_scaling": {"rope_type": "llama3"}, "rope_parameters": None}, "factor is missing"),
        ({"rope_scaling": 7}, "rope_scaling is 7, wanted an object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_what_is_no_such_llama_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        shape_of(written() | change)


def test_text_ends_at_the_token_that_ends_documents():
    assert generation_config_json(bos_id=5, end_ids=[7])["eos_token_id"] == 7
    assert generation_config_json(bos_id=5, end_ids=[7, 5])["eos_token_id"] == [7, 5]
    assert written()["eos_token_id"] == 1
