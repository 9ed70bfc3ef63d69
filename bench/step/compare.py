"""`python -m bench.step --compare BEFORE.json AFTER.json`: what changed between two results, held against their spread."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from training.errors import UserError

SAME = ("preset", "batch_size", "micro_steps", "sequence_length", "dtype")
"""What must be equal for times to be comparable."""
TOLD = ("device", "torch", "triton", "liger-kernel", "commit", "date")
"""What is told of the environments where it differs."""


def show(before_path: str, after_path: str, console: Console) -> dict:
    """Print the comparison of two files and return it. UserError where they can't be read or compared."""
    before, after = (_read(path) for path in (before_path, after_path))
    for key in (*SAME, "n_layers"):  # the last is not in older results, which have all layers of their preset
        if key in before and key in after and before[key] != after[key]:
            raise UserError(
                f"--compare: {key} is {before[key]} in {before_path} and {after[key]} in {after_path}: "
                "times of different work can't be compared"
            )
    result = compare(before, after)
    console.print(table(result))
    return result


def _read(path: str) -> dict:
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        _ = [result[key] for key in (*SAME, "deterministic", "rows", "environment")]
        [row["variant"] for row in result["rows"]]
    except OSError as error:
        raise UserError(f"--compare: {path} can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"--compare: {path} is not a result of bench.step ({reason})") from None
    return result


def compare(before: dict, after: dict) -> dict:
    """A row a variant: both medians, how many times faster the later one is, and whether the ranges of their steps overlap.

    `verdict`: faster or slower where every step of one was quicker than every step of the other, else within the spread; or
    what is missing. `differs`: what else is not equal.
    """
    old, new = ({row["variant"]: row for row in result["rows"]} for result in (before, after))
    rows = [_row(variant, old.get(variant, {}), new.get(variant, {})) for variant in dict.fromkeys([*old, *new])]
    flat = [_settings(result) | {key: result["environment"].get(key) for key in TOLD} for result in (before, after)]
    differs = {key: [flat[0][key], flat[1][key]] for key in flat[0] if flat[0][key] != flat[1][key]}
    return {"preset": before["preset"], "dtype": before["dtype"], "rows": rows, "differs": differs}


def _settings(result: dict) -> dict:
    """What may differ and is told. Older results do not name their tokens, which were uniform."""
    return {
        "deterministic": result["deterministic"],
        "tokens": result.get("tokens", {"source": "uniform"})["source"],
    }


def _row(variant: str, old: dict, new: dict) -> dict:
    row = {"variant": variant, "before": old.get("ms"), "after": new.get("ms"), "speedup": None}
    memories = [side.get("peak_memory") for side in (old, new)]
    row["memory_change"] = memories[1] - memories[0] if None not in memories else None
    if row["before"] is None or row["after"] is None:
        gone = "before" if row["before"] is None else "after"
        side = old if gone == "before" else new
        return row | {"verdict": f"not measured {gone}: {side.get('failed', 'not asked for')}"}
    row["speedup"] = old["ms"] / new["ms"]
    if new["ms_max"] < old["ms_min"]:
        return row | {"verdict": "faster"}
    if new["ms_min"] > old["ms_max"]:
        return row | {"verdict": "slower"}
    return row | {"verdict": "within the spread"}


def table(result: dict) -> Table:
    """The comparison as people read it."""
    told = [f"{key}: {old} → {new}" for key, (old, new) in result["differs"].items()]
    shown = Table(title=f"{result['preset']}, {result['dtype']}: ms a step", caption="\n".join(told) or None)
    shown.add_column("variant")
    for heading in ("before", "after", "speed", "peak MiB"):
        shown.add_column(heading, justify="right")
    shown.add_column("")
    for row in result["rows"]:
        memory = row["memory_change"]
        shown.add_row(
            row["variant"],
            *("" if ms is None else f"{ms:.2f}" for ms in (row["before"], row["after"])),
            "" if row["speedup"] is None else f"{row['speedup']:.2f}x",
            "" if memory is None else f"{memory / 2**20:+,.0f}",
            row["verdict"],
        )
    return shown
