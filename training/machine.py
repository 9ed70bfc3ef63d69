"""What a run needs of its machine, asked for before anything is begun: memory for the model, a compiler for --compile.

Imports no torch: what runs out later is told by `out_of_memory_is_told`, which stands around a whole program.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from model import flops
from training.config import TrainConfig
from training.errors import UserError


def require_memory(config: TrainConfig, device, processes: int = 1, shares: int = 1) -> None:
    """UserError unless the device could hold what a step keeps of each parameter, were it empty and were that all.

    processes: how many share the memory, each with all of it or, with --parallel fsdp and hsdp, one of so many shares.
    """
    parameters = flops.parameters(config)
    # Parameter, gradient and moments in float32. AdamW has two moments, Muon one of most matrices.
    per_parameter = 4 + 4 + (8 if config.optimizer == "adamw" else 4)
    needed, there = parameters * per_parameter * processes // shares, memory_bytes(device)
    if there and needed > there:
        model = config.weights or config.model_name
        smaller = "take a smaller model"
        if config.init_from == "scratch":
            smaller = "choose a smaller --preset, or lower --n-layers, --dim or --vocab-size"
        raise UserError(
            f"the model ({model}) has {parameters:,} parameters, which with gradients and the optimizer's moments take "
            f"{needed / 2**30:,.1f} GiB{f' in {processes} processes' if processes > 1 else ''}, and {device} has "
            f"{there / 2**30:,.1f}; {smaller}"
        )
    # What a sample reads is whole on every process.
    whole = parameters * (4 if config.dtype == "float32" else 2)
    if shares > 1 and config.sample_tokens and there and needed + whole * processes > there:
        raise UserError(
            f"--sample-tokens is {config.sample_tokens}, and a sample needs the whole model on each process, {whole / 2**30:,.1f} "
            f"GiB beside its share, which {device} has no room for; say --sample-tokens 0, and generate from a checkpoint"
        )


def memory_bytes(device) -> int:
    """Bytes of memory of a `torch.device`: a GPU's, or this machine's or container's; 0 where the system does not say."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    sizes = []
    with contextlib.suppress(ValueError, OSError, AttributeError):  # Windows has no sysconf
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(ValueError, OSError):  # there is no such file, or it says "max"
            sizes.append(int(Path(limit).read_text()))
    return min(sizes, default=0)


def require_compiler(config: TrainConfig, device) -> None:
    """UserError where what the run compiles needs a compiler of C++ (a CPU) or of C (Triton, on a GPU) and there is none."""
    if device.type == "cpu":
        if config.compile and not _found("CXX", {"darwin": ["clang++"], "win32": ["cl"]}.get(sys.platform, ["g++"])):
            raise UserError(
                "--compile needs a C++ compiler, and g++ was not found; install one, name one by the variable CXX, "
                "or say --no-compile"
            )
    elif (config.compile or config.uses_triton()) and not _found("CC", ["gcc", "clang", "cl"]):
        raise UserError(
            "--compile and Triton's kernels need a C compiler, and neither gcc nor clang was found; install one, name one by "
            "the variable CC, or say --no-compile --kernels none"
        )


def _found(variable: str, names: list[str]) -> bool:
    """Whether the compiler that the variable names, or one of these, is there to be run."""
    return any(shutil.which(name) for name in ([os.environ[variable]] if os.environ.get(variable) else names))


@contextlib.contextmanager
def out_of_memory_is_told(advice: str) -> Iterator[None]:
    """UserError, with the advice, in place of what torch or Python raises where memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = " ".join(str(error).split())
        # torch has a class for a GPU's memory and none for a CPU's
        if not (
            isinstance(error, MemoryError)
            or type(error).__name__ == "OutOfMemoryError"
            or "can't allocate memory" in words
            or "not enough memory" in words
        ):
            raise
        raise UserError(f"out of memory: {words[:160]}; {advice}") from error
