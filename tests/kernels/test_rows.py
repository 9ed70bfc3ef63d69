import pytest

from kernels.launch import next_power_of_2
from kernels.rows import row_tiles


@pytest.mark.parametrize("width", [*range(1, 17), *range(20, 257, 4), 272, 288])
def test_a_row_is_one_tile_or_two_that_are_narrower(width):
    first, second = row_tiles(width)
    assert {first, second} <= {0, 16, 32, 64, 128, 256}
    assert second < first
    assert width <= first + second <= max(next_power_of_2(width), 16)
    if first < width:
        assert second < 32 or second // 2 < width - first


def test_named_widths_have_the_smallest_tiles():
    wanted = {
        36: (32, 16),
        48: (32, 16),
        52: (64, 0),
        64: (64, 0),
        80: (64, 16),
        96: (64, 32),
        192: (128, 64),
        288: (256, 32),
    }
    assert {width: row_tiles(width) for width in wanted} == wanted
