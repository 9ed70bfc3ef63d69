"""config.json and generation_config.json of Hugging Face's Llama, both ways. Imports no torch, so that options are refused at once.

Written for transformers 4.4x and 5.x alike: RoPE is told as `rope_theta` and `rope_scaling`, and as `rope_parameters`.
"""

import math

from model.config import LlamaConfig

_LLAMA3 = {  # ours, theirs
    "rope_scaling_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_max_seq_len": "original_max_position_embeddings",
}
# What has to be so for the model to be this one; the value is also what it is where config.json says nothing.
_WANTED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}


def config_json(
    config: LlamaConfig, *, dtype: str, bos_id: int, end_ids: list[int], max_position_embeddings: int | None = None
) -> dict:
    """The content of config.json. dtype: of the weights beside it. end_ids: the tokens that end a text."""
    scaling = None
    if config.rope_scaling_factor != 1.0:
        scaling = {"rope_type": "llama3"} | {theirs: getattr(config, ours) for ours, theirs in _LLAMA3.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": max_position_embeddings or config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta} | (scaling or {}),
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": bos_id,
        "eos_token_id": _one_or_several(end_ids),
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def generation_config_json(*, bos_id: int, end_ids: list[int]) -> dict:
    """The content of generation_config.json. end_ids: the tokens that end a text, the first of which fills up shorter ones."""
    return {"bos_token_id": bos_id, "eos_token_id": _one_or_several(end_ids), "pad_token_id": end_ids[0]}


def shape_of(table: dict) -> dict:
    """The options of a model's shape that a config.json states, by the names of `LlamaConfig`'s fields.

    ValueError for another architecture, and for a Llama with what this one does not have: biases, other activations, other
    kinds of RoPE scaling, heads of another width than hidden_size / num_attention_heads.
    """
    _check_architecture(table)
    n_heads = _number(table, "num_attention_heads", int)
    shape = {
        "vocab_size": _number(table, "vocab_size", int),
        "dim": _number(table, "hidden_size", int),
        "ffn_dim": _number(table, "intermediate_size", int),
        "n_layers": _number(table, "num_hidden_layers", int),
        "n_heads": n_heads,
        "n_kv_heads": _number(table, "num_key_value_heads", int, default=n_heads),
        "max_seq_len": _number(table, "max_position_embeddings", int, default=2048),
        "norm_eps": _number(table, "rms_norm_eps", float, default=1e-6),
        "tie_embeddings": _tied(table),
    } | _rope(table)
    LlamaConfig(**shape).check()
    head_dim = _number(table, "head_dim", int, default=shape["dim"] // n_heads)
    if head_dim * n_heads != shape["dim"]:
        raise ValueError(
            f"head_dim is {head_dim} and hidden_size / num_attention_heads {shape['dim']} / {n_heads}; they must be equal"
        )
    return shape


def _check_architecture(table: dict) -> None:
    architectures, model_type = table.get("architectures"), table.get("model_type")
    if model_type != "llama" or architectures not in (None, ["LlamaForCausalLM"]):
        named = f"architectures {architectures}, model_type {model_type!r}"
        raise ValueError(f"{named}: only Llama is read (LlamaForCausalLM, 'llama')")
    for key, wanted in _WANTED.items():
        if table.get(key, wanted) != wanted:
            raise ValueError(f"{key} is {table[key]!r}; only {wanted!r} is read")


def _rope(table: dict) -> dict:
    """RoPE's options, which versions before 5 spell `rope_theta` and `rope_scaling`, and later ones `rope_parameters`."""
    new, old = table.get("rope_parameters"), table.get("rope_scaling")
    options = _rope_told(table, "rope_parameters" if new is not None else "rope_scaling")
    if new is not None and (old is not None or "rope_theta" in table):
        stated = _rope_told(table, "rope_scaling")
        if stated["rope_theta"] != options["rope_theta"] or (old is not None and stated != options):
            raise ValueError(
                f"rope_parameters {new} contradict rope_theta {stated['rope_theta']} and rope_scaling {old}"
            )
    return options


def _rope_told(table: dict, key: str) -> dict:
    """RoPE's options by one of the two spellings; what is not scaled has our defaults."""
    stated = {} if table.get(key) is None else table[key]
    if not isinstance(stated, dict):
        raise ValueError(f"{key} is {stated!r}, wanted an object")
    kind = stated.get("rope_type", stated.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{key} is of type {kind!r}; default and llama3 are read")
    if _number(stated, "partial_rotary_factor", float, default=1.0) != 1.0:
        raise ValueError(f"{key} turns a part of each head only (partial_rotary_factor); all of it is what is read")
    theta = _number(stated if "rope_theta" in stated else table, "rope_theta", float, default=10000.0)
    options = {"rope_theta": theta}
    for ours, theirs in _LLAMA3.items():
        default = getattr(LlamaConfig, ours)
        options[ours] = _number(stated, theirs, type(default)) if kind == "llama3" else default
    return options


def _tied(table: dict) -> bool:
    tied = table.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ValueError(f"tie_word_embeddings is {tied!r}, wanted true or false")
    return tied


def _one_or_several(ids: list[int]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else ids


def _number(table: dict, key: str, kind: type, default=None):
    value = default if table.get(key) is None else table[key]  # null is what is left to transformers
    if value is None:
        raise ValueError(f"{key} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        raise ValueError(f"{key} is {value!r}, wanted a{'n integer' if kind is int else ' number'}")
    if not math.isfinite(value):
        raise ValueError(f"{key} is {value!r}, wanted a finite number")
    return kind(value)
