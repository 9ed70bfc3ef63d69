"""The device of a run, its compute dtype, the kernels that can run there, and whether it repeats itself to the bit."""

import os
import random
from dataclasses import replace

import numpy as np
import torch

from training.config import TrainConfig, kernels_refused, other_way, why_no_kernels
from training.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(config: TrainConfig, local_rank: int = 0) -> torch.device:
    """The device that --device asks for. UserError where it is not there, or where --kernels asks for what can't run."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device.startswith("cuda") and not gpus:
        raise UserError(
            f"--device is {config.device}, and PyTorch {torch.__version__} finds no GPU; allowed here: auto, cpu"
        )
    if config.device == "cpu" or not gpus:
        reason = why_no_kernels(config, has_gpu=False)
        if reason and config.insists_on_kernels():
            raise kernels_refused(config, reason)
        return torch.device("cpu")
    _, _, number = config.device.partition(":")
    index = int(number) if number else local_rank
    if index >= gpus:
        raise UserError(
            f"--device is {config.device}: there is no cuda:{index}; this machine has {gpus} GPUs, from cuda:0"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def resolve_kernels(config: TrainConfig, device: torch.device) -> tuple[TrainConfig, str]:
    """The configuration with the kernels that can run on the device, and what to say where those of --fused can't.

    --fused is a wish: without a GPU, or without Triton, the plain twins train in place of the kernels. What is saved with the run
    is the configuration as it was asked for, so that the same run resumed on a GPU uses them.
    """
    reason = why_no_kernels(config, has_gpu=device.type == "cuda")
    if not (reason and config.uses_triton()):
        if config.parallel == "ddp" or "adamw" not in config.switches():
            return config, ""
        without = replace(config, kernels=f"{config.kernels},-adamw".removeprefix(","))
        return without, f"--fused: with --parallel {config.parallel} torch's AdamW updates each process's share"
    note = f"--fused: {reason}, so plain PyTorch trains in place of the Triton kernels; {other_way(reason)}"
    return replace(config, fused=False, kernels="none"), note


def resolve_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The compute dtype that --dtype asks for. UserError where the device does not have it."""
    if config.dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        # is_bf16_supported would also say yes where bfloat16 is emulated
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    dtype = DTYPES[config.dtype]
    try:
        if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
            raise RuntimeError("its compute capability is under 8.0")
        x = torch.ones(8, 8, dtype=dtype, device=device)
        torch.nn.functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])
        (x @ x).sum().item()
    except RuntimeError as error:
        allowed = ", ".join(name for name in DTYPES if name != config.dtype)
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--dtype is {config.dtype}, which {device} does not have ({reason}); try one of {allowed}"
        ) from None
    return dtype


def set_determinism(deterministic: bool) -> None:
    """Make equal inputs give equal bits, or lift that. Before the first use of a GPU."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(deterministic)
    # The switch also fills fresh memory, a debugging aid that would write every buffer twice.
    torch.utils.deterministic.fill_uninitialized_memory = False


def name_of(device: torch.device) -> str:
    """What the device is called in the log: the GPU's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def seed_run(seed: int) -> None:
    """Seed every global generator: what a run draws from any of them is then a function of its options."""
    random.seed(seed)
    np.random.seed(np.random.SeedSequence(seed).generate_state(4))
    torch.manual_seed(seed)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make what a step draws (dropout) a function of these alone, as its batch is: any step can be replayed."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1)))
