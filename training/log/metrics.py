"""Where the numbers of a run go: the console, metrics.jsonl, TensorBoard and, where asked for, Weights & Biases."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from training.config import TrainConfig
from training.errors import UserError
from training.log.appended import AppendedFile
from training.log.console import Console, complain
from training.log.events import EventFile


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

    Until `open` names its folder it prints, and nothing is kept. log_interval: a line is printed for steps that are a multiple
    of it, and for every skipped one; the files take every step they are given. tensorboard: keep events for it too.
    wandb_project: the project's name, "" for none. config: what is kept as the run's.

    What cannot be written, on a full disk for one, is said once on stderr; it ends no run, and later lines are tried again.
    Raises UserError where wandb is asked for, and is not installed or does not start.
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
        self._out_dir, self._run_name, self._config = Path(out_dir), run_name, config
        self._log_interval = log_interval
        self._last_step = start_step
        self._header_due = True
        self._with_tensorboard = tensorboard
        self._jsonl: AppendedFile | None = None
        self._events: EventFile | None = None
        self._failed: set[str] = set()
        self._wandb = _start_wandb(wandb_project, run_name, config, self._out_dir) if wandb_project else None
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

    def open(self) -> None:
        """Keep what is reported from here on in the run's folder, behind what is there. UserError where that cannot be read."""
        try:
            self._out_dir.mkdir(parents=True, exist_ok=True)
            self._jsonl = AppendedFile(self._out_dir / "metrics.jsonl")
            torn = self._jsonl.last_byte() not in (b"", b"\n")  # a killed run may have left half a line
        except OSError as error:
            raise UserError(
                f"--out-dir {self._out_dir}: metrics.jsonl cannot be written: {error.strerror or error}"
            ) from error
        if torn:
            self._try("metrics.jsonl", lambda: self._jsonl.write(b"\n"))
        self._append("start", self._last_step, run_name=self._run_name, config=self._config)
        if self._with_tensorboard:
            self._try("tensorboard", self._open_events)

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
            if self._events:
                self._try("tensorboard", lambda: self._events.text(step, "eval/sample", sample))
            self._console.print(sample)

    def note(self, text: str) -> None:
        """Report in words: a checkpoint saved, a reason to stop."""
        self._append("note", self._last_step, text=text)
        self._console.print(text)

    def warn(self, text: str) -> None:
        """Report in words what went wrong and does not end the run, on stderr."""
        self._append("note", self._last_step, text=text)
        complain(text)

    def close(self) -> None:
        """Flush everything; a second call does nothing."""
        self._console.close()
        if self._wandb:
            self._try("wandb", self._wandb.finish)
        if self._events:
            self._events.close()
        if self._jsonl:
            self._jsonl.close()
        self._wandb = self._events = self._jsonl = None

    def _open_events(self) -> None:
        self._events = EventFile(self._out_dir / "tensorboard", self._last_step)
        self._events.text(self._last_step, "config", json.dumps(self._config, indent=1, default=str))

    def _append(self, kind: str, step: int, **values) -> None:
        line = {"kind": kind, "step": step, "time": time.time()}
        # JSON has no NaN: what cannot be a number there is null.
        line |= {name: _finite(value) for name, value in values.items()}
        if self._jsonl:
            self._try("metrics.jsonl", lambda: self._jsonl.write((json.dumps(line, default=str) + "\n").encode()))

    def _plot(self, step: int, values: dict[str, float | None]) -> None:
        values = {name: float(value) for name, value in values.items() if _finite(value) is not None}
        if self._events:
            self._try("tensorboard", lambda: self._events.numbers(step, values))
        if self._wandb:
            self._try("wandb", lambda: self._wandb.log(values, step=step))

    def _try(self, name: str, write: Callable[[], object]) -> None:
        """Write, and say once of each record that it cannot be written."""
        try:
            write()
        except Exception as error:
            # What others' libraries raise is theirs to choose; of our own files only the system's refusals are no bug.
            if name == "metrics.jsonl" and not isinstance(error, OSError):
                raise
            if name not in self._failed:
                self._failed.add(name)
                reason = getattr(error, "strerror", None) or error
                complain(
                    f"{name} in {self._out_dir} could not be written: {reason}; the run goes on without what it misses"
                )


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
    run starts is left out. A line that a kill cut short is passed over. OSError where the file cannot be read.
    """
    steps, evaluations = {}, {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if not isinstance(line, dict) or not {"kind", "step"} <= line.keys():
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


def _start_wandb(project: str, run_name: str, config: dict, out_dir: Path):
    try:
        import wandb
    except ImportError as error:
        raise UserError("--wandb-log: wandb is not installed; pip install wandb, or leave the option off") from error
    try:
        return wandb.init(project=project, name=run_name or None, config=config, dir=str(out_dir))
    except Exception as error:  # not logged in, no network: which classes it raises is its own affair
        raise UserError(
            f"--wandb-log: wandb does not start: {error}; `wandb login`, set WANDB_MODE=offline, or leave the option off"
        ) from error
