"""Small random models as Hugging Face folders: what the tests of weights in and out share."""

import json
from functools import cache
from pathlib import Path

import torch

import kernels
from model import Llama, LlamaConfig, huggingface
from model.huggingface import config as huggingface_config
from model.huggingface import folder as huggingface_folder
from training.data.tokenizer import train_tokenizer

SHAPE = {"vocab_size": 300, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64, "ffn_dim": 96}
LLAMA3 = {"rope_theta": 500000.0, "rope_scaling_factor": 8.0, "rope_original_max_seq_len": 32}
N_CONTROL_AND_BYTES = 3 + 256
WORDS = "the cat sat on a mat while old dogs ran far away from home and birds sang loud songs over green hills"


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> Llama:
    """A model whose weights are large enough that its greedy text does not repeat one token."""
    config = LlamaConfig(**SHAPE | options)
    model = Llama(config, kernels.select("none", config.n_layers), dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 else 0.3 * noise)
        for matrix in {model.embedding, model.output}:
            matrix.weight[:N_CONTROL_AND_BYTES] *= (
                0.01  # hardly ever the likeliest: text of single bytes is hard to compare
            )
    model.refresh_compute_weights()
    return model


def canonical(model: Llama) -> dict[str, torch.Tensor]:
    """Its tensors by the names of Hugging Face."""
    return huggingface.unpack(model.config, {name: p.detach() for name, p in model.named_parameters()})


@cache
def tokenizer_model() -> bytes:
    """The bytes of a sentencepiece model of 300 tokens."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        train_tokenizer([WORDS] * 50, 300, path)
        return path.read_bytes()


def write_folder(
    path: Path, model: Llama, *, dtype: str = "float32", max_file_bytes: int = 10**9, tokenizer: bool = True, **changes
) -> Path:
    """A model as a Hugging Face folder. changes: keys of config.json with other values."""
    path.mkdir(parents=True, exist_ok=True)
    huggingface_folder.save(path, model.config, canonical(model), getattr(torch, dtype), max_file_bytes)
    table = huggingface_config.config_json(model.config, dtype=dtype, bos_id=1, end_ids=[1])
    (path / "config.json").write_text(json.dumps(table | changes))
    if tokenizer:
        (path / "tokenizer.model").write_bytes(tokenizer_model())
    return path
