"""What PyTorch takes for written by a kernel is what the kernel writes.

PyTorch finds the arguments that a kernel writes in Triton's first intermediate code, before a GPU is asked. A pointer that it takes
for written without need is copied in every compiled step where its tensor is needed afterwards; one that it misses makes wrong
numbers. What a kernel does write is read in its machine code, from the address of each store back to the argument.
"""

import json

import pytest

from kernels.launch import HAVE_TRITON
from tests.kernels.test_launch import run_python

pytestmark = pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed here")

# In a process of its own: kernels that were defined in the interpreter can't be compiled. A stand-in driver names the GPU.
PRELUDE = """
import json
import torch, triton
from torch import Tensor
from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors, kernel_side_table
from triton.backends.compiler import GPUTarget

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())

from bench.machine_code.build import compile_specialized, narrowest_accesses, specialize
from kernels.launch import TARGETS, LaunchRecord

TARGET = TARGETS["sm_90"]

def believed(launched):
    tensors = {name: x for name, x in launched.arguments.items() if isinstance(x, Tensor)}
    others = {name: x for name, x in launched.arguments.items() if name not in tensors}
    kernel, constants = kernel_side_table.add_kernel(launched.kernel), kernel_side_table.add_constant_args(others)
    return sorted(get_mutated_tensors(kernel, constants, tensors, {}))

def written(specialized):
    names = [name for name, kind in specialized.source.signature.items() if kind != "constexpr"]
    return sorted(narrowest_accesses(compile_specialized(specialized).asm["llir"], names)[1])
"""

EVERY_KERNEL = """
import importlib, pkgutil
import kernels
from bench.machine_code.rows import launches
from bench.ops.catalogue import SHEETS
from training.config import defaults
from triton.runtime.jit import JITFunction

found, seen = [], {}
for case in SHEETS:
    for direction, launched in launches(case, defaults("reference"), TARGET):
        specialized = specialize(launched, TARGET)
        if specialized.key not in seen:
            seen[specialized.key] = launched.kernel.__name__
            name = f"{case} {direction}: {launched.kernel.__name__}"
            found.append((name, believed(launched), written(specialized)))
modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(kernels.__path__, "kernels.")]
here = {name for m in modules for name, x in vars(m).items() if isinstance(x, JITFunction) and name.endswith("_kernel")}
print(json.dumps([found, sorted(here - set(seen.values()))]))
"""

# SwiGLU's helper as it once was: given the pointer, it returns the rows and columns that the store's address is made of.
HANDED_OVER = """
import triton
import triton.language as tl

@triton.jit
def _load(x_ptr, n, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return tl.load(x_ptr + cols, cols < n), cols

@triton.jit
def _double_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    x, cols = _load(x_ptr, n, BLOCK)
    tl.store(y_ptr + cols, 2 * x, cols < n)
"""

ONE_KERNEL = """
import sys
from double import _double_kernel
x, y = torch.empty(2, 4096, device="meta")
launched = LaunchRecord(_double_kernel, (4,), {"x_ptr": x, "y_ptr": y, "n": 4096, "BLOCK": 1024}, 4, 2)
print(json.dumps([believed(launched), written(specialize(launched, TARGET))]))
"""


def answer(code: str, **environment: str):
    """What the code prints last."""
    done = run_python(PRELUDE + code, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_pytorch_believes_written_is_what_each_kernel_writes():
    launches, not_launched = answer(EVERY_KERNEL)
    assert not_launched == []  # each kernel has a case in bench.machine_code
    wrong = [f"{name}: PyTorch says {says}, it writes {does}" for name, says, does in launches if says != does]
    assert wrong == []


def test_a_pointer_handed_to_a_helper_that_makes_the_address_of_a_store_shows(tmp_path):
    (tmp_path / "double.py").write_text(HANDED_OVER)
    says, does = answer(ONE_KERNEL, PYTHONPATH=str(tmp_path))
    assert says == ["x_ptr", "y_ptr"]  # what the test above refuses; where this fails, PyTorch has become better
    assert does == ["y_ptr"]
