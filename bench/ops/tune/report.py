"""What a search prints, and the JSON that it writes as it goes."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.measure import environment, write_json
from bench.ops.catalogue import SHEETS
from bench.ops.sizes import size
from bench.ops.tune.search import Trial, search
from bench.ops.tune.tables import TABLES, Row, Tile, TileTable
from training.errors import UserError


def table_of(op: str, sizes: list[str], device: torch.device) -> TileTable:
    """The table to search. UserError, naming the option, where there is none, or not these sizes, or no GPU."""
    if op not in TABLES:
        raise UserError(f"--tune is {op!r}; allowed: {', '.join(TABLES)}, the ops with a table of tiles")
    for name in sizes:
        if not SHEETS[op].serves(size(name)):
            raise UserError(f"--preset is {name!r}, a size that --tune {op} has no kernel for")
    if len(sizes) > 1 and TABLES[op].has_one_size:
        raise UserError(
            f"--preset is {' '.join(sizes)}; --tune {op} takes one, as its table has one tile for all sizes"
        )
    if device.type != "cuda":
        raise UserError(f"--tune {op} needs a GPU, and the device is {device}")
    return TABLES[op]


def search_and_show(
    op: str, sizes: list[str], dtype: torch.dtype, device: torch.device, repeats: int, json: str, console: Console
) -> dict:
    """Search at each size, and print times and rows to paste, those of what is done also when stopped.

    json: file that is written ahead of each tile, or empty. It names the tile under way: if that one hangs or kills the process,
    it is known. Errors as those of `table_of`.
    """
    table = table_of(op, sizes, device)
    rows = {kernel: dict(machines) for kernel, machines in table.tiles.items()}
    result: dict[str, Any] = {"bench": "tune", "op": op, "dtype": str(dtype).removeprefix("torch."), "rows": []}
    result["environment"] = environment()
    title = f"{op} on {torch.cuda.get_device_name(device)}, microseconds (median)"

    def keep(**under_way: Any) -> None:
        if json:
            write_json(json, result | under_way)

    try:
        for name in sizes or table.sizes:
            with contextlib.ExitStack() as kept:  # a backward kernel is tuned beside the best of the others
                for kernel in table.kernels:
                    with console.status(f"{name}: {kernel}, {len(table.grid)} tiles"):
                        row, tile = _search(table, kernel, name, rows[kernel], (dtype, device, repeats), keep)
                    kept.enter_context(table.holding(kernel, tile))
                    result["rows"].append(row)
                    keep()
    finally:
        _show(table, title, result["rows"], console)
    return result


def _search(
    table: TileTable, kernel: str, name: str, machines: dict[str, Row], how: tuple, keep: Callable[..., None]
) -> tuple[dict[str, Any], Tile]:
    """The row for JSON and the tile of one kernel at one size, which goes into the row of the machine that is here."""
    config = size(name)
    trial = Trial(table, kernel, config, *how)
    row: dict[str, Any] = {"size": name, "kernel": kernel, "pass": trial.direction}

    def before(tile: Tile, tried_us: dict[str, float], unfit: dict[str, str]) -> None:
        keep(under_way=row | {"tile": tile, "tried_us": tried_us, "unfit": unfit})

    found = search(trial.old, table.grid, trial.seconds_of, before)
    machines[trial.machine] = table.row_with(machines[trial.machine], config, found.new)
    row |= vars(found) | {"paste": as_source(trial.machine, machines[trial.machine])}
    if spilled := trial.spilled[found.new]:
        key = (table.kernels[kernel].__name__, table.head_dim(config), trial.arch)
        row |= {"spilled_bytes": spilled, "gate": f"{key}: {spilled},".replace("'", '"')}
    return row, found.new


def _show(table: TileTable, title: str, rows: list[dict[str, Any]], console: Console) -> None:
    """A table of what was found, then what is to be pasted."""
    if not rows:
        return
    shown = Table(title=title)
    for heading in ("size", "kernel", "pass", "old tile, us", "new tile, us", "faster", "spilled bytes", "unfit"):
        shown.add_column(heading)
    for row in rows:
        tiles = (f"{tuple(row[which])} {row[f'{which}_us']:.1f}" for which in ("old", "new"))
        faster, unfit = f"{row['old_us'] / row['new_us']:.2f}x", f"{len(row['unfit'])} of {len(table.grid)}"
        spilled = str(row.get("spilled_bytes", 0))
        shown.add_row(row["size"], row["kernel"], row["pass"], *tiles, faster, spilled, unfit)
    console.print(shown)

    def print_lines(heading: str, lines: list[str]) -> None:
        console.print("\n".join([heading, *lines]), highlight=False, markup=False, soft_wrap=True)

    latest = {row["kernel"]: row["paste"] for row in rows}
    print_lines(f"For TILES in {table.file}:", [f"{kernel:8} {line}" for kernel, line in latest.items()])
    if gates := [row["gate"] for row in rows if "gate" in row]:
        print_lines("They spill: for MEASURED_SPILLS in bench/machine_code/rows.py, with their times:", gates)


def as_source(machine: str, row: Row) -> str:
    """A row as it stands in the table's source."""

    def written(tile: Tile) -> str:
        return f"Tile({', '.join(map(str, tile))})"

    if not isinstance(row, dict):
        return f'"{machine}": {written(row)},'
    tiles = ", ".join(f"{width}: {written(tile)}" for width, tile in row.items())
    return f'"{machine}": {{{tiles}}},'
