"""Kernel tests run compiled where there is a GPU and in Triton's interpreter where there is none; this file chooses."""

import os
from pathlib import Path

import pytest
import torch

# Triton reads the variable when a kernel is defined: it must be set before any test imports kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What cuBLAS asks for to be deterministic: torch reads it at the first product of a process and never again.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Models so small lose time with more threads, most of all beside another test process.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def the_feed_forward_kernel_on_any_rows():
    """Models that tests train have fewer than it is meant for on a GPU."""
    from kernels.mlp.op import on_any_rows

    with on_any_rows():
        yield


@pytest.fixture
def determinism_put_back():
    """For tests of programs that switch deterministic algorithms on, which holds for the whole process."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> dict[str, Path]:
    """Options of train.py that name a text and a folder where it is prepared, once for all runs."""
    from tests.support.run_testing import write_text

    folder = tmp_path_factory.mktemp("text")
    return {"data": write_text(folder / "text.txt"), "data_dir": folder / "data"}


@pytest.fixture
def run(tmp_path, text):
    """A run of train.py in this process; into tmp_path / "out" unless told otherwise."""
    import train
    from tests.support.run_testing import TINY, arguments, call

    def run(**options):
        return call(train, arguments(**TINY | text | {"out_dir": tmp_path / "out"} | options))

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory, text):
    """A run of train.py that went to its end, and its folder."""
    import train
    from tests.support.run_testing import TINY, arguments, call

    out_dir = tmp_path_factory.mktemp("finished") / "out"
    return out_dir, call(train, arguments(**TINY | text | {"out_dir": out_dir, "tensorboard": True}))
