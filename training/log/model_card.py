"""The model card of a run: README.md in its folder, written anew whenever the run ends or stops."""

import json
import shlex
from pathlib import Path

from model import flops
from training.config import TrainConfig
from training.data.shards import Dataset
from training.errors import UserError
from training.log.console import printable
from training.log.metrics import read_metrics
from training.run_folder import CARD, CARD_MARK, is_card


def write_model_card(config: TrainConfig, dataset: Dataset, device: str, step: int) -> None:
    """Write the card of the run in `config.out_dir`, from its configuration, its data and its metrics.jsonl.

    device: its name. step: optimizer steps done. UserError where it cannot be written, or where README.md is there and no run
    wrote it: that stays as it is.
    """
    out_dir = Path(config.out_dir)
    path, draft = out_dir / CARD, out_dir / f".tmp-{CARD}"
    try:
        if path.exists() and not is_card(path):
            raise UserError(f"{path} is there, and no run wrote it: it stays, and no model card is written")
        draft.write_text(_card(config, dataset, device, step), encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def _card(config: TrainConfig, dataset: Dataset, device: str, step: int) -> str:
    out_dir = Path(config.out_dir)
    steps, evaluations = read_metrics(out_dir / "metrics.jsonl")
    parts = [
        CARD_MARK,
        f"# {out_dir.resolve().name}",
        _summary(config, dataset, device, step, steps),
        _results(evaluations),
        "![Loss by step](loss.png)" if (out_dir / "loss.png").exists() else "",
        _sample(evaluations),
        "## Model\n\n" + _table(_model_rows(config)),
        "## Data\n\n" + _table(_data_rows(config, dataset)),
        "## Training\n\n" + _table(_training_rows(config)) + "\n\nEvery option is in [config.toml](config.toml).",
        _commands(config, step),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(config: TrainConfig, dataset: Dataset, device: str, step: int, steps: list[dict]) -> str:
    tokens = step * config.batch_size * config.gradient_accumulation_steps * config.max_seq_len
    minutes = sum(line["ms"] for line in steps) / 6e4
    time = f"{minutes:.1f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
    began = _origin(Path(config.out_dir) / "metrics.jsonl")
    return (
        f"A Llama of {flops.parameters(config):,} parameters, {f'begun with the weights of `{began}` and ' if began else ''}"
        f"trained on {_source(dataset)} for {step:,} of {config.max_iters:,} steps: {tokens:,} tokens, "
        f"{tokens / dataset.train.n_tokens:.2f} times the text, in {time} of steps, lastly on {device}."
    )


def _origin(metrics_jsonl: Path) -> str:
    """The weights that the run began with; empty where it began from scratch."""
    with open(metrics_jsonl, encoding="utf-8") as file:
        for text in file:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # cut short by a kill
                continue
            if line["kind"] == "start":
                began = line["config"]["init_from"]
                return "" if began in ("scratch", "resume") else began
    return ""


def _results(evaluations: list[dict]) -> str:
    measured = [line for line in evaluations if line["val_loss"] is not None]
    if not measured:
        return ""
    best, last = min(measured, key=lambda line: line["val_loss"]), measured[-1]
    rows = [
        f"| {name} | {line['step']:,} | {_figure(line['train_loss'])} | {_figure(line['val_loss'])} "
        f"| {_figure(line['bits_per_byte'])} |"
        for name, line in (("last", last), ("best", best))
    ]
    head = ["| | step | training loss | validation loss | bits per byte |", "|---|--:|--:|--:|--:|"]
    units = "Losses are nats a token; bits per byte are of the validation text in UTF-8."
    return "\n".join([*head, *rows, "", units])


def _figure(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _sample(evaluations: list[dict]) -> str:
    sample = next((line["sample"] for line in reversed(evaluations) if line.get("sample")), None)
    if sample is None:
        return ""
    return "## Sample\n\n" + "\n".join(f"    {line}" for line in printable(sample, "utf-8").split("\n"))


def _model_rows(config: TrainConfig) -> dict[str, str]:
    scaled = f", scaled by {config.rope_scaling_factor:g} as in Llama 3.1" if config.rope_scaling_factor != 1 else ""
    head = "one matrix for embedding and head" if config.tie_embeddings else "a head of its own"
    return {
        "layers": f"{config.n_layers}, width {config.dim}, feed-forward {config.hidden_dim}",
        "heads": f"{config.n_heads} of {config.head_dim}, for keys and values {config.n_kv_heads}",
        "vocabulary": f"{config.vocab_size:,}, {head}",
        "longest sequence": f"{config.max_seq_len:,} tokens",
        "RoPE": f"theta {config.rope_theta:g}{scaled}, angles in {config.rope_precision}",
    }


def _data_rows(config: TrainConfig, dataset: Dataset) -> dict[str, str]:
    train, val, tokenizer = dataset.train, dataset.val, dataset.tokenizer
    given = f"`{config.tokenizer}`" if config.tokenizer else "trained on the text"
    return {
        "source": f"{_source(dataset)}, fingerprint {dataset.fingerprint[:16]}",
        "to train on": f"{train.n_tokens:,} tokens of {train.n_documents:,} documents",
        "to validate on": f"{val.n_tokens:,} tokens of {val.n_documents:,} documents",
        "tokenizer": f"{tokenizer.file_name}, {tokenizer.n_tokens:,} tokens, {given}, SHA-256 {tokenizer.hash[:16]}",
    }


def _training_rows(config: TrainConfig) -> dict[str, str]:
    sequences = config.batch_size * config.gradient_accumulation_steps
    schedule = f"{config.schedule}, {config.warmup_iters:,} steps of warm-up" if config.decay_lr else "constant"
    return {
        "a step": f"{sequences:,} sequences of {config.max_seq_len:,} tokens",
        "learning rate": f"{config.learning_rate:g}, {schedule}, to {config.min_lr:g}",
        "optimizer": f"{config.optimizer}, betas {config.beta1:g} and {config.beta2:g}, weight decay {config.weight_decay:g}, "
        f"gradients clipped at {config.grad_clip:g}",
        "precision": f"float32 parameters, --dtype {config.dtype}",
        "kernels": config.kernel_spec,
        "seed": str(config.seed),
    }


def _commands(config: TrainConfig, step: int) -> str:
    folder = shlex.quote(config.out_dir)
    more = f" --max-iters {2 * config.max_iters}" if step >= config.max_iters else ""
    return f"""## Going on

```
python generate.py {folder} --prompt "..."
python train.py --init-from resume --out-dir {folder}{more}
python train.py --init-from {folder} --data mine.jsonl --out-dir tuned
python export.py {folder} exported --format huggingface
```

Checkpoints are the folders `step-*`; `last` and `best` name two of them."""


def _source(dataset: Dataset) -> str:
    return dataset.train.name.removeprefix("the train split of ")


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
