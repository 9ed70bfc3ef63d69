"""The trainer that a run begins with: its model, with initial values, on this process."""

import torch

import kernels
from model import Llama
from training import pretrained
from training.config import TrainConfig
from training.distributed import World
from training.step.trainer import Trainer


def new_trainer(config: TrainConfig, world: World, device: torch.device, dtype: torch.dtype) -> Trainer:
    """A model as `config` says, whole or, of many processes with --parallel fsdp or hsdp, a share of one.

    Its initial values are drawn from the device's global generator, the same for every number of processes and every --parallel,
    or those that --init-from names. UserError where these do not fit.
    """
    ops = kernels.select(config.kernel_spec, config.n_layers)
    weights = pretrained.find(config.weights, config.which) if config.weights else None
    if weights:
        weights.check_fits()
    shape, recompute = config.shape(), config.activation_checkpointing
    if config.parallel == "ddp" or world.size == 1:
        with device:
            model = Llama(shape, ops, dtype, recompute=recompute)
        if weights:
            weights.load_into(model)
        return Trainer(model, config, world)
    from training import sharding  # which takes a second to import
    from training.step.sharded import ShardedTrainer

    mesh = sharding.make_mesh(config.parallel, world, device)
    model = sharding.sharded_model(shape, ops, dtype, mesh, device, recompute)
    if weights:
        weights.load_into(model, lambda p: (sharding.local(p), sharding.rows(p).start))
    return ShardedTrainer(model, config, world)
