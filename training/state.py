"""What of a run is in its checkpoints: gathered here to save it, put back here to resume."""

from dataclasses import dataclass, fields
from pathlib import Path

import torch

from model import LlamaConfig, huggingface
from model.config import option
from training import checkpoint, optimizer
from training.config import TrainConfig, from_toml, to_toml
from training.errors import UserError
from training.shards import Dataset
from training.step import Trainer


@dataclass
class Progress:
    """Where a run is."""

    step: int = 0
    """Optimizer steps done."""
    best_val_loss: float = float("inf")
    """Nats a token."""
    skipped: int = 0
    """Updates skipped so far because the loss or the gradient was not finite."""
    skipped_in_a_row: int = 0
    """Of these, the latest without a good one between."""


def save(config: TrainConfig, trainer: Trainer, dataset: Dataset, progress: Progress, *, best: bool) -> Path:
    """Write a checkpoint of everything that decides how the run goes on. Returns its folder."""
    model = trainer.model
    weights = {name: p.detach() for name, p in model.named_parameters()}
    moments = optimizer.moments(model, trainer.optimizer)
    rng, rng_tensors = checkpoint.rng_state()
    return checkpoint.save(
        config.out_dir,
        progress.step,
        tensors={
            "model": huggingface.unpack(model.config, weights),
            "optimizer": {
                f"{moment}.{name}": tensor
                for moment, named in moments.items()
                for name, tensor in huggingface.unpack(model.config, named).items()
            },
            "rng": rng_tensors,
        },
        state={
            "best_val_loss": progress.best_val_loss if progress.best_val_loss < float("inf") else None,
            "skipped": progress.skipped,
            "skipped_in_a_row": progress.skipped_in_a_row,
            "updates": optimizer.updates(model, trainer.optimizer),
            "loss_scale": trainer.loss_scale.state_dict(),
            "rng": rng,
            "data_fingerprint": dataset.fingerprint,
            "tokenizer_hash": dataset.tokenizer.hash,
        },
        config_toml=to_toml(config),
        tokenizer=dataset.tokenizer.model_bytes,
        best=best,
        keep=config.keep_checkpoints,
    )


def resume(config: TrainConfig, trainer: Trainer, dataset: Dataset) -> Progress:
    """Put back the last checkpoint in out_dir. UserError where there is none, or it is of another model, tokenizer or text."""
    saved = checkpoint.load(config.out_dir)
    _check_shape(config, from_toml(saved.config_toml, str(saved.path / "config.toml")), saved.path)
    for name, found in (("tokenizer_hash", dataset.tokenizer.hash), ("data_fingerprint", dataset.fingerprint)):
        if saved.state[name] != found:
            what = "tokenizer" if name == "tokenizer_hash" else "text"
            raise UserError(
                f"--init-from resume: {saved.path} was trained on another {what} than --data {config.data} gives now "
                f"({name} {saved.state[name][:12]}, found {found[:12]})"
            )
    model = trainer.model
    with torch.no_grad():
        for name, tensor in huggingface.pack(model.config, saved.tensors("model")).items():
            model.get_parameter(name).copy_(tensor)
    model.refresh_compute_weights()
    tensors = saved.tensors("optimizer")
    moments = {}
    for moment in optimizer.MOMENTS:
        named = {name.removeprefix(f"{moment}."): t for name, t in tensors.items() if name.startswith(f"{moment}.")}
        moments[moment] = huggingface.pack(model.config, named)
    state = saved.state
    optimizer.restore(model, trainer.optimizer, moments, state["updates"])
    trainer.loss_scale.load_state_dict(state["loss_scale"])
    checkpoint.set_rng_state(state["rng"], saved.tensors("rng"))
    best = float("inf") if state["best_val_loss"] is None else state["best_val_loss"]
    return Progress(saved.step, best, state["skipped"], state["skipped_in_a_row"])


def _check_shape(config: TrainConfig, saved: TrainConfig, path: Path) -> None:
    """UserError, naming the options, where the checkpoint is of another model. Dropout may change."""
    other = [
        f"{option(f.name)} is {getattr(config, f.name)}, was {getattr(saved, f.name)}"
        for f in fields(LlamaConfig)
        if f.name != "dropout" and getattr(config, f.name) != getattr(saved, f.name)
    ]
    if other:
        raise UserError(f"--init-from resume: {path} holds another model: {'; '.join(other)}")
