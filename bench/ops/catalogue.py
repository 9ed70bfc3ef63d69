"""Every op that has a kernel, by its sheet: those of `bench/ops/<switch>.py` for each switch."""

import importlib
import importlib.util

from bench.ops.sheet import Sheet
from kernels.grammar import SWITCHES


def _sheets(file: str) -> dict[str, Sheet]:
    # Of a kernel that is being written there may be no sheet yet: the others are measured none the less.
    name = f"{__package__}.{file}"
    return importlib.import_module(name).SHEETS if importlib.util.find_spec(name) else {}


SHEETS: dict[str, Sheet] = {op: sheet for file in SWITCHES for op, sheet in _sheets(file).items()}

VARIANTS = tuple(dict.fromkeys(variant for sheet in SHEETS.values() for variant in sheet.peers))
