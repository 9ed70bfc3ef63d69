"""kill -9 at any moment of a run, again and again: what is left is resumed, and ends where an undisturbed run does, to the bit."""

import os
import random
import sys
import time
from pathlib import Path

import pytest

from tests.support.forked_runs import ForkedRun, RunServer
from tests.support.run_testing import TINY, arguments, records
from training.checkpoint import files as checkpoint
from training.log.metrics import read_metrics

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

# Of a run that is disturbed nothing may depend on when it ends: it has no end, and no schedule that leads there.
ENDLESS = TINY | {
    "max_iters": 10**6,
    "decay_lr": False,
    "sample_tokens": 0,
    "log_interval": 1000,
    "eval_iters": 1,
    "dropout": 0.1,
}


@pytest.fixture
def server(tmp_path):
    server = RunServer(tmp_path)
    yield server
    server.close()


def assert_undisturbed(server: RunServer, out_dir: Path, folder: Path, text: dict, options: dict) -> None:
    """That an undisturbed run of as many steps has the same losses and the same last checkpoint, to the bit."""
    step = checkpoint.load(out_dir).step
    words = arguments(
        **ENDLESS | text | options | {"out_dir": folder, "max_iters": step, "always_save_checkpoint": False}
    )
    assert server.start([*words, "--eval-interval=1000000"]).wait() == 0
    ours, theirs = (
        [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in read_metrics(run / "metrics.jsonl")[0]]
        for run in (out_dir, folder)
    )
    assert ours[:step] == theirs
    assert len(theirs) == step
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        last = f"step-{step:08d}"
        assert (out_dir / last / name).read_bytes() == (folder / last / name).read_bytes(), name


def folders_of(out_dir: Path) -> list[str]:
    """Names of the checkpoints in a folder, as they are at this moment."""
    return [path.name for path in out_dir.glob("step-*")]


def wait_until(run: ForkedRun, condition) -> None:
    """Wait for what a run should bring about."""
    for _ in range(12_000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(run.log.read_text())


def whole_checkpoints(out_dir: Path) -> list[int]:
    """Steps of the checkpoints in a folder, each of which is whole, or cannot be read."""
    return sorted(checkpoint.load(path).step for path in out_dir.glob("step-*"))


@pytest.mark.fault(
    "`kill -9` at any moment, also of a save",
    "every checkpoint is whole; resumed, the run has the losses of one undisturbed",
)
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_goes_on_to_the_bit(server, tmp_path, text, kills):
    draw, out_dir, before = random.Random(kills), tmp_path / "out", 0
    options = {"out_dir": out_dir, "eval_interval": 2, "always_save_checkpoint": True, "keep_checkpoints": 2}
    for kill in range(kills):
        # Killed before its first save, a run begins anew; what it has left is no checkpoint.
        begun = bool(whole_checkpoints(out_dir))
        words = arguments(init_from="resume", out_dir=out_dir) if begun else arguments(**ENDLESS | text | options)
        run = server.start(words)
        if kill % 3:  # two of three once it saves, which is then most of what it does
            wait_until(run, lambda: max(folders_of(out_dir), default="") > f"step-{before:08d}")  # noqa: B023
        time.sleep(draw.uniform(0, 0.5))
        assert run.kill() == -9, run.log.read_text()
        assert "Traceback" not in run.log.read_text()
        steps = whole_checkpoints(out_dir)
        assert max(steps, default=0) >= before  # never behind what was there
        before = max(steps, default=0)
    # Once more, until there is a checkpoint that a run ended by no kill has written.
    run = server.start(arguments(init_from="resume", out_dir=out_dir, max_iters=before + 3))
    assert run.wait() == 0, run.log.read_text()
    assert checkpoint.load(out_dir).step == before + 3
    assert not [path.name for path in out_dir.iterdir() if path.name.startswith((".tmp", ".old", ".lock"))]
    assert_undisturbed(server, out_dir, tmp_path / "undisturbed", text, {})


def wait_for_step(run: ForkedRun, out_dir: Path, step: int) -> None:
    """Wait until a run has reported a step."""
    path, at = out_dir / "metrics.jsonl", 0

    def reported() -> bool:
        nonlocal at
        if not path.exists():
            return False
        with open(path) as file:
            file.seek(at)
            new = file.read()
        at += max(0, new.rfind("\n") + 1)
        return f'"kind": "step", "step": {step},' in new

    wait_until(run, reported)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory and open files are read from /proc")
@pytest.mark.fault(
    "2,000 steps with a save every 10 and a kill now and then",
    "the losses of an undisturbed run; memory and open files stay flat",
)
def test_a_long_run_stays_flat_and_ends_where_an_undisturbed_one_does(server, tmp_path, text):
    steps, out_dir = 2000, tmp_path / "out"
    options = {"out_dir": out_dir, "eval_interval": 10, "always_save_checkpoint": True, "tensorboard": True}
    stops = [*sorted(random.Random(0).sample(range(300, steps - 100), 4)), steps]
    words = arguments(**ENDLESS | text | options)
    for stop in stops:
        begins = checkpoint.load(out_dir).step if (out_dir / "last").exists() else 0
        run = server.start(words)
        wait_for_step(run, out_dir, begins + 50)  # by then everything has been done that a run does
        files, memory = run.open_files(), run.resident_bytes()
        wait_for_step(run, out_dir, stop - 1)
        assert run.open_files() <= files
        assert run.resident_bytes() < memory + 4 * 2**20, (begins, stop)
        assert run.kill() == -9
        words = arguments(init_from="resume", out_dir=out_dir)
    words = arguments(init_from="resume", out_dir=out_dir, max_iters=steps)
    if checkpoint.load(out_dir).step < steps:
        assert server.start(words).wait() == 0
    assert len([line for line in records(out_dir, "note") if line["text"].startswith("saved")]) >= steps // 10
    assert_undisturbed(server, out_dir, tmp_path / "undisturbed", text, {"tensorboard": True})
