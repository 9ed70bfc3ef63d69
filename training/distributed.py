"""One process or many: who this one is, and sums over all of them. torchrun sets the environment; without it there is one."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from training.config import TrainConfig
from training.errors import UserError


@dataclass(frozen=True)
class World:
    """One process among all: rank in [0, size), local_rank on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes the logs and the checkpoints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> None:
        """Replace the tensor, in place, by its sum over all processes. The order of the sum is fixed."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether `flag` holds in any process."""
        return self.total(int(flag), device) > 0

    def total(self, count: int, device: torch.device) -> int:
        """Sum of a count over all processes."""
        if self.size == 1:
            return count
        total = torch.tensor(count, device=device)
        dist.all_reduce(total)
        return int(total)

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block first, the others after it: they find on the disk what it has made there."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()


def join(config: TrainConfig) -> World:
    """The world that torchrun describes. UserError unless the micro-steps of a step divide evenly among its processes."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    if config.gradient_accumulation_steps % size:
        raise UserError(
            f"--gradient-accumulation-steps {config.gradient_accumulation_steps} is not divisible by the {size} processes "
            "that share them"
        )
    dist.init_process_group("nccl" if config.device != "cpu" and torch.cuda.is_available() else "gloo")
    return World(dist.get_rank(), size, int(os.environ["LOCAL_RANK"]))


def leave(world: World) -> None:
    """Close what `join` opened."""
    if world.size > 1:
        dist.destroy_process_group()
