"""What tests of several commands of the bench share."""

import pytest

from bench.ops.tune.tables import TABLES


@pytest.fixture
def tables_put_back():
    """Every table is afterwards what it was, to the last row."""
    before = {op: {kernel: (row, dict(row)) for kernel, row in table.tiles.items()} for op, table in TABLES.items()}
    yield
    for op, machines in before.items():
        for kernel, (row, content) in machines.items():
            assert TABLES[op].tiles[kernel] is row
            assert row == content
