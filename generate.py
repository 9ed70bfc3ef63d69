"""Text from a checkpoint: `python generate.py out --prompt "def "`."""

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from training.config import fail
from training.errors import UserError


@dataclass(kw_only=True)
class GenerateConfig:
    """Continue a prompt with a trained model."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")] = "out"
    """A run's folder, or one checkpoint in it such as out/step-00000400."""
    which: str = "last"
    """Checkpoint of a run's folder: last, best, or its name."""
    prompt: str = ""
    """Text to continue; empty: from the start of a document."""
    max_new_tokens: int = 200
    """Tokens to add, at most; the sequence ends at the model's max_seq_len."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token every time."""
    top_k: int = 0
    """Draw from the likeliest k tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    seed: int = 1337
    """Of the draw."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""
    dtype: str = "auto"
    """Compute dtype: auto, float32, bfloat16 or float16."""


def main() -> None:
    """Parse the command line and print the text."""
    config = tyro.cli(GenerateConfig, description=GenerateConfig.__doc__)
    try:
        print(generate(config))
    except UserError as error:
        fail(error)


def generate(config: GenerateConfig) -> str:
    """The prompt and its continuation. UserError for a checkpoint that is not there or damaged, or options out of range."""
    from dataclasses import replace

    import torch

    import kernels
    from model import Llama, generation, huggingface
    from training import checkpoint
    from training.config import from_toml
    from training.device import DTYPES, resolve_device, resolve_dtype
    from training.tokenizer import Tokenizer

    if config.dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype is {config.dtype!r}; allowed: auto, {', '.join(DTYPES)}")
    saved = checkpoint.load(config.checkpoint, config.which)
    run = from_toml(saved.config_toml, str(saved.path / "config.toml"))
    # Decoding uses the torch twins: a row of one token is no work for a kernel.
    run = replace(run, device=config.device, dtype=config.dtype, fused=False, kernels="")
    device = resolve_device(run)
    with device:
        model = Llama(run.shape(), kernels.select("none", run.n_layers), resolve_dtype(run, device))
    model.load_state_dict(huggingface.pack(run.shape(), saved.tensors("model")), strict=True)
    model.refresh_compute_weights()
    tokenizer = Tokenizer.from_bytes(saved.tokenizer)
    prompt = [tokenizer.bos_id, *tokenizer.encode(config.prompt)]
    sampling = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p, "seed": config.seed}
    try:
        with torch.inference_mode():
            new = generation.generate(model, prompt, config.max_new_tokens, stop_token=tokenizer.bos_id, **sampling)
    except ValueError as error:
        raise UserError(error) from None
    return tokenizer.decode(prompt[1:] + new)


if __name__ == "__main__":
    sys.exit(main())
