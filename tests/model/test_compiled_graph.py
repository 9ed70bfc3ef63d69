"""What is left of PyTorch's own ops in the graph of a fused step, on any build of PyTorch and without a GPU.

Dynamo and autograd trace the step to one graph, forward and backward, in which Inductor's decompositions are done and our kernels
are nodes. All nodes that compute, copy or cast are in a committed list: a new one is named here, and so is one that is no longer
there. After a change that is meant to: `python -m tests.model.test_compiled_graph` writes the list.
"""

import json
from pathlib import Path

import pytest

from kernels.launch import HAVE_TRITON
from tests.kernels.test_launch import run_python

FILE = Path(__file__).with_name("compiled_graph.json")

# In a process of its own, whose kernels are not the interpreter's: there PyTorch sees them. They are never run.
CODE = """
import importlib, json, pkgutil
from collections import Counter
import torch, triton
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._inductor.decomposition import select_decomp_table
from triton.backends.compiler import GPUTarget

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())

import kernels
from kernels.launch import TARGETS
for found in pkgutil.walk_packages(kernels.__path__, "kernels."):
    module = importlib.import_module(found.name)
    for name, stand_in in {"check_usable": lambda *_: None, "target_of": lambda _: TARGETS["sm_90"]}.items():
        if hasattr(module, name):
            setattr(module, name, stand_in)

from tests.support.step_testing import make_trainer, micro_batches

class Seen(BaseException):
    pass

def shape(x):
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"

def partition(joint, inputs, **options):
    joint.graph.eliminate_dead_code()
    ops = Counter()
    for node in joint.graph.nodes:
        if "triton_kernel_wrapper_functional" in str(node.target):
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            ops[getattr(kernel, "fn", kernel).__name__] += 1
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or any(x.alias_info is not None for x in schema.returns):
            continue  # a view, or a part of a tuple
        value = node.meta.get("val")
        made = [x for x in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(x, torch.Tensor)]
        ops[f"{schema.name.partition('::')[2]} -> {', '.join(map(shape, made))}"] += 1
    raise Seen(dict(ops))

torch.use_deterministic_algorithms(True)
trainer = make_trainer(torch.bfloat16, "SPEC")
step = torch.compile(
    trainer._loss_sum, fullgraph=True, dynamic=False,
    backend=aot_autograd(fw_compiler=None, partition_fn=partition, decompositions=select_decomp_table()),
)
try:
    step(*micro_batches(0)[0])
except Seen as seen:
    print(json.dumps(seen.args[0]))
"""


def left(spec: str) -> dict[str, int]:
    done = run_python(CODE.replace("SPEC", spec))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(left("all"), indent=1))
