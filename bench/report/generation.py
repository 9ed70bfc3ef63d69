"""What `bench.generation` leaves in RESULTS.md: tokens a second of generated text, and against whom."""

from bench.archive import Result
from bench.report.markdown import table

CPU = "CPU"


def section(results: list[Result]) -> str:
    """A table of a row a device, preset, number of streams and variant; empty where nothing was measured."""
    rows = []
    for result in results:
        data, env = result.data, result.data["environment"]
        where = result.gpu or f"{CPU}, {env['device'].rpartition(', ')[2]}"
        for row in data["rows"]:
            ratios = [f"{row[key]:.2f}x" if key in row else "" for key in ("vs_whole-sequence", "vs_transformers")]
            figures = [f"{row['tokens_per_s']:.1f}", f"{row['tokens_per_s_min']:.1f} to {row['tokens_per_s_max']:.1f}"]
            what = [where, data["preset"], str(data["tokens"]), str(row["streams"]), row["variant"]]
            rows.append([*what, *figures, *ratios, result.date[:10]])
    return table(HEADINGS, rows, numbers_from=5) if rows else ""


HEADINGS = [
    "on",
    "preset",
    "tokens",
    "streams",
    "variant",
    "tokens/s",
    "from, to",
    "vs whole sequence",
    "vs transformers",
]
HEADINGS += ["date"]
