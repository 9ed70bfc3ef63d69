"""Text from a checkpoint: `python generate.py out --prompt "def "`."""

import sys
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import tyro

from training.command_line import from_toml
from training.errors import UserError
from training.log.console import printable
from training.machine import out_of_memory_is_told
from training.stopping import exit_statuses


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
    """Seed of the random draws."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype, as in training."""

    def check(self) -> None:
        """Raise UserError, naming the option, what was found and what is allowed."""
        for name in ("max_new_tokens", "temperature", "top_k", "seed"):
            value = getattr(self, name)
            if not (0 <= value < 2**63):
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 0, and finite")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}; it must be more than 0 and at most 1")


def main() -> None:
    """Parse the command line and print the text. A user's mistake is one line on stderr and exit status 2."""
    with exit_statuses(), out_of_memory_is_told("lower --max-new-tokens, or take --device cpu"):
        config = tyro.cli(GenerateConfig, description=GenerateConfig.__doc__)
        config.check()
        print(printable(generate(config), sys.stdout.encoding or "utf-8"))


def generate(config: GenerateConfig) -> str:
    """The prompt and its continuation. UserError for a checkpoint that is not there or damaged, or a prompt too long."""
    import kernels
    from model import Llama, generation, huggingface
    from training.checkpoint import files as checkpoint
    from training.data.tokenizer import tokenizer_of
    from training.device import resolve_device, resolve_dtype

    saved = checkpoint.load(config.checkpoint, config.which)
    run = from_toml(saved.config_toml, str(saved.path / "config.toml"))
    # Decoding uses the torch twins: a row of one token is no work for a kernel.
    run = replace(run, device=config.device, dtype=config.dtype, fused=False, kernels="", wandb_log=False)
    run.check()
    device = resolve_device(run)
    with device:
        model = Llama(run.shape(), kernels.select("none", run.n_layers), resolve_dtype(run, device))
    model.load_state_dict(huggingface.pack(run.shape(), saved.tensors("model")), strict=True)
    model.refresh_compute_weights()
    tokenizer = tokenizer_of(saved.tokenizer_name, saved.tokenizer, run.document_token)
    prompt = [tokenizer.bos_id, *tokenizer.encode(config.prompt)]
    try:
        new = generation.generate(
            model,
            prompt,
            config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
            stop_token=tokenizer.bos_id,
        )
    except ValueError as error:
        raise UserError(f"--prompt: {error}") from None
    return tokenizer.decode(prompt[1:] + new)


if __name__ == "__main__":
    main()
