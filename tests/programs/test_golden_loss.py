"""A loss curve of 50 steps that is committed: a refactor that should change nothing must reproduce it.

On the kind of machine that wrote it, to the bit; elsewhere, where other instructions sum in another order, within a tight
bound. After a change that is meant to move the numbers: `python -m tests.programs.test_golden_loss` writes it anew.
"""

import json
import platform
from pathlib import Path

import pytest
import torch

from tests.support.step_testing import make_trainer, train

FILE = Path(__file__).with_name("golden_loss.json")


def machine() -> dict[str, str]:
    """What the last bit of a float32 sum depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return {"torch": torch.__version__, "cpu": model, "instructions": torch.backends.cpu.get_cpu_capability()}


def curve() -> list[float]:
    """Losses of 50 deterministic float32 steps on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        return train(make_trainer(), 50, lr=3e-3)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def test_the_loss_curve_is_the_committed_one():
    golden = json.loads(FILE.read_text())
    losses = curve()
    if golden["machine"] == machine():
        assert losses == golden["losses"]
    else:
        assert losses == pytest.approx(golden["losses"], rel=2e-3)


def test_the_committed_curve_learns():
    losses = json.loads(FILE.read_text())["losses"]
    assert len(losses) == 50
    assert losses[0] == pytest.approx(5.7, abs=0.1)  # ln 300
    assert losses[-1] < losses[0] - 1


if __name__ == "__main__":
    FILE.write_text(json.dumps({"machine": machine(), "losses": curve()}, indent=1) + "\n")
