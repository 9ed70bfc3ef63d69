"""Steps of a sharded model in many processes on this machine, joined by gloo; and the same steps in one.

`steps(cases, size)` starts the processes once and returns what process 0 found in each case, parameters and gradients whole.
"""

import gc
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import kernels
from model import Llama
from tests.support.step_testing import micro_batches
from training.config import TrainConfig
from training.distributed import World
from training.step.trainer import Trainer

ROOT = Path(__file__).parents[2]
TINY = {"vocab_size": 300, "max_seq_len": 16, "dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 48}
MICRO_STEPS = 4


@dataclass(frozen=True)
class Case:
    """A model and its training in so many steps. machines: over how many the processes are spread, for hsdp."""

    name: str
    dtype: str = "float32"
    tied: bool = True
    kernels: str = "none"
    machines: int = 1
    recompute: str = "none"
    compiled: bool = False
    clip: float = 0.0
    broken: bool = False
    steps: int = 1

    def config(self) -> TrainConfig:
        """The options of the run."""
        parallel = "fsdp" if self.machines == 1 else "hsdp"
        options = {"parallel": parallel, "compile": self.compiled, "grad_clip": self.clip, "beta2": 0.9}
        return TrainConfig(**TINY | options, tie_embeddings=self.tied, kernels=self.kernels)


def batches_of(case: Case, step: int, world: World):
    """This process's part of the micro-batches of a step, whose targets do not all count; and how many do in all."""
    every = [(tokens, targets.clone(), None) for tokens, targets, _ in micro_batches(step, MICRO_STEPS, 1, length=16)]
    for i, (_, targets, _) in enumerate(every):
        targets[:, : 3 * i] = -100
    share = MICRO_STEPS // world.size
    return every[world.rank * share :][:share], sum(int((targets != -100).sum()) for _, targets, _ in every)


def run(case: Case, trainer, world: World, value, gradient) -> dict:
    """The steps of a case: figures of each; gradients of the first, parameters after the last."""
    found: dict = {"figures": []}
    for step in range(case.steps):
        batches, valid = batches_of(case, step, world)
        if case.broken and step == 1:  # a parameter of one process is no number, and all must skip
            if world.rank == world.size - 1:
                batches[0][1][:] = -100
                norm = trainer.model.layers[0].ffn_norm
                kept = norm.detach().clone()
                norm.data.fill_(torch.nan)
            result = trainer.step(batches, valid, 1e-2)
            if world.rank == world.size - 1:
                norm.data.copy_(kept)
        else:
            result = trainer.step(batches, valid, 1e-2 if case.steps > 1 else 0.0)
        found["figures"].append([float(result.loss), float(result.grad_norm), float(result.skipped)])
        if step == 0:
            found["gradients"] = {name: gradient(p).clone() for name, p in trainer.model.named_parameters()}
    found["loss"] = trainer.evaluate(batches_of(case, 9, world)[0])
    found["parameters"] = {name: value(p).clone() for name, p in trainer.model.named_parameters()}
    found["updates"] = int(trainer.optimizer.state[trainer.model.final_norm]["step"])
    return found


def one_process(case: Case) -> dict:
    """What `steps` finds, by `Trainer` in this process."""
    config = case.config()
    torch.manual_seed(0)
    ops = kernels.select(case.kernels, config.n_layers)
    model = Llama(config.shape(), ops, getattr(torch, case.dtype), recompute=case.recompute)
    return run(case, Trainer(model, config, World()), World(), lambda p: p.detach(), lambda p: p.grad)


def steps(cases: list[Case], size: int) -> dict[str, dict]:
    """By the name of the case, what process 0 of `size` found."""
    with TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
        probe.close()
        file = Path(folder) / "found.pt"
        environ = os.environ | {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        words = [
            sys.executable,
            "-m",
            "tests.support.sharded_steps",
            json.dumps([asdict(case) for case in cases]),
            file,
        ]
        processes = [
            subprocess.Popen(
                words, cwd=ROOT, env=environ | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            for rank in range(size)
        ]
        outputs = [process.communicate(timeout=500)[0].decode() for process in processes]
        assert not any(process.returncode for process in processes), "\n".join(outputs)
        return torch.load(file)


def main(cases: list[Case], file: str) -> None:
    """What one of the processes does."""
    import torch.distributed as dist

    from training.sharding import Shared, make_mesh, sharded_model
    from training.step.sharded import ShardedTrainer

    dist.init_process_group("gloo")
    world, device = World(dist.get_rank(), dist.get_world_size()), torch.device("cpu")
    found = {}
    for case in cases:
        config = case.config()
        os.environ["LOCAL_WORLD_SIZE"] = str(world.size // case.machines)
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = sharded_model(
            config.shape(),
            kernels.select(case.kernels, config.n_layers),
            getattr(torch, case.dtype),
            make_mesh(config.parallel, world, device),
            device,
            case.recompute,
        )
        trainer = ShardedTrainer(model, config, world)

        def whole(x):
            return Shared(x.to_local(), x).whole() if hasattr(x, "to_local") else x

        found[case.name] = run(case, trainer, world, lambda p: whole(p.detach()), lambda p: whole(p.grad))
    if world.is_main:
        torch.save(found, file)
    del model, trainer
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main([Case(**case) for case in json.loads(sys.argv[1])], sys.argv[2])
