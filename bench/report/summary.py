"""What a run of `bench.all` found, in ten lines."""

from pathlib import Path

from bench import archive
from bench.archive import Result
from bench.report.goals import OPS, STEP, verdicts
from bench.report.standings import Standings

LONGEST = 5
"""Kernels of the profile that are named."""
BAD = ("failed", "timed out")


def summary(folder: Path, run: dict) -> list[str]:
    """At most nine lines on the results in a folder and on `run`, what its all.json holds: how it stands, and what went wrong."""
    standings = Standings(archive.read_files(folder.glob("*.json")))
    lines = ["", "summary", *_checks(standings.newest("check", "dtype")), *_tests(run)]
    for gpu in standings.gpus:
        lines += [line for preset in STEP for line in _step(standings, gpu, preset)]
        lines += [*_profile(standings, gpu), *_ops(standings, gpu)]
    wrong = [f"{name} {record['status']}" for name, record in run["cases"].items() if record["status"] in BAD]
    return lines + ([f"went wrong: {', '.join(wrong)}"] if wrong else [])


def _checks(results: list[Result]) -> list[str]:
    rows = [row for result in results for row in result.data["rows"]]
    failed = [row["check"] for row in rows if not row["passed"]]
    return [f"checks: {len(rows) - len(failed)} of {len(rows)} passed{_named('; failed', failed)}"] if rows else []


def _tests(run: dict) -> list[str]:
    tests = {name: record for name, record in run["cases"].items() if name.startswith("tests-")}
    said = [
        f"{name.removeprefix('tests-')} {record.get('last_line', '').strip('= ')}" for name, record in tests.items()
    ]
    return [f"tests: {'; '.join(said)}"] if said else []


def _step(standings: Standings, gpu: str, preset: str) -> list[str]:
    figures = standings.steps(gpu, preset).get("fused", {})
    if "ms" not in figures:
        return [f"step of {preset}: fused {figures['failed']}"] if "failed" in figures else []
    against = f", {figures['vs_best']:.2f}x {figures['best']}" if "vs_best" in figures else ""
    mfu = "" if figures["mfu"] is None else f", MFU {figures['mfu']:.1%}"
    return [
        f"step of {preset}: fused {figures['ms']:.2f} ms{mfu}{against}{_named('; goals', verdicts(STEP[preset], figures, gpu))}"
    ]


def _profile(standings: Standings, gpu: str) -> list[str]:
    profile = standings.steps(gpu, "reference").get("fused", {}).get("profile")
    if not profile:
        return []
    longest = [f"{kernel['ms']:.2f} {kernel['name'][:32]}" for kernel in profile["kernels"][:LONGEST]]
    return [f"of it busy {profile['busy_ms']:.2f} ms in {profile['launches']} launches: {', '.join(longest)}"]


def _ops(standings: Standings, gpu: str) -> list[str]:
    """How many goals of ops are met, and those that are not."""
    met, missed = 0, []
    for where, goals in OPS.items():
        figures = standings.op(gpu, *where)
        for goal in goals if figures else ():
            verdict = goal.verdict(figures.get(goal.figure))
            if "missed" in verdict:
                missed.append(f"{' '.join(where)} {verdict.removeprefix('**missed**: ')}")
            else:
                met += "met" in verdict
    return [f"goals of ops: {met} met, {len(missed)} missed{_named(':', missed)}"] if met or missed else []


def _named(word: str, names: list[str]) -> str:
    return f"{word}{'' if word.endswith(':') else ':'} {', '.join(names)}" if names else ""
