"""Where the time of a step goes: the profiles that `bench.step --profile` took, by part and kernel by kernel."""

import re

from bench.report.markdown import table
from bench.report.standings import Standings, Steps

PARTS = {
    "kernels that Inductor wrote": r"^triton_",
    "attention of PyTorch": r"flash|fmha",
    "products (cuBLAS)": r"nvjet|gemm|cutlass|cublas|splitK",
    "copies and fills of memory": r"Memcpy|Memset|FillFunctor",
    "PyTorch's own": r"at::|at_cuda|\(anonymous namespace\)|cub::",
}
"""What a kernel counts as by its name: the first part whose pattern is in it."""
OURS = "**hand-written Triton kernels**"
"""Those of this project, and in its variants Liger's: named after their function, which begins with an underscore in both."""
SHARE = 0.01
"""Kernels with less of the time are one line."""


def part_of(kernel: str) -> str:
    """The part that a kernel counts as."""
    if re.fullmatch(r"_\w+_kernel", kernel):
        return OURS
    return next((part for part, pattern in PARTS.items() if re.search(pattern, kernel)), "other")


def by_part(profile: dict) -> dict[str, tuple[float, int]]:
    """Milliseconds and launches of each part, longest first."""
    parts: dict[str, tuple[float, int]] = {}
    for kernel in profile["kernels"]:
        ms, launches = parts.get(part_of(kernel["name"]), (0.0, 0))
        parts[part_of(kernel["name"])] = ms + kernel["ms"], launches + kernel["launches"]
    return dict(sorted(parts.items(), key=lambda item: -item[1][0]))


def page(standings: Standings) -> str:
    """A table of parts a step that has profiles, a column a variant; and below the kernels of the fused one."""
    pages = []
    for steps in standings.all_steps():
        profiles = {name: row["profile"] for name, row in steps.variants.items() if "profile" in row}
        if profiles:
            pages.append(_parts(steps, profiles))
            if "fused" in profiles:
                pages.append(_kernels(profiles["fused"]))
    return "\n".join(pages)


def _parts(steps: Steps, profiles: dict[str, dict]) -> str:
    found = {name: by_part(profile) for name, profile in profiles.items()}
    parts = sorted(
        {part for of in found.values() for part in of}, key=lambda part: -max(_ms(of, part) for of in found.values())
    )
    rows = [
        [part, *(f"{of[part][0]:.2f} ms in {of[part][1]}" if part in of else "" for of in found.values())]
        for part in parts
    ]
    rows.append(["all that the GPU did", *(f"{p['busy_ms']:.2f} ms in {p['launches']}" for p in profiles.values())])
    rows.append(["**the step**", *(f"{steps.variants[name]['ms']:.2f} ms" for name in profiles)])
    title = f"**{steps.preset} on {steps.where}** ({steps.batch}): milliseconds of a step, in so many launches"
    return f"{title}\n\n{table(['', *profiles], rows)}"


def _ms(of: dict[str, tuple[float, int]], part: str) -> float:
    return of[part][0] if part in of else 0.0


def _kernels(profile: dict) -> str:
    rows, rest = [], []
    for kernel in profile["kernels"]:
        share = kernel["ms"] / profile["busy_ms"]
        if share < SHARE:
            rest.append(kernel)
        else:
            name = kernel["name"] if len(kernel["name"]) <= 70 else f"{kernel['name'][:70]}..."
            rows.append(
                [f"`{name}`", part_of(kernel["name"]), str(kernel["launches"]), f"{kernel['ms']:.2f}", f"{share:.1%}"]
            )
    if rest:
        ms = sum(kernel["ms"] for kernel in rest)
        launches = sum(kernel["launches"] for kernel in rest)
        rows.append([f"{len(rest)} more", "", str(launches), f"{ms:.2f}", f"{ms / profile['busy_ms']:.1%}"])
    return "Its fused step, kernel by kernel:\n\n" + table(
        ["kernel", "part", "launches", "ms", "share"], rows, numbers_from=2
    )
