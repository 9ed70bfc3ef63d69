from types import SimpleNamespace

import pytest

from kernels.grammar import MLP_WIDEST
from kernels.launch import HAVE_TRITON, INTERPRETER, TARGETS, next_power_of_2
from kernels.mlp.tiles import TILES, Tile, launch_of
from kernels.rows import row_tiles
from tests.kernels.test_written_arguments import answer

SMALL = {
    "sm_75": SimpleNamespace(backend="cuda", arch=75, shared_memory=65_536),
    "sm_86": SimpleNamespace(backend="cuda", arch=86, shared_memory=101_376),
    "sm_120": SimpleNamespace(backend="cuda", arch=120, shared_memory=101_376),
}


def tile_of(kernel, dim, itemsize, target):
    launch = launch_of(kernel, 10**6, dim, itemsize, target)
    return Tile(launch.tiles["BLOCK_M"], launch.tiles["BLOCK_F"], launch.num_warps, launch.num_stages)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    "target", [INTERPRETER, *TARGETS.values(), *SMALL.values()], ids=["interpreter", *TARGETS, *SMALL]
)
@pytest.mark.parametrize("kernel", TILES)
def test_any_width_has_a_tile(kernel, target, itemsize):
    for dim in range(1, MLP_WIDEST + 1):
        launch = launch_of(kernel, 1000, dim, itemsize, target)
        tiles = launch.tiles
        assert launch.grid == (-(-1000 // tiles["BLOCK_M"]),)
        assert all(tiles[name] == next_power_of_2(tiles[name]) >= 16 for name in ("BLOCK_M", "BLOCK_F", "BLOCK_D"))
        assert (tiles["BLOCK_D"], tiles["BLOCK_D2"]) == row_tiles(dim)
        assert tiles["BLOCK_D"] + tiles["BLOCK_D2"] >= dim
        assert launch.num_warps in (4, 8)


@pytest.mark.parametrize("kernel", TILES)
def test_no_rows_need_no_program(kernel):
    assert launch_of(kernel, 0, 288, 2, TARGETS["sm_90"]).grid == (0,)


@pytest.mark.parametrize("kernel", TILES)
def test_a_target_that_has_room_gets_the_tables_tile(kernel):
    for arch, target in TARGETS.items():
        machine = "hip" if arch == "gfx942" else arch
        for dim in (16, 96, 288):
            assert tile_of(kernel, dim, 2, target) == TILES[kernel][machine]
            assert tile_of(kernel, dim, 4, target) == TILES[kernel]["float32"]


@pytest.mark.parametrize("kernel", TILES)
def test_a_target_of_little_shared_memory_gets_fewer_rows_only_where_a_row_is_long(kernel):
    table = TILES[kernel]["sm_80"]
    for arch in ("sm_86", "sm_120"):
        assert tile_of(kernel, 144, 2, SMALL[arch]) == table
        assert tile_of(kernel, 288, 2, SMALL[arch]) == table._replace(block_m=table.block_m // 2)
    assert tile_of(kernel, 288, 2, SMALL["sm_75"]) == TILES[kernel]["float32"]._replace(block_m=16)


MACHINE_CODE = """
from kernels.launch import Target, record_launches
from kernels.mlp.backward import _mlp_backward
from kernels.mlp.forward import _mlp
from kernels.mlp.tiles import TILES

def sizes(target, dim, width, dtype):
    def empty(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, down = empty(1000, dim), empty(dim, width)
    with record_launches(target) as launches:
        _mlp(x, empty(2 * width, dim), down, True)
        _mlp_backward(x, empty(2 * width, dim), down, empty(1000, 2 * width))
    codes = [compile_specialized(specialize(launched, target)) for launched in launches]
    return [code.metadata.shared for code in codes]

small = [Target("cuda", 86, 84, 101_376), Target("cuda", 75, 40, 65_536)]
for kernel in TILES:
    TILES[kernel]["sm_80"] = TILES[kernel]["sm_80"]._replace(num_stages=STAGES)
cases = [(target, dim, torch.float16) for target in small for dim in DIMS]
cases += [(TARGETS["gfx942"], 288, torch.float32), (small[0], 288, torch.float32)]
print(json.dumps([[f"{t.arch} {dim} {dtype}", t.shared_memory, *sizes(t, dim, 768, dtype)] for t, dim, dtype in cases]))
"""


@pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed here")
@pytest.mark.parametrize(
    ("dims", "stages"),
    [
        ("288,", 2),
        pytest.param("16, 64, 112, 192, 256, 257, 272", 2, marks=pytest.mark.slow),
        pytest.param("64, 192, 288", 3, marks=pytest.mark.slow),
    ],
)
def test_shared_memory_suffices_where_there_is_least_of_it(dims, stages):
    """By the machine code itself, of the GPUs that `bench.machine_code` has not. Three stages: what a search may print."""
    sizes = answer(f"DIMS, STAGES = ({dims}), {stages}\n{MACHINE_CODE}")
    too_much = [case for case in sizes if max(case[2:]) > case[1]]
    assert too_much == []
