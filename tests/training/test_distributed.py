"""Many processes train as one does: the same data, losses and parameters. Two of them, joined by gloo on this machine."""

import socket

import pytest
import torch

import train
from tests.support.run_testing import TINY, Result, arguments, call, finish, records, start, wait_until, write_text
from training.checkpoint import files as checkpoint
from training.config import TrainConfig
from training.distributed import World, join
from training.errors import UserError


def start_two(words: list[str]) -> list:
    """train.py as torchrun starts it, in two processes."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [start("train.py", words, RANK=rank, LOCAL_RANK=rank, **shared) for rank in ("0", "1")]


@pytest.fixture
def options(tmp_path) -> dict:
    return TINY | {"data": write_text(tmp_path / "text.txt"), "data_dir": tmp_path / "data", "eval_iters": 3}


def test_two_processes_train_as_one(tmp_path, options):
    """They also prepare the data, which nothing has prepared before."""
    options |= {"gradient_accumulation_steps": 2, "learning_rate": 0.01}
    results = [finish(process) for process in start_two(arguments(**options, out_dir=tmp_path / "two"))]
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
    processes = start_two(arguments(**options, out_dir=out_dir))
    wait_until(lambda: len(records(out_dir, "step")) > 3, processes[0])
    processes[1].terminate()
    results = [finish(process) for process in processes]
    assert [(result.status, result.err) for result in results] == [(0, ""), (0, "")]
    done = len(records(out_dir, "step"))
    assert f"stopping after step {done - 1}, as asked" in results[0].out
    assert checkpoint.load(out_dir).step == done


def test_micro_steps_that_do_not_divide_among_the_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--gradient-accumulation-steps 3 is not divisible by the 2 processes"):
        join(TrainConfig(gradient_accumulation_steps=3))


def test_one_process_is_a_world_of_its_own(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = join(TrainConfig(gradient_accumulation_steps=3))
    assert world == World(rank=0, size=1, local_rank=0)
    assert world.is_main
    tensor = torch.ones(3)
    world.sum(tensor)
    world.wait()
    assert tensor.tolist() == [1, 1, 1]
    assert world.total(5, torch.device("cpu")) == 5
    assert world.any(True, torch.device("cpu"))
    assert not world.any(False, torch.device("cpu"))
    with world.main_first():
        pass
