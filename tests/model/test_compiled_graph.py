"""What is left of PyTorch's own ops in the graph of a fused step, on any build of PyTorch and without a GPU.

Dynamo and autograd trace the step to one graph, forward and backward, in which our kernels are nodes. All nodes that compute, copy
or cast are in a committed list: a new one is named here, and so is one that is no longer there. After a change that is meant to:
`python -m tests.model.test_compiled_graph` writes the list.
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

from tests.support.step_testing import make_trainer

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
        if "auto_functionalized" in str(node.target):  # an op that writes to an argument
            ops[node.args[0]._schema.name.partition("::")[2]] += 1
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or any(x.alias_info is not None for x in schema.returns):
            continue  # a view, or a part of a tuple
        name = schema.name.partition("::")[2]
        if name.startswith("empty") or name == "_unsafe_view":
            continue
        value = node.meta.get("val")
        made = [x for x in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(x, torch.Tensor)]
        ops[f"{name} -> {', '.join(map(shape, made))}"] += 1
    raise Seen(dict(ops))

torch.use_deterministic_algorithms(True)
found = {}
for case in ("plain documents", "packed documents"):
    torch._dynamo.reset()
    trainer = make_trainer(torch.bfloat16, "all")
    step = torch.compile(
        trainer._loss_sum, fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=None, partition_fn=partition)
    )
    tokens, targets = (torch.zeros(4, 32, dtype=torch.int64) for _ in range(2))
    first_key = torch.zeros(4, 32, dtype=torch.int32) if case == "packed documents" else None
    try:
        step(tokens, targets, first_key, torch.ones(()))  # with a scale, as a trainer calls it
    except Seen as seen:
        found[case] = seen.args[0]
print(json.dumps(found))
"""


def left() -> dict[str, dict[str, int]]:
    """How often each node comes, by the case."""
    done = run_python(CODE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed here")
def test_a_fused_step_leaves_pytorch_only_what_the_list_names():
    found, listed = left(), json.loads(FILE.read_text())
    assert list(found) == list(listed)
    for case, nodes in found.items():
        more = {name: n - listed[case].get(name, 0) for name, n in nodes.items() if n > listed[case].get(name, 0)}
        less = {name: n - nodes.get(name, 0) for name, n in listed[case].items() if n > nodes.get(name, 0)}
        assert not more, f"{case}: new in the graph: {more}"
        assert not less, f"{case}: no longer in the graph; write the list anew: {less}"


def test_the_list_holds_no_copy():
    for nodes in json.loads(FILE.read_text()).values():
        assert not [name for name in nodes if name.startswith(("clone", "copy", "cat", "index_put"))]


if __name__ == "__main__":
    FILE.write_text(json.dumps(left(), indent=1) + "\n")
