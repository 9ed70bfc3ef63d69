"""A step's figures on their way to the host, while the GPU goes on."""

import torch

from training.step.trainer import StepResult


class Readback:
    """Queues a copy of a step's figures to the host behind the step. Only `wait`, which returns them, waits for both."""

    def __init__(self, result: StepResult):
        figures = torch.stack([result.loss, result.grad_norm, result.skipped])
        self._done = None
        if figures.is_cuda:
            # A copy to memory that is not pinned would wait for the step.
            self._figures = torch.empty_like(figures, device="cpu", pin_memory=True)
            self._figures.copy_(figures, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()
        else:
            self._figures = figures

    def wait(self) -> tuple[float, float, bool]:
        """Loss (nats a token), gradient norm before clipping, and whether the update was skipped."""
        if self._done is not None:
            self._done.synchronize()
        loss, grad_norm, skipped = self._figures.tolist()
        return loss, grad_norm, bool(skipped)


def lag(device: torch.device) -> int:
    """Steps that may be under way when the next one is launched: one on a GPU, which then is never idle while a line is printed."""
    return 1 if device.type == "cuda" else 0
