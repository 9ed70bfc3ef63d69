"""Kernel tests run compiled where there is a GPU and in Triton's interpreter where there is none; this file chooses."""

import os

import pytest
import torch

# Triton reads the variable when a kernel is defined: it must be set before any test imports kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Models so small lose time with more threads, most of all beside another test process.
torch.set_num_threads(1)


def pytest_configure(config):
    # The interpreter computes in NumPy, which warns of the overflows and NaNs that some tests are about.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture
def determinism_put_back():
    """For tests of programs that switch deterministic algorithms on, which holds for the whole process."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)
