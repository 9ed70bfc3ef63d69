"""PyTorch made to believe, for the rest of the process, that it has a GPU which is not there: the one place that changes torch.

`torch.compile` asks the device what it is, allocates on it, and tunes kernels by timing them; autograd asks its streams. With
tensors that have no numbers (`FakeTensorMode`) none of it is needed to compile a step, and none of it is left once these answers
are given. Each change says why it is there. They lean on parts of torch that have no promise of staying: `bench.compiled.KNOWN`
lists the versions that this was tried with, and `require` refuses others.
"""

import ctypes
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch._subclasses import FakeTensorMode, fake_tensor
from triton.backends.compiler import GPUTarget

from bench.compiled import KNOWN
from kernels.launch import TARGETS, Target
from training.errors import UserError
from training.hardware import GPUS

MODELS = {"a100": ("A100 SXM 80 GB", "sm_80"), "h100": ("H100 SXM", "sm_90"), "b200": ("B200", "sm_100")}
"""What --gpu takes: the GPU's name in training/hardware.py and its target in kernels/launch.py."""
_DEVICE_NAMES = {"a100": "NVIDIA A100-SXM4-80GB", "h100": "NVIDIA H100 80GB HBM3", "b200": "NVIDIA B200"}

# Of NVIDIA's "Technical Specifications per Compute Capability", alike for all three.
REGISTERS, THREADS, WARP, THREADS_OF_A_PROGRAM, SHARED_BY_DEFAULT = 65536, 2048, 32, 1024, 49152


def require() -> None:
    """UserError, in one line with what to do, unless this process can compile for a GPU that is not there."""
    version = torch.__version__
    install = (
        f"python -m venv cuda && cuda/bin/pip install {_wanted()} and what pyproject.toml names (no GPU is needed)"
    )
    if torch.version.cuda is None:
        raise UserError(f"bench.compiled needs a build of PyTorch with CUDA, and {version} has none: {install}")
    if version.rpartition(".")[0] not in KNOWN:
        raise UserError(
            f"bench.compiled reads the insides of PyTorch, and does not know those of {version} (it knows {', '.join(KNOWN)}): "
            f"{install}"
        )


def _wanted() -> str:
    return " or ".join(KNOWN.values())


@dataclass(frozen=True)
class Hooks:
    """What is called in the place of what would need the GPU."""

    load: Callable[[Any, Any], Any]
    """(the graph, its code with line numbers) -> a module with `call`: instead of importing what Inductor wrote."""
    launch: Callable[..., None]
    """(kernel, grid, arguments) of a Triton kernel that is launched outside of compiled code."""


def pretend(model: str, hooks: Hooks) -> None:
    """Give torch the GPU of MODELS, for good."""
    require()
    name, arch = MODELS[model]
    target = TARGETS[arch]
    properties = _properties(_DEVICE_NAMES[model], target, next(gpu for gpu in GPUS if gpu.name == name).memory)
    _autograd()
    _device(properties)
    _triton(target, hooks.launch)
    _inductor(hooks.load)


def _properties(name: str, target: Target, gigabytes: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        name=name,
        major=target.arch // 10,
        minor=target.arch % 10,
        total_memory=gigabytes * 10**9,
        multi_processor_count=target.multiprocessors,
        regs_per_multiprocessor=REGISTERS,
        max_threads_per_multi_processor=THREADS,
        max_threads_per_block=THREADS_OF_A_PROGRAM,
        warp_size=WARP,
        shared_memory_per_block=SHARED_BY_DEFAULT,
        shared_memory_per_block_optin=target.shared_memory,
        shared_memory_per_multiprocessor=target.shared_memory + 1024,
        gcnArchName="",
        L2_cache_size=50 << 20,
        uuid="none",
    )


# ------------------------------------------------------------------------------------------------------------ one by one


def _autograd() -> None:
    """The engine guards each call with the device's streams, and asks first whether a device is in use: it is not.

    The guard that does nothing is torch's own, of FakeTensorMode where there is no GPU. The question has no switch: its code, at
    the address that libtorch_cuda gave to libc10_cuda, is written over with "return false". One thread, as the engine's own would
    wait for a device.
    """
    FakeTensorMode.avoid_device_init = property(_always(True))
    fake_tensor.init_gpu_context = _always(None)
    libc10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10_cuda.so"))
    setter = ctypes.cast(libc10[_SETTER], ctypes.c_void_p).value
    store = ctypes.string_at(setter, 32).find(_STORE)
    if store < 0:
        raise UserError(f"bench.compiled: {_SETTER} of this build of PyTorch is not as expected: it wants {_wanted()}")
    end = (
        setter + store + len(_STORE) + 4
    )  # where the instruction ends; its last four bytes say how far from there it stores
    variable = end + ctypes.c_int32.from_address(end - 4).value
    question = ctypes.c_void_p.from_address(variable).value
    page, both = question & -4096, 2 * 4096
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), both, 7):  # read, write and run
        raise UserError(
            "bench.compiled: this system lets no program change its own code, which PyTorch without a GPU needs"
        )
    ctypes.memmove(question, _RETURN_FALSE, len(_RETURN_FALSE))
    torch.autograd.set_multithreading_enabled(False).__enter__()


_SETTER = "_ZN3c104cuda9_internal20setHasPrimaryContextEPFbaE"
_STORE = b"\x48\x89\x3d"  # mov [rip + ...], rdi
_RETURN_FALSE = b"\x31\xc0\xc3"  # xor eax, eax; ret


def _device(properties: types.SimpleNamespace) -> None:
    """What Dynamo, Inductor and our launchers ask of the device, and the calls that would start it."""
    from torch._dynamo.device_interface import CudaInterface

    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "get_device_capability": (properties.major, properties.minor),
        "get_device_name": properties.name,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "_lazy_init": None,
        "synchronize": None,
        "is_current_stream_capturing": True,  # asked by torch's AdamW, which warns where it is not
        "set_device": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),  # Dynamo puts it back after tracing
        "set_rng_state": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, _always(answer))
    torch._C._cuda_getCurrentRawStream = _always(0)
    torch.from_dlpack = torch.empty_like  # a second tensor of the same memory, of which there is none
    for interface in (CudaInterface, CudaInterface.Worker):
        interface.get_device_properties = staticmethod(_always(properties))
        interface.current_device = staticmethod(_always(0))
    CudaInterface.is_available = staticmethod(_always(True))
    CudaInterface.get_compute_capability = staticmethod(_always(properties.major * 10 + properties.minor))


def _always(answer: Any) -> Callable[..., Any]:
    return lambda *_, **__: answer


def _triton(target: Target, launch: Callable[..., None]) -> None:
    """A driver that says which GPU to compile for, and launches that are handed over."""

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget(target.backend, target.arch, target.warp_size)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        def get_current_device(self) -> int:
            return 0

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launch(kernel, grid, dict(zip(kernel.arg_names, arguments, strict=False)) | named)

    triton.runtime.driver.set_active(Driver())
    triton.runtime.jit.JITFunction.run = run
    # Answers that were remembered before there was a driver.
    for function in vars(torch.utils._triton).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def _inductor(load: Callable[[Any, Any], Any]) -> None:
    """Inductor writes its code, and leaves the rest to us; it asks no device for numbers meanwhile."""
    from torch._inductor import config, graph
    from torch._inductor.fx_passes import fuse_attention

    config.force_disable_caches = True  # what it wrote for this GPU is of no use to a run, nor the other way round
    config.compile_threads = 1  # other processes would have their torch unchanged
    config.use_static_cuda_launcher = False  # keeps a kernel's code only as what the GPU has loaded
    config.joint_graph_constant_folding = False  # computes constants on the device
    fuse_attention._sfdp_init = _always(None)  # traces its patterns with tensors that have numbers
    graph.GraphLowering._compile_to_module_lines = lambda lowered, code: load(lowered, code)
