"""A model whose parameters are shared out among processes: FSDP2 (`fully_shard`), a layer a unit, over torch's device meshes.

Every process keeps rows of each matrix. A unit's matrices are gathered before it runs, in the compute dtype, freed after it, and
gathered again for its backward pass, whose gradients are summed in float32 and scattered to the rows' owners. What keeps the
gradient that of one process, to the rounding of its sums:

- norms stay outside, whole and float32 on every process; their gradients are summed by the trainer
- embedding and head, units of their own or, tied, of the root, are gathered in float32, and cast where they are read
- a layer's matrices are gathered in the compute dtype, but their gradients are float32 (`grad_dtype`), as kernels/linear.py makes
  them

The last is what torch.compile does not keep: it rounds the float32 gradient of a bfloat16 leaf to bfloat16.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from kernels import Ops
from model import Llama, LlamaConfig
from model.rope import rope_tables
from training import launcher
from training.distributed import World
from training.errors import UserError


def make_mesh(parallel: str, world: World, device: torch.device) -> DeviceMesh:
    """The processes as a mesh: ("shard",) for fsdp; ("replicate", "shard"), machines by processes of one, for hsdp.

    UserError where there is one machine only, or machines differ in their number of processes.
    """
    if parallel == "fsdp":
        return init_device_mesh(device.type, (world.size,), mesh_dim_names=("shard",))
    on_one = launcher.on_this_machine(world.size)
    if world.size % on_one or world.size == on_one:
        raise UserError(
            f"--parallel hsdp shards within a machine and replicates over machines, equally many processes on each: here are "
            f"{world.size} processes, {on_one} on this machine (LOCAL_WORLD_SIZE). For one machine say --parallel fsdp"
        )
    return init_device_mesh(device.type, (world.size // on_one, on_one), mesh_dim_names=("replicate", "shard"))


def sharded_model(
    config: LlamaConfig, ops: Sequence[Ops], dtype: torch.dtype, mesh: DeviceMesh, device: torch.device, recompute: str
) -> Llama:
    """The model with its initial values, of which no process ever holds more than one matrix whole.

    The values are those of one process with the same device and random state, to the bit: each matrix is drawn whole, in the same
    order, and its owner's rows are kept.
    """
    with torch.device("meta"):
        model = Llama(config, ops, dtype, recompute=recompute, copies=False)
    norms = {p for p in model.parameters() if p.ndim == 1}
    layers = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    ends = MixedPrecisionPolicy(cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=layers, ignored_params=norms)
    for end in [] if model.head is None else [model.embedding, model.head]:
        fully_shard(end, mesh=mesh, mp_policy=ends, ignored_params=norms)
    fully_shard(model, mesh=mesh, mp_policy=ends, ignored_params=norms)
    for unit in units(model):
        unit.set_gradient_divide_factor(1.0)  # the loss is divided by the tokens of all processes already
        unit.set_force_sum_reduction_for_comms(True)

    model.to_empty(device=device)
    model.cos, model.sin = (table.to(device) for table in rope_tables(config))
    with torch.no_grad():
        for name, value in model.initial_values(device):
            parameter = model.get_parameter(name)
            local(parameter).copy_(value[rows(parameter)])
    for layer in model.layers:
        layer.unshard()
        for parameter in layer.parameters():
            if parameter.dtype != torch.float32:
                parameter.grad_dtype = torch.float32
        layer.reshard()
    return model


def units(model: Llama) -> list[FSDPModule]:
    """What is gathered at once: the layers, the ends of an untied model, and the root."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def local(tensor: Tensor) -> Tensor:
    """The rows that are here of a parameter or its gradient, in place; a whole tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows(parameter: Tensor) -> slice:
    """Which rows of a parameter this process keeps: all, or of N shards of ceil(rows / N) its own, which may be short or empty."""
    n = parameter.shape[0]
    if not isinstance(parameter, DTensor):
        return slice(0, n)
    shard, shards = parameter.device_mesh.get_local_rank("shard"), parameter.device_mesh["shard"].size()
    size = -(-n // shards)
    found = slice(min(n, shard * size), min(n, (shard + 1) * size))
    assert found.stop - found.start == local(parameter).shape[0]
    return found


class Shared:
    """Some rows of a tensor laid out as a parameter is, of which each process has its part: what a checkpoint saves of it.

    Attributes:
        nbytes: of these rows.
    """

    def __init__(self, here: Tensor, parameter: DTensor):
        self._source = _Source(here, parameter)
        self._rows = slice(0, parameter.shape[0])
        self.nbytes = parameter.numel() * here.itemsize

    def split(self, widths: Sequence[int]) -> list["Shared"]:
        """As `Tensor.split`, along the first dimension."""
        self._source.readers = len(widths)
        parts, start = [], 0
        for width in widths:
            part = copy.copy(self)
            part._rows = slice(start, start + width)
            part.nbytes = self.nbytes * width // self._rows.stop
            start += width
            parts.append(part)
        return parts

    def whole(self) -> Tensor:
        """These rows, once only. Every process must call it."""
        return self._source.read()[self._rows]


class _Source:
    """What is gathered at its first reading, and let go at its last."""

    def __init__(self, here: Tensor, parameter: DTensor):
        self._here, self._parameter = here, parameter
        self._gathered: Tensor | None = None
        self.readers = 1

    def read(self) -> Tensor:
        if self._gathered is None:
            p = self._parameter
            self._gathered = DTensor.from_local(
                self._here, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
            ).full_tensor()
        gathered = self._gathered
        self.readers -= 1
        if not self.readers:
            self._gathered = None
        return gathered
