"""What the Triton ops share: Triton itself or its absence, the target, the tiles' arithmetic, registration, checks.

Nothing here knows one op. An op file takes from here

- `triton`, `tl`: the packages, or stand-ins where there is no Triton, so that every op file can be imported anywhere;
- `register_op`, `wrap_triton`: how a launcher becomes a PyTorch op that `torch.compile` takes into its graph;
- `Target`, `target_of`, `machine_of`, `Launch`: a launch is a value, chosen by a pure function of sizes and target;
- `record_launches`: runs launchers on the meta device for any target and lists what they would have launched;
- `check_tensor`, `check_usable`, `check_first_derivative`: the `ValueError` of bad input, the `RuntimeError` where kernels cannot
  run, or a gradient cannot be differentiated.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Absent:
        """Stands in for `triton` and `tl` while the op files are imported."""

        def __getattr__(self, name: str) -> "_Absent":
            return self

        def __call__(self, function: Callable) -> Callable:
            return function

    triton = tl = _Absent()
    HAVE_TRITON = INTERPRETED = False
else:
    HAVE_TRITON = True
    # Triton reads the variable when a kernel is defined, that is when the op file is imported; so do we, once.
    INTERPRETED: bool = triton.knobs.runtime.interpret

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REFERENCE_DTYPES = (*KERNEL_DTYPES, torch.float64)
"""What the torch twins take as well: in float64 they are the yardstick of the tests."""


# --------------------------------------------------------------------------------------------------------------- target


@dataclass(frozen=True)
class Target:
    """What a launch choice may know of the device: a pure value, so that choices can be made and tested for any GPU."""

    backend: str
    """`cuda`, `hip`, or `interpreter`."""
    arch: int | str
    """Compute capability times ten (90 is sm_90), or AMD's name (`gfx942`)."""
    multiprocessors: int
    shared_memory: int
    """Bytes one program may use."""
    warp_size: int = 32


TARGETS = {
    "sm_80": Target("cuda", 80, multiprocessors=108, shared_memory=166_912),
    "sm_90": Target("cuda", 90, multiprocessors=132, shared_memory=232_448),
    "sm_100": Target("cuda", 100, multiprocessors=148, shared_memory=232_448),
    "gfx942": Target("hip", "gfx942", multiprocessors=304, shared_memory=65_536, warp_size=64),
}
"""A100, H100, B200 and MI300X by their datasheets: to build and read machine code where there is none of them."""

# Few, so that the loops of persistent programs take more than one turn in a small test.
INTERPRETER = Target("interpreter", "cpu", multiprocessors=1, shared_memory=232_448)


@functools.cache
def _device_target(index: int) -> Target:
    device = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = device.gcnArchName.split(":")[0]
        return Target("hip", arch, device.multi_processor_count, device.shared_memory_per_block, device.warp_size)
    arch = device.major * 10 + device.minor
    return Target("cuda", arch, device.multi_processor_count, device.shared_memory_per_block_optin, device.warp_size)


def target_of(tensor: Tensor) -> Target:
    """The target that launches on `tensor` are chosen for.

    Called inside op bodies only, which Dynamo does not trace: a query of the device breaks a graph.
    """
    return target_at(tensor.device)


def target_at(device: torch.device) -> Target:
    """As `target_of`, of what is on a device."""
    if _recording is not None:
        return _recording.target
    if INTERPRETED:
        return INTERPRETER
    return _device_target(torch.cuda.current_device() if device.index is None else device.index)


def machine_of(itemsize: int, target: Target) -> str:
    """The machine whose row of a table of tiles serves a target, for elements of so many bytes.

    `sm_80`, `sm_90`, `sm_100`, `hip`, or `float32`, which has no tensor core on any of them; `interpreter`.
    """
    if target.backend == "interpreter":
        return "interpreter"
    if itemsize == 4:
        return "float32"
    if target.backend == "hip":
        return "hip"
    if 90 <= target.arch < 120:
        return "sm_90" if target.arch < 100 else "sm_100"
    return "sm_80"  # and sm_86, sm_89 and sm_120, which multiply like it and have less shared memory


# --------------------------------------------------------------------------------------------------------------- launch


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: its grid, its tile sizes, its warps and its pipeline stages."""

    grid: tuple[int, ...]
    tiles: dict[str, int]
    num_warps: int
    num_stages: int = 2

    @property
    def options(self) -> dict[str, int]:
        """The keyword arguments of the launch."""
        return {**self.tiles, "num_warps": self.num_warps, "num_stages": self.num_stages}


def ceil_div(a: int, b: int) -> int:
    """ceil(a / b), of integers or of traced sizes."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def warps_for(elements: int, per_thread: int, target: Target, most: int = 16) -> int:
    """Warps for a tile of so many elements at so many a thread: a power of two, `most` of 32 threads at most."""
    threads = max(target.warp_size, min(elements // per_thread, 32 * most))
    return threads // target.warp_size


def aligned_strides(**strides: int) -> dict[str, int]:
    """Strides (in elements) in units of ALIGNMENT, their largest common power of two up to 16, and ALIGNMENT itself.

    A kernel that computes `row * x_stride * ALIGNMENT` thereby knows that its rows start at multiples of it. Triton by
    itself only tells strides that are multiples of 16 from the rest, and would load rows of 1000 element by element.
    """
    unit = next(n for n in (16, 8, 4, 2, 1) if all(stride % n == 0 for stride in strides.values()))
    return {name: stride // unit for name, stride in strides.items()} | {"ALIGNMENT": unit}


def bth_strides(**tensors: Tensor) -> dict[str, int]:
    """NAME_stride_b, NAME_stride_t and NAME_stride_h of each (B, T, heads, D), in units of their common ALIGNMENT."""
    return aligned_strides(
        **{f"{name}_stride_{dim}": x.stride(i) for name, x in tensors.items() for i, dim in enumerate("bth")}
    )


def dense_rows(x: Tensor) -> Tensor:
    """`x` (..., D) as (rows, D) with a dense last dim: a view where the strides allow it, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.shape[-1] == 1 or rows.stride(-1) == 1 else rows.contiguous()


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one: Triton launches there, and it need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


# --------------------------------------------------------------------------------------------------------- registration

NAMESPACE = "triton_llama"


def register_op(fake: Callable, mutates: tuple[str, ...] = ()) -> Callable[[Callable], Any]:
    """Register the decorated launcher as `torch.ops.triton_llama.<its name>`; `fake` makes outputs of the same kind.

    mutates: the arguments that the launcher writes to; it must write to no other.

    Two registrations, chosen once, at import. On a GPU it is a `triton_op`: `torch.compile` looks through it, Inductor
    calls the kernel itself and plans its buffers, and no dispatcher (measured on a CPU: 33 us a forward call for a custom op,
    16.5 us for a bare `define` and `impl`) stands between the kernels of a compiled step; eager calls pay it. In the interpreter
    there is nothing to look into: of all integrations only an opaque `custom_op` works there under `torch.compile`.
    The launcher, the autograd formula and the call are one code path.
    """

    def register(launcher: Callable) -> Any:
        name = f"{NAMESPACE}::{launcher.__name__.lstrip('_')}"
        if not HAVE_TRITON:
            return _Unregistered()
        if not INTERPRETED:
            return torch.library.triton_op(name, launcher, mutates_args=mutates)
        op = torch.library.custom_op(name, launcher, mutates_args=mutates)
        op.register_fake(fake)
        return op

    return register


class _Unregistered:
    """An op where there is no Triton: takes its autograd formula and is never called (`check_usable` raises before)."""

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        pass


def wrap_triton(kernel: Any) -> Any:
    """The kernel, to be launched as `wrap_triton(kernel)[grid](...)` inside a registered launcher.

    Called by this bare name: PyTorch looks for it in the launcher, to make the kernels' source part of its cache's key.
    """
    if _recording is not None:
        return _Recorder(kernel, _recording.launches)
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


# ------------------------------------------------------------------------------------------------------------ recording


@dataclass(frozen=True)
class LaunchRecord:
    """One launch as `record_launches` saw it: `arguments` by parameter name, tiles and other constexprs among them."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclass
class _Recording:
    target: Target
    launches: list[LaunchRecord] = field(default_factory=list)


@dataclass
class _Recorder:
    kernel: Any
    launches: list[LaunchRecord]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def launch(*args: Any, num_warps: int, num_stages: int, **kwargs: Any) -> None:
            arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            self.launches.append(LaunchRecord(self.kernel, grid, arguments, num_warps, num_stages))

        return launch


_recording: _Recording | None = None


@contextlib.contextmanager
def record_launches(target: Target) -> Iterator[list[LaunchRecord]]:
    """Inside, ops on tensors of the meta device launch nothing: the list gets what they would launch on `target`.

    So the machine code of any size on any GPU is built from the launcher's own arguments. Not in the interpreter, and
    not reentrant.
    """
    global _recording
    assert not INTERPRETED
    assert _recording is None
    _recording = _Recording(target)
    try:
        yield _recording.launches
    finally:
        _recording = None


# --------------------------------------------------------------------------------------------------------------- checks


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    shape: tuple[int | str, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] = REFERENCE_DTYPES,
    device: torch.device | None = None,
) -> None:
    """Raise a `ValueError` naming op and argument unless the tensor has the shape, one of the dtypes and the device.

    `shape` holds sizes, and names where any size will do.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{op}: {name} is a {type(tensor).__name__}, wanted a tensor")
    if shape is not None and not _fits(tensor.shape, shape):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, wanted ({', '.join(map(str, shape))})")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, wanted {' or '.join(map(str, dtypes))}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, wanted {device}, where the other arguments are")


def _fits(sizes: tuple[int, ...], wanted: tuple[int | str, ...]) -> bool:
    if len(sizes) != len(wanted):
        return False
    for size, n in zip(sizes, wanted, strict=True):  # noqa: SIM110 - `all` takes three times as long, and every op asks for every argument
        if size != n and not isinstance(n, str):
            return False
    return True


def check_first_derivative(op: str) -> None:
    """Raise in a backward pass that is to be differentiated itself (`create_graph=True`): of a gradient without a formula.

    At once, since `once_differentiable` only raises where the engine passes by, and `torch.autograd.grad` of a sum need not. Under
    torch.compile there is nothing to ask: a compiled graph raises by itself.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{op}: its gradient cannot be differentiated again (create_graph=True)")


def check_usable(op: str, device: torch.device) -> None:
    """Raise unless this process can run a Triton kernel on `device`; the message names the ways on."""
    if not HAVE_TRITON:
        raise RuntimeError(f"{op}: Triton is not installed here (it has no build for this machine?): use kernels.TORCH")
    if device.type == "cpu" and not INTERPRETED:
        raise RuntimeError(
            f"{op}: a Triton kernel was given tensors on the CPU: use kernels.TORCH, or set TRITON_INTERPRET=1 before "
            "kernels is imported to run the kernels in Triton's interpreter (slow, for checking)"
        )
    no_numbers = device.type == "meta" and not INTERPRETED and _recording is None
    if device.type not in ("cuda", "cpu", "meta") or no_numbers:
        raise ValueError(f"{op}: tensors are on {device}, wanted a CUDA GPU (or the CPU with TRITON_INTERPRET=1)")
