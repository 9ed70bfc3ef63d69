"""What a machine does not have is told before anything is begun."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from model.config import preset
from training import machine
from training.config import TrainConfig, defaults
from training.errors import UserError

CPU = torch.device("cpu")


def test_a_model_larger_than_memory_is_refused_with_both_sizes(monkeypatch):
    monkeypatch.setattr(machine, "memory_bytes", lambda device: 16 * 2**30)
    machine.require_memory(defaults("124m"), CPU)
    with pytest.raises(UserError) as caught:
        machine.require_memory(defaults("llama3.1-70b"), CPU)
    assert str(caught.value) == (
        "the model (llama3.1-70b) has 70,553,706,496 parameters, which with gradients and the optimizer's moments take 1,051.3 "
        "GiB, and cpu has 16.0; choose a smaller --preset, or lower --n-layers, --dim or --vocab-size"
    )


def test_weights_larger_than_memory_are_refused_by_their_own_name(monkeypatch):
    """Not by that of the preset, whose shape is not theirs."""
    monkeypatch.setattr(machine, "memory_bytes", lambda device: 16 * 2**30)
    shape = preset("llama3.1-8b")
    config = TrainConfig(**vars(shape), init_from="weights/llama")
    with pytest.raises(
        UserError, match=r"^the model \(weights/llama\) has 8,030,261,248 parameters.*; take a smaller model$"
    ):
        machine.require_memory(config, CPU)
    with pytest.raises(UserError, match=r"^the model \(32 layers of width 4096\) has .*; take a smaller model$"):
        machine.require_memory(replace(config, init_from="resume"), CPU)
    with pytest.raises(UserError, match=r"^the model \(llama3\.1-8b\) has"):
        machine.require_memory(defaults("llama3.1-8b"), CPU)


def test_processes_that_share_a_memory_are_counted(monkeypatch):
    monkeypatch.setattr(machine, "memory_bytes", lambda device: 4 * 2**30)
    machine.require_memory(defaults("124m"), CPU, processes=2)
    with pytest.raises(UserError, match=r"take 7\.4 GiB in 4 processes"):
        machine.require_memory(defaults("124m"), CPU, processes=4)


def test_a_machine_that_does_not_say_refuses_nothing(monkeypatch):
    monkeypatch.setattr(machine, "memory_bytes", lambda device: 0)
    machine.require_memory(defaults("llama3.1-405b"), CPU)


def test_the_memory_of_a_container_is_what_it_is_given(monkeypatch):
    limits = {"memory.max": "max\n"}

    def read(path):
        if path.name not in limits:
            raise FileNotFoundError
        return limits[path.name]

    monkeypatch.setattr(machine.Path, "read_text", read)
    whole = machine.memory_bytes(CPU)
    assert whole > 2**28
    limits["memory.max"] = "1048576\n"
    assert machine.memory_bytes(CPU) == 2**20
    limits.clear()
    limits["memory.limit_in_bytes"] = "2097152\n"
    assert machine.memory_bytes(CPU) == 2**21


@pytest.fixture
def no_compilers(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)


def test_without_a_compiler_what_needs_none_runs(no_compilers):
    machine.require_compiler(TrainConfig(), CPU)
    machine.require_compiler(TrainConfig(), torch.device("cuda"))
    machine.require_compiler(TrainConfig(kernels="all"), CPU)  # the interpreter


@pytest.mark.parametrize(
    ("options", "device", "message"),
    [
        ({"compile": True}, "cpu", r"--compile needs a C\+\+ compiler, and g\+\+ was not found; .* --no-compile"),
        ({"compile": True}, "cuda", "need a C compiler, .* --no-compile --kernels none"),
        ({"kernels": "swiglu"}, "cuda", "need a C compiler"),
    ],
)
def test_without_a_compiler_what_needs_one_is_refused(no_compilers, monkeypatch, tmp_path, options, device, message):
    config, device = TrainConfig(**options), torch.device(device)
    with pytest.raises(UserError, match=message):
        machine.require_compiler(config, device)
    compiler = tmp_path / "mine"
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX" if device.type == "cpu" else "CC", "mine")
    machine.require_compiler(config, device)


def numpy_runs_out():
    np.empty(2**60, np.uint8)


def torch_runs_out():
    torch.empty(2**60, dtype=torch.uint8)


def a_gpu_runs_out():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")


@pytest.mark.parametrize("run_out", [numpy_runs_out, torch_runs_out, a_gpu_runs_out])
def test_running_out_of_memory_is_told_with_advice(run_out):
    with (
        pytest.raises(UserError, match=r"^out of memory: .*; lower it$") as caught,
        machine.out_of_memory_is_told("lower it"),
    ):
        run_out()
    assert re.search(r"allocate", str(caught.value))
    assert "\n" not in str(caught.value)


def test_another_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="shapes"), machine.out_of_memory_is_told("lower it"):
        raise RuntimeError("shapes do not match")
