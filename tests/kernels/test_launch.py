import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from kernels import launch, rms_norm, rope, swiglu
from kernels.launch import TARGETS

ROOT = Path(__file__).parents[2]


def run_python(code, **environment):
    """Run `code` in a fresh process with neither interpreter nor GPU, unless `environment` says otherwise."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=inherited | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
    )


def test_without_triton_the_op_files_import_and_only_their_kernels_complain():
    code = """
import sys
sys.modules["triton"] = None  # what an import finds where it is not installed
import torch
from kernels import rms_norm, rope, swiglu
x, table = torch.ones(2, 8), torch.ones(3, 4)
qkv = torch.ones(2, 3, 3 * 8)
arguments = {
    "rms_norm": (rms_norm.rms_norm_torch, rms_norm.rms_norm_triton, (x, x[0], 1e-5)),
    "add_rms_norm": (rms_norm.add_rms_norm_torch, rms_norm.add_rms_norm_triton, (x, x, x[0], 1e-5)),
    "rope": (rope.rope_torch, rope.rope_triton, (qkv, table, table, 1, 1)),
    "swiglu": (swiglu.swiglu_torch, swiglu.swiglu_triton, (x,)),
}
for op, (torch_op, triton_op, args) in arguments.items():
    torch_op(*args)
    try:
        triton_op(*args)
    except RuntimeError as error:
        assert str(error).startswith(op + ": Triton is not installed") and "kernels.TORCH" in str(error), error
    else:
        raise AssertionError(op)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_on_a_cpu_without_the_interpreter_the_error_names_both_ways_on():
    code = "import torch; from kernels.swiglu import swiglu_triton; swiglu_triton(torch.ones(2, 8))"
    done = run_python(code)
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith("RuntimeError: swiglu: ")
    assert "use kernels.TORCH" in message
    assert "set TRITON_INTERPRET=1 before" in message
    assert run_python(code, TRITON_INTERPRET="1").returncode == 0


def test_record_launches_lists_what_forward_and_backward_launch_without_a_gpu():
    code = """
import torch
from kernels.launch import TARGETS, record_launches
from kernels.rms_norm import add_rms_norm_triton, _rms_norm_forward_kernel, _rms_norm_backward_kernel
x, residual = (torch.empty(2**20, 288, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
weight = torch.empty(288, device="meta", requires_grad=True)
for target in TARGETS.values():
    with record_launches(target) as launches:
        y, summed = add_rms_norm_triton(x, residual, weight, 1e-5)
        torch.autograd.backward((y, summed), (torch.empty_like(y), torch.empty_like(summed)))
    forward, backward = launches
    assert forward.kernel is _rms_norm_forward_kernel and backward.kernel is _rms_norm_backward_kernel
    assert forward.arguments["D"] == 288 and forward.arguments["x_ptr"].dtype == torch.bfloat16
    assert backward.arguments["partial_ptr"].shape == (*backward.grid, 288)
    assert backward.grid[0] % target.multiprocessors == 0
    assert set(forward.arguments) == set(forward.kernel.arg_names)
    assert set(backward.arguments) == set(backward.kernel.arg_names)
with record_launches(TARGETS["sm_90"]) as launches:
    pass
assert launches == []
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_on_a_gpu_torch_compile_sees_the_kernels_themselves():
    # No GPU: a stand-in driver lets PyTorch read a kernel's code for what it writes, and no graph is ever run.
    code = """
import torch, triton
from triton.backends.compiler import GPUTarget
class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
triton.runtime.driver.set_active(Driver())
from kernels import launch, rms_norm, rope, swiglu
for module in (rms_norm, rope, swiglu):
    module.check_usable = lambda *_: None
    module.target_of = lambda _: launch.TARGETS["sm_90"]

def function(x, residual, weight, cos, sin):
    y, summed = rms_norm.add_rms_norm_triton(x, residual, weight, 1e-5)
    y = rms_norm.rms_norm_triton(y, weight, 1e-5)
    q, k, v = rope.rope_triton(y + summed, cos, sin, 2, 1)
    return swiglu.swiglu_triton(q.flatten(2)).sum() + swiglu.swiglu_triton(k.flatten(2)).sum() + v.sum()

class Seen(BaseException):
    pass

def seen(graph, inputs):
    nodes = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert not [name for name in nodes if name.startswith("triton_llama")], nodes
    raise Seen(sum(name == "triton_kernel_wrapper_functional" for name in nodes))

from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition
inputs = [torch.empty(2, 3, 64, requires_grad=True), torch.empty(2, 3, 64), torch.ones(64), *torch.ones(2, 3, 8)]
for dynamic in (False, True):
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=seen, bw_compiler=seen, partition_fn=default_partition)
    try:
        torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    except Seen as kernels:
        assert kernels.args == (5,), kernels
    else:
        raise AssertionError("nothing was compiled")
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


WIDTHS = [1, 3, 36, 64, 288, 768, 1000, 2048, 2816, 4096, 8192, 8193, 16384, 53248]


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_launches_cover_every_element_with_tiles_a_program_can_hold(target):
    for rows, width in product((1, 37, 10**6), WIDTHS):
        check_launches(rows, width, target)


def check_launches(rows, width, target):
    launches = {
        "norm": rms_norm.forward_launch(rows, width, target),
        "norm backward": rms_norm.backward_launch(rows, width, target),
        "swiglu": swiglu.elementwise_launch(rows, width, target),
        "rope": rope.rope_launch(rows, 8, 2, 2 * width, target),
    }
    for chosen in launches.values():
        elements = 1
        for size in chosen.tiles.values():
            assert size & (size - 1) == 0
            elements *= size
        threads = chosen.num_warps * target.warp_size
        assert chosen.num_warps & (chosen.num_warps - 1) == 0
        assert threads <= 1024
        assert elements <= 128 * threads
        assert 1 <= chosen.grid[0] < 2**31
        assert chosen.options == {**chosen.tiles, "num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    assert launches["norm"].grid[0] * launches["norm"].tiles["BLOCK_M"] >= rows
    tiles = launches["swiglu"].tiles
    assert launches["swiglu"].grid[0] * tiles["BLOCK_M"] * tiles["BLOCK_F"] >= rows * width
    tiles = launches["rope"].tiles
    assert launches["rope"].grid[0] * tiles["BLOCK_T"] * tiles["BLOCK_H"] >= rows * 10
    assert tiles["BLOCK_D"] >= width


def test_the_backward_of_the_norm_takes_a_fixed_number_of_programs():
    target = TARGETS["sm_90"]
    programs = {
        width: rms_norm.backward_launch(10**6, width, target).grid[0] / 132 for width in (256, 1024, 2048, 4096)
    }
    assert programs == {256: 4, 1024: 4, 2048: 4, 4096: 2}
    assert rms_norm.backward_launch(3, 4096, target).grid == (3,)


@pytest.mark.parametrize(
    ("strides", "expected"),
    [
        ({"a": 288, "b": 64}, {"a": 18, "b": 4, "ALIGNMENT": 16}),
        ({"a": 1000, "b": 0}, {"a": 125, "b": 0, "ALIGNMENT": 8}),
        ({"a": 36, "b": 6}, {"a": 18, "b": 3, "ALIGNMENT": 2}),
        ({"a": 7}, {"a": 7, "ALIGNMENT": 1}),
    ],
)
def test_strides_are_counted_in_the_largest_unit_they_share(strides, expected):
    assert launch.aligned_strides(**strides) == expected


def test_dense_rows_copies_only_what_cannot_be_viewed():
    x = torch.arange(48.0).view(2, 3, 8)
    for view, copied in ((x, False), (x[:, :, 2:6], False), (x[:, 1], False), (x[:, 1:], True), (x[..., ::2], True)):
        rows = launch.dense_rows(view)
        assert torch.equal(rows, view.reshape(-1, view.shape[-1]))
        assert rows.stride(-1) == 1
        assert (rows.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()) == copied
    one_value = x[:1, 0, :1].expand(6, 8)
    assert launch.dense_rows(one_value).stride() == (8, 1)
    assert launch.dense_rows(x[0, 0].expand(6, 8)).stride() == (0, 1)  # a broadcast row stays one


def test_the_machine_is_the_one_whose_tiles_are_measured_or_most_like_it():
    found = {name: launch.machine_of(2, target) for name, target in TARGETS.items()}
    assert found == {"sm_80": "sm_80", "sm_90": "sm_90", "sm_100": "sm_100", "gfx942": "hip"}
    assert {launch.machine_of(4, target) for target in TARGETS.values()} == {"float32"}
    assert launch.machine_of(4, launch.INTERPRETER) == launch.machine_of(2, launch.INTERPRETER) == "interpreter"
    others = {arch: launch.machine_of(2, launch.Target("cuda", arch, 1, 1)) for arch in (75, 89, 103, 120)}
    assert others == {75: "sm_80", 89: "sm_80", 103: "sm_100", 120: "sm_80"}


def test_warps_count_threads_not_elements():
    nvidia, amd = TARGETS["sm_90"], TARGETS["gfx942"]
    assert [launch.warps_for(n, 16, nvidia) for n in (1, 512, 2048, 2**20)] == [1, 1, 4, 16]
    assert [launch.warps_for(n, 16, amd) for n in (1, 512, 2048, 2**20)] == [1, 1, 2, 8]
    assert launch.warps_for(2**20, 16, nvidia, most=8) == 8


def test_powers_of_two_and_rounded_up_quotients():
    assert [launch.next_power_of_2(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
    assert [launch.ceil_div(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
