"""Where a run is, and its steps under way: launched, but their figures not yet read.

A GPU works through a step long after the CPU has launched it. So the figures of a step are read, printed and counted while the
next one runs, and the GPU is never idle for a line of the log.
"""

import math
import time
from collections import deque
from dataclasses import dataclass

import torch

from model import flops
from training import hardware
from training.config import TrainConfig
from training.device import name_of
from training.distributed import World
from training.log.metrics import Metrics, StepRecord
from training.step import readback
from training.step.readback import Readback
from training.step.trainer import StepResult


@dataclass
class Progress:
    """Where a run is."""

    step: int = 0
    """Optimizer steps done."""
    best_val_loss: float = math.inf
    """Nats a token."""
    skipped: int = 0
    """Updates skipped so far because the loss or the gradient was not finite."""
    skipped_in_a_row: int = 0
    """Of these, the latest without a good one between."""
    saved_step: int = 0
    """Steps done when the last checkpoint was written."""


class UnderWay:
    """The steps under way. Reports and counts each when it is finished.

    metrics: where steps are reported; None in all processes but the main one.

    Attributes:
        lag: steps that may be under way when the next one is launched.
        broke_down: why the run has to end, once `max_skipped_steps` steps in a row were not finite; empty until then.
    """

    def __init__(
        self,
        config: TrainConfig,
        progress: Progress,
        metrics: Metrics | None,
        world: World,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.lag = readback.lag(device)
        self.broke_down = ""
        self._config, self._progress, self._metrics = config, progress, metrics
        self._world, self._device, self._device_name = world, device, name_of(device)
        self._dtype_name = str(dtype).removeprefix("torch.")
        self._flops_per_token = flops.flops_per_token(config)
        self._tokens_per_step = config.batch_size * config.gradient_accumulation_steps * config.max_seq_len
        self._steps: deque[tuple[int, float, Readback]] = deque()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Let the time of the next step begin now: what was done since the last one is no part of it."""
        self._clock = time.perf_counter()

    def add(self, step: int, lr: float, result: StepResult) -> None:
        """Take in a step that was launched."""
        self._steps.append((step, lr, Readback(result)))

    def keep_up(self) -> None:
        """Wait for the steps under way but the newest, as many as `lag` says."""
        self.finish(left=self.lag)

    def finish(self, left: int = 0) -> None:
        """Wait for the steps under way, oldest first, until so many are left."""
        while len(self._steps) > left:
            step, lr, figures = self._steps.popleft()
            loss, grad_norm, skipped = figures.wait()
            seconds, self._clock = time.perf_counter() - self._clock, time.perf_counter()
            if self._metrics:
                self._metrics.step(self._record(step, lr, loss, grad_norm, skipped, seconds))
            self._count(step, loss, grad_norm, skipped)

    def _record(self, step: int, lr: float, loss: float, grad_norm: float, skipped: bool, seconds: float) -> StepRecord:
        rate = self._tokens_per_step / seconds
        rate_of_one = rate / self._world.size
        return StepRecord(
            step=step,
            loss=loss,
            lr=lr,
            ms=1000 * seconds,
            mfu=hardware.mfu(self._flops_per_token, rate_of_one, self._device_name, self._dtype_name),
            tflops=self._flops_per_token * rate_of_one / 1e12,
            tokens_per_second=rate,
            grad_norm=grad_norm,
            peak_memory=hardware.peak_memory_bytes(self._device),
            skipped=skipped,
        )

    def _count(self, step: int, loss: float, grad_norm: float, skipped: bool) -> None:
        """Keep count of the skipped steps; too many of them in a row are a run that has broken down."""
        progress = self._progress
        progress.skipped += int(skipped)
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if skipped else 0
        if progress.skipped_in_a_row >= self._config.max_skipped_steps and not self.broke_down:
            self.broke_down = (
                f"step {step}: the loss or the gradient was not finite {progress.skipped_in_a_row} steps in a row "
                f"(--max-skipped-steps); loss {loss}, gradient norm {grad_norm}. Saved with the parameters of the "
                "last good step; try a lower --learning-rate, or bisect with --kernels"
            )
