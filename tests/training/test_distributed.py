"""Many processes train as one does: the same data, losses and parameters. Two of them, joined by gloo on this machine."""

import pytest
import torch

import train
from tests.support.run_testing import (
    TINY,
    Result,
    arguments,
    call,
    finish,
    records,
    start_many,
    wait_until,
    write_text,
)
from training.checkpoint import files as checkpoint
from training.config import TrainConfig
from training.distributed import World, joined


@pytest.fixture
def options(tmp_path) -> dict:
    return TINY | {"data": write_text(tmp_path / "text.txt"), "data_dir": tmp_path / "data", "eval_iters": 3}


def test_two_processes_train_as_one(tmp_path, options):
    """They also prepare the data, which nothing has prepared before."""
    options |= {"gradient_accumulation_steps": 2, "learning_rate": 0.01}
    results = [finish(process) for process in start_many(arguments(**options, out_dir=tmp_path / "two"))]
    assert [result.status for result in results] == [0, 0], results
    assert results[1] == Result(0, "", "")  # only the main process speaks
    assert call(train, arguments(**options, out_dir=tmp_path / "one")).status == 0
    for kind, keys in (("step", ("loss", "grad_norm", "lr")), ("eval", ("train_loss", "val_loss", "bits_per_byte"))):
        ones, twos = (records(tmp_path / name, kind) for name in ("one", "two"))
        assert len(ones) == len(twos) > 0
        for one, two in zip(ones, twos, strict=True):
            assert [two[key] for key in keys] == pytest.approx([one[key] for key in keys], rel=1e-5)
    one, two = (checkpoint.load(tmp_path / name) for name in ("one", "two"))
    for name, tensor in one.tensors("model").items():
        torch.testing.assert_close(two.tensors("model")[name], tensor, rtol=0, atol=2e-5)
    assert two.state["data_fingerprint"] == one.state["data_fingerprint"]


def test_a_signal_to_one_process_stops_all_and_saves(tmp_path, options):
    options |= {"gradient_accumulation_steps": 2, "max_iters": 10**6, "eval_interval": 10**6, "log_interval": 1000}
    out_dir = tmp_path / "out"
    processes = start_many(arguments(**options, out_dir=out_dir))
    wait_until(lambda: len(records(out_dir, "step")) > 3, processes[0])
    processes[1].terminate()
    results = [finish(process) for process in processes]
    assert [(result.status, result.err) for result in results] == [(0, ""), (0, "")]
    done = len(records(out_dir, "step"))
    assert f"stopping after step {done - 1}, as asked" in results[0].out
    assert checkpoint.load(out_dir).step == done


def test_one_process_is_a_world_of_its_own(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(TrainConfig(gradient_accumulation_steps=3)) as world:
        assert world == World(rank=0, size=1, local_rank=0)
        assert world.is_main
        tensor = torch.ones(3)
        world.sum(tensor)
        world.wait()
        assert tensor.tolist() == [1, 1, 1]
        assert world.totals(5, True, False) == [5, 1, 0]
        assert world.gather("x") == ["x"]
        with world.main_first():
            pass


SUMS = """
import sys, torch
from training.config import TrainConfig
from training.distributed import joined
with joined(TrainConfig(device="cpu", gradient_accumulation_steps=4, process_timeout=60)) as world:
    tensor = torch.arange(3.0) * (world.rank + 1)
    world.sum(tensor)
    print(tensor.tolist(), world.totals(10 * world.rank, world.rank == 1), world.gather("ab" * world.rank))
"""


def test_two_processes_add_up_and_gather():
    results = [finish(process) for process in start_many([], code=SUMS)]
    assert results == [Result(0, "[0.0, 3.0, 6.0] [10, 1] ['', 'ab']\n", "")] * 2


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE is '2' and RANK is not set: set all of WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR",
        ),
        ({"RANK": "1"}, "RANK is '1' and WORLD_SIZE is not set"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''; it must be a whole number, at least 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; it must be a whole number, at least 1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; it must be a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is '2'; it must be a whole number, from 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE is '2' and LOCAL_RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, "WORLD_SIZE is '2' and MASTER_ADDR is not set"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"},
            "MASTER_PORT is 'x'; it must be a whole number, from 1 to 65535",
        ),
    ],
)
@pytest.mark.fault("a launcher's variables are there in part, or wrong", "the variable is named")
def test_a_launch_that_is_described_in_part_is_refused(run, monkeypatch, environment, message):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = run()
    assert result.status == 2
    assert result.err.startswith(f"train.py: error: {message}")
    assert result.err.count("\n") == 1


def test_a_launch_of_one_is_one_process(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run(max_iters=1).status == 0
