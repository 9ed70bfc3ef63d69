"""What `bench.compiled` leaves in RESULTS.md: the launches of a compiled step and their bytes, built and not measured."""

from bench.archive import Result


def rows(results: list[Result]) -> list[list[str]]:
    """A row a preset and selection of kernels, for a table with HEADINGS."""
    found = []
    for data in (result.data for result in results):
        launches = data["launches"]
        parts = [
            [row for row in launches if row["part"] in among]
            for among in (("forward",), ("backward",), ("start", "update"))
        ]
        moved = sum(row["read"] + row["written"] for row in launches)
        floor = sum(op["bytes"] for op in data["floor"].values())
        spills = {row["name"] for row in launches if row["code"] and max(row["code"]["stack"])}
        kinds = [[row for row in launches if row["kind"] == kind] for kind in ("copy", "fallback")]
        found.append(
            [
                data["preset"],
                data["kernels"],
                data["built_for"],
                *(f"{len(part)}" for part in parts),
                f"{data['step_launches']:,}",
                f"{moved / 1e9:.2f}",
                f"{floor / 1e9:.2f}",
                *(f"{len(of_kind)}" for of_kind in kinds),
                ", ".join(sorted(spills)) or "none",
            ]
        )
    return found


HEADINGS = ["preset", "kernels", "built for", "launches: forward", "backward", "once a step", "of the whole step"]
HEADINGS += ["GB of one micro-step and the update", "floor", "copies", "fallbacks", "kernels that spill"]
