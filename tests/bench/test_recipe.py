"""A new op, end to end, as KERNELS.md tells it: whatever place a kernel file is still missing from, a test here names it."""

import re
from pathlib import Path

import pytest
import torch

import kernels
from bench.ops.catalogue import SHEETS
from bench.parity.op_errors import record
from bench.waterfall.measured import cause
from kernels import grammar
from kernels.ops import FIELDS, OUTPUTS
from model import Llama, LlamaConfig
from model.flops import step_costs

ROOT = Path(__file__).parents[2]
SHARED = {"__init__", "launch", "grammar", "ops", "linear", "rows"}
KERNEL_FILES = sorted(
    path.stem
    for path in (ROOT / "kernels").iterdir()
    if path.stem not in SHARED and (path.suffix == ".py" or (path / "op.py").is_file())
)
OPS_OF_A_MODEL = [file for file in KERNEL_FILES if file not in grammar.RUN_SWITCHES]
SHAPE = LlamaConfig(vocab_size=300, max_seq_len=8, dim=32, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=48)


def ops_of(file):
    """The fields of `Ops` that the switch of a kernel file turns."""
    return FIELDS.get(file, (file,))


def counted_as(file):
    """The op of `model.flops` that a kernel file is of."""
    return "optimizer" if file in grammar.RUN_SWITCHES else file


@pytest.mark.parametrize("file", KERNEL_FILES)
def test_it_has_a_switch(file):
    assert file in grammar.SWITCHES, f"kernels/grammar.py has no switch {file}"


@pytest.mark.parametrize("file", OPS_OF_A_MODEL)
def test_it_has_a_field_of_ops(file):
    for op in ops_of(file):
        for name, ops in (("TORCH", kernels.TORCH), ("TRITON", kernels.TRITON)):
            assert callable(getattr(ops, op, None)), f"kernels/ops.py has no {op} in {name}"
        assert op in OUTPUTS, f"kernels/ops.py does not say what {op} returns (OUTPUTS)"


@pytest.mark.parametrize("file", KERNEL_FILES)
def test_its_kernels_bear_its_name(file):
    """By it a profile's kernels are told apart, and counted as their op's."""
    path = ROOT / "kernels" / file
    text = "".join(part.read_text() for part in ([*path.glob("*.py")] if path.is_dir() else [path.with_suffix(".py")]))
    names = re.findall(r"^@triton\.jit\ndef (_\w+_kernel)\(", text, re.MULTILINE)
    assert names, f"kernels/{file} has no kernel called _{file}_..._kernel"
    for name in names:
        assert cause(name) == counted_as(file), f"{name} of kernels/{file} is to be called _{file}_..._kernel"


@pytest.mark.parametrize("file", OPS_OF_A_MODEL)
def test_the_model_calls_it(file):
    model = Llama(SHAPE, kernels.select("none", 1))
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    called = {call.op for call in record(model, lambda: model(tokens, tokens).backward())}
    assert set(ops_of(file)) & called, f"model/llama.py does not call {file}"


@pytest.mark.parametrize("file", KERNEL_FILES)
def test_its_bytes_are_counted(file):
    assert counted_as(file) in step_costs(SHAPE, 1, 1), f"model/flops.py has no costs of {file}"


@pytest.mark.parametrize("file", KERNEL_FILES)
def test_it_has_a_sheet(file):
    assert (ROOT / "bench" / "ops" / f"{file}.py").is_file(), f"there is no bench/ops/{file}.py"
    for op in ops_of(file):
        assert op in SHEETS, f"bench/ops/{file}.py has no sheet of {op}"
        assert {"eager", "triton"} <= set(SHEETS[op].peers), f"bench/ops/{file}.py has no twins of {op}"


@pytest.mark.parametrize("file", KERNEL_FILES)
def test_it_has_tests(file):
    assert (ROOT / "tests" / "kernels" / f"test_{file}.py").is_file(), f"there is no tests/kernels/test_{file}.py"
