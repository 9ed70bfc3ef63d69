"""Where the numbers of a run go: the console, metrics.jsonl, TensorBoard and, where asked for, Weights & Biases."""

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path

from training.config import TrainConfig
from training.errors import UserError
from training.log.console import Console


@dataclass(frozen=True)
class StepRecord:
    """What is known of one training step, all of it of the global batch unless said."""

    step: int
    loss: float  # nats per token, mean over the valid tokens
    lr: float
    ms: float  # milliseconds from the end of the last step to the end of this one
    mfu: float | None  # fraction of one GPU's dense peak, by `training/hardware.py`; None: its peak is not known
    tflops: float  # TFLOP/s of one GPU, counted by `model/flops.py`
    tokens_per_second: float
    grad_norm: float  # before clipping
    peak_memory: int  # bytes, of this process
    skipped: bool = False  # the loss or the gradient was not finite and the update was left out


class Metrics:
    """The one place that a training loop reports to. Made on one rank only.

    start_step: the first step that this process runs; above 0 on a resumed run, which goes on in the same files.
    log_interval: a line is printed for steps that are a multiple of it, and for every skipped one; the files take every
    step they are given. wandb_project: the project's name, "" for none. config: what the backends show as the run's.

    Raises UserError where wandb is asked for and not installed, or metrics.jsonl cannot be written.
    """

    def __init__(
        self,
        out_dir: str | Path,
        *,
        total_steps: int,
        start_step: int,
        log_interval: int,
        run_name: str,
        config: dict,
        tensorboard: bool = True,
        wandb_project: str = "",
    ):
        self._out_dir = Path(out_dir)
        self._log_interval = log_interval
        self._last_step = start_step
        self._header_due = True
        self._wandb = self._tensorboard = None
        # Before any file is made: the likeliest mistake, wandb that is not installed, should leave nothing behind.
        wandb = _import_wandb() if wandb_project else None
        try:
            self._out_dir.mkdir(parents=True, exist_ok=True)
            self._jsonl = _open_to_append(self._out_dir / "metrics.jsonl")
        except OSError as error:
            raise _cannot_write(self._out_dir, error) from error
        self._append("start", start_step, run_name=run_name, config=config)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what a killed run wrote about steps that this one will run again.
            self._tensorboard = SummaryWriter(str(self._out_dir / "tensorboard"), purge_step=start_step, flush_secs=30)
            self._tensorboard.add_text("config", _as_code(json.dumps(config, indent=1, default=str)), start_step)
        if wandb:
            self._wandb = wandb.init(
                project=wandb_project, name=run_name or None, config=config, dir=str(self._out_dir)
            )
        self._console = Console(total_steps, start_step)

    @classmethod
    def of_run(cls, config: TrainConfig, start_step: int) -> "Metrics":
        """Those that the options of a run ask for."""
        return cls(
            config.out_dir,
            total_steps=config.max_iters,
            start_step=start_step,
            log_interval=config.log_interval,
            run_name=config.wandb_run_name,
            config=asdict(config),
            tensorboard=config.tensorboard,
            wandb_project=config.wandb_project if config.wandb_log else "",
        )

    def step(self, record: StepRecord) -> None:
        """Report a training step."""
        self._last_step = record.step
        values = asdict(record)
        del values["step"]
        self._append("step", record.step, **values)
        self._plot(record.step, {f"train/{name}": value for name, value in values.items()})
        self._console.advance(record.step, record.loss)
        if self._header_due:
            self._console.print(_header(record))
            self._header_due = False
        if record.skipped or record.step % self._log_interval == 0:
            self._console.print(step_line(record))

    def evaluation(
        self, step: int, train_loss: float, val_loss: float, bits_per_byte: float, sample: str | None = None
    ) -> None:
        """Report an evaluation: losses in nats per token, bits per byte of the validation text, a sample of text."""
        losses = {"train_loss": train_loss, "val_loss": val_loss, "bits_per_byte": bits_per_byte}
        self._append("eval", step, **losses, sample=sample)
        self._plot(step, {f"eval/{name}": value for name, value in losses.items()})
        self._console.print(
            f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, {bits_per_byte:.4f} bits per byte"
        )
        if sample is not None:
            if self._tensorboard:
                self._tensorboard.add_text("eval/sample", _as_code(sample), step)
            self._console.print(sample)

    def note(self, text: str) -> None:
        """Report in words: a checkpoint saved, a reason to stop."""
        self._append("note", self._last_step, text=text)
        self._console.print(text)

    def close(self) -> None:
        """Flush everything; a second call does nothing."""
        self._console.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()
        self._wandb = self._tensorboard = None
        self._jsonl.close()

    def _append(self, kind: str, step: int, **values) -> None:
        line = {"kind": kind, "step": step, "time": time.time()}
        # JSON has no NaN: what cannot be a number there is null.
        line |= {name: _finite(value) for name, value in values.items()}
        try:
            self._jsonl.write((json.dumps(line, default=str) + "\n").encode())
        except OSError as error:
            self._jsonl.close()
            raise _cannot_write(self._out_dir, error) from error

    def _plot(self, step: int, values: dict[str, float | None]) -> None:
        values = {name: float(value) for name, value in values.items() if _finite(value) is not None}
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)


def step_line(record: StepRecord) -> str:
    """The console's line for a step: the reference's five fields, then what it does not have."""
    speed = f"{record.mfu * 100:.2f}%" if record.mfu is not None else f"n/a | {record.tflops:.2f} TFLOP/s"
    line = (
        f"{record.step} | loss {record.loss:.4f} | lr {record.lr:e} | {record.ms:.2f}ms | mfu {speed}"
        f" | {record.tokens_per_second:,.0f} tok/s | grad {record.grad_norm:.3f} | {_memory(record.peak_memory)}"
    )
    return f"{line} | skipped: not finite" if record.skipped else line


def read_metrics(path: str | Path) -> tuple[list[dict], list[dict]]:
    """The lines of a metrics.jsonl by kind: those of steps and those of evaluations, each in order of the step.

    A step that was run again counts once, with its last value; what a run wrote about steps after the one where a later
    run starts is left out. A line that a kill cut short is passed over.
    """
    steps, evaluations = {}, {}
    with open(path, encoding="utf-8") as file:
        for text in file:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if line["kind"] == "start":
                for kept in (steps, evaluations):
                    for step in [step for step in kept if step > line["step"]]:
                        del kept[step]
            elif line["kind"] == "step":
                steps[line["step"]] = line
            elif line["kind"] == "eval":
                evaluations[line["step"]] = line
    return [steps[step] for step in sorted(steps)], [evaluations[step] for step in sorted(evaluations)]


def _header(record: StepRecord) -> str:
    if record.mfu is None:
        return "mfu n/a: no peak for this device in training/hardware.py; FLOPs a token are counted in model/flops.py"
    return "mfu: FLOPs a token (model/flops.py) x tokens/s over the GPU's dense peak (training/hardware.py)"


def _memory(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _as_code(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())  # indented by four, Markdown shows a text as it is


def _open_to_append(path: Path) -> FileIO:
    file = open(path, "a+b", buffering=0)  # noqa: SIM115 - unbuffered: each line is in the file at once
    if file.tell():
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            file.write(b"\n")  # a killed run may have left half a line: ours begins on one of its own
    return file


def _cannot_write(out_dir: Path, error: OSError) -> UserError:
    return UserError(f"--out-dir {out_dir}: metrics.jsonl cannot be written: {error.strerror or error}")


def _import_wandb():
    try:
        import wandb
    except ImportError as error:
        raise UserError("--wandb-log: wandb is not installed; pip install wandb, or leave the option off") from error
    return wandb
