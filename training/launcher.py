"""What a launcher (torchrun, or another that sets its variables) says of this process. Imports no torch."""

import os
from dataclasses import dataclass

from training.errors import UserError

ALL = "WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"


@dataclass(frozen=True)
class Launch:
    """One process among those that were started together: one, unless a launcher says otherwise."""

    rank: int = 0
    """In [0, size)."""
    size: int = 1
    local_rank: int = 0
    """Its number on its machine: which GPU it takes."""
    attempt: int = 0
    """How often torchrun has started them anew (--max-restarts)."""


def launch() -> Launch:
    """The launch that the environment describes. UserError, naming the variable, where it is described in part or wrongly."""
    named = [name for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK") if name in os.environ]
    if not named:
        return Launch()
    size = _number("WORLD_SIZE", named[0], 1)
    if size == 1:
        return Launch()
    rank, local_rank = (_number(name, "WORLD_SIZE", 0, size - 1) for name in ("RANK", "LOCAL_RANK"))
    _text("MASTER_ADDR", "WORLD_SIZE")
    _number("MASTER_PORT", "WORLD_SIZE", 1, 2**16 - 1)
    attempt = _number("TORCHELASTIC_RESTART_COUNT", "", 0) if "TORCHELASTIC_RESTART_COUNT" in os.environ else 0
    return Launch(rank, size, local_rank, attempt)


def speaks() -> bool:
    """Whether this process prints a mistake in the options, which every process makes: one of each machine does."""
    try:
        return launch().local_rank == 0
    except UserError:
        return True


def on_this_machine(size: int) -> int:
    """How many of so many processes run on this machine, as torchrun says; without it all."""
    return _number("LOCAL_WORLD_SIZE", "", 1, size) if "LOCAL_WORLD_SIZE" in os.environ else size


def shares(parallel: str, size: int) -> int:
    """Into how many shares --parallel cuts the model for so many processes."""
    return {"ddp": 1, "fsdp": size, "hsdp": on_this_machine(size)}[parallel]


def by_torchrun() -> bool:
    """Whether torchrun started this process. It hands on every signal that it gets, which may come here a second time."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _text(name: str, other: str) -> str:
    """The value of a variable that must be there, as `other` is."""
    if name not in os.environ:
        found = f"{other} is {os.environ[other]!r} and {name} is not set"
        raise UserError(f"{found}: set all of {ALL}, as torchrun does, or none of them for one process")
    return os.environ[name]


def _number(name: str, other: str, least: int, most: int | None = None) -> int:
    text = _text(name, other)
    if not text.isascii() or not text.isdigit() or int(text) < least or (most is not None and int(text) > most):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"{name} is {text!r}; it must be a whole number, {allowed}: torchrun sets it, with {ALL}")
    return int(text)
