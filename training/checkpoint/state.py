"""What a checkpoint holds of a run: gathered here when it is saved, put back here when the run is resumed."""

import math
from dataclasses import fields
from pathlib import Path

import torch

from model import LlamaConfig, huggingface
from model.config import option
from training.checkpoint import files as checkpoint
from training.checkpoint.parts import Reader
from training.command_line import from_toml, to_toml
from training.config import TrainConfig
from training.data.shards import Dataset
from training.errors import UserError
from training.progress import Progress
from training.step import optimizer
from training.step.trainer import Trainer

SHAPE = {f.name for f in fields(LlamaConfig)} - {"dropout"}
"""Options that a resumed run may not change: they fix the parameters and what is computed with them."""
OF_THE_TEXT = {"data", "split_text", "text_field", "val_fraction"}
"""Options that decide on which text a run is trained."""
OF_AN_EVALUATION = {"eval_iters", "batch_size", "packed_documents"}
"""Options that decide on which tokens, and with which of them in sight, a loss is measured."""
OF_ONE_CALL = {"config", "out_dir", "init_from", "which", "eval_only", "profile", "process_timeout"}
"""Options that are about one call of train.py: another value of theirs is no change of the run, and is not reported."""


def save(config: TrainConfig, trainer: Trainer, dataset: Dataset, progress: Progress, *, best: bool) -> Path:
    """Write a checkpoint of everything that decides how the run goes on. Returns its folder. Every process calls it."""
    model = trainer.model
    parameters = dict(model.named_parameters())
    weights = {name: trainer.savable(trainer.here(p), p) for name, p in parameters.items()}
    moments = optimizer.moments(model, trainer.optimizer)
    rng, rng_tensors = checkpoint.rng_state()
    best_val_loss = progress.best_val_loss if progress.best_val_loss < math.inf else None  # JSON has no infinity
    return checkpoint.save(
        config.out_dir,
        progress.step,
        tensors={
            "rng": rng_tensors,  # first, and so the main process's: the others may differ in what they draw
            "model": huggingface.unpack(model.config, weights),
            "optimizer": {
                f"{moment}.{canonical}": tensor
                for moment, named in moments.items()
                for canonical, tensor in huggingface.unpack(
                    model.config, {name: trainer.savable(part, parameters[name]) for name, part in named.items()}
                ).items()
            },
        },
        state={
            "best_val_loss": best_val_loss,
            "skipped": progress.skipped,
            "skipped_in_a_row": progress.skipped_in_a_row,
            "updates": optimizer.updates(model, trainer.optimizer),
            "loss_scale": trainer.loss_scale.state_dict(),
            "rng": rng,
            "data_fingerprint": dataset.fingerprint,
            "tokenizer_hash": dataset.tokenizer.hash,
        },
        config_toml=to_toml(config),
        tokenizer_name=dataset.tokenizer.file_name,
        tokenizer=dataset.tokenizer.content,
        best=best,
        keep=config.keep_checkpoints,
        world=trainer.world,
    )


def resume(config: TrainConfig, trainer: Trainer, dataset: Dataset) -> tuple[Progress, str]:
    """Put back the checkpoint in out_dir that --which names. Returns where the run is, and what there is to say of it.

    UserError where there is none, it is damaged, of another model, tokenizer or text, or past the run's end.
    """
    saved = checkpoint.load(config.out_dir, config.which, trainer.world)
    former = from_toml(saved.config_toml, str(saved.path / "config.toml"))
    other_shape = _changed(config, former, SHAPE)
    if other_shape:
        raise UserError(f"--init-from resume: {saved.path} holds another model: {other_shape}")
    if config.optimizer != former.optimizer:
        raise UserError(
            f"--optimizer is {config.optimizer}, and {saved.path} was trained with {former.optimizer}; their states differ"
        )
    for key, found, what, options in (
        (
            "data_fingerprint",
            dataset.fingerprint,
            "text",
            OF_THE_TEXT,
        ),  # first: another text has another tokenizer, too
        ("tokenizer_hash", dataset.tokenizer.hash, "tokenizer", {"tokenizer"}),
    ):
        if saved.state[key] != found:
            why = _changed(config, former, options) or f"{key} {saved.state[key][:12]}, found {found[:12]}"
            raise UserError(
                f"--init-from resume: {saved.path} was trained with another {what} than --data {config.data} gives now: {why}"
            )
    if saved.step > config.max_iters:
        raise UserError(f"--max-iters is {config.max_iters}, and {saved.path} has {saved.step} steps behind it")
    _read_tensors(saved, trainer)
    state = saved.state
    trainer.loss_scale.load_state_dict(state["loss_scale"])
    checkpoint.set_rng_state(state["rng"], saved.tensors("rng"))
    best = math.inf if state["best_val_loss"] is None else state["best_val_loss"]
    changed = _changed(config, former, {f.name for f in fields(TrainConfig)} - OF_ONE_CALL)
    note = f"resuming {saved.path}" + (f" with other options: {changed}" if changed else "")
    if best < math.inf and (measured := _changed(config, former, OF_AN_EVALUATION)):
        note += (
            f"; its best val loss, {best:.4f}, was measured otherwise ({measured}), and later ones are compared with it"
        )
    return Progress(saved.step, best, state["skipped"], state["skipped_in_a_row"], saved.step), note


@torch.no_grad()
def _read_tensors(saved: checkpoint.Checkpoint, trainer: Trainer) -> None:
    """Put parameters and moments back: of each, the rows that this process has."""
    model = trainer.model
    packed = huggingface.names(model.config)
    parameters = dict(model.named_parameters())

    def read(reader: Reader, prefix: str, name: str) -> torch.Tensor:
        return reader.rows(tuple(prefix + canonical for canonical in packed[name]), trainer.rows(parameters[name]))

    weights, moments = saved.reader("model"), saved.reader("optimizer")
    for name, p in parameters.items():
        trainer.here(p).copy_(read(weights, "", name))
    model.refresh_compute_weights()
    optimizer.restore(
        model, trainer.optimizer, lambda moment, name: read(moments, f"{moment}.", name), saved.state["updates"]
    )


def _changed(config: TrainConfig, former: TrainConfig, names: set[str]) -> str:
    """Those of the options that are not what they were, in words."""
    return ", ".join(
        f"{option(f.name)} is {_shown(getattr(config, f.name))}, was {_shown(getattr(former, f.name))}"
        for f in fields(TrainConfig)
        if f.name in names and getattr(config, f.name) != getattr(former, f.name)
    )


def _shown(value: object) -> str:
    return "empty" if value == "" else str(value)
