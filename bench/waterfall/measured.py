"""The bars of a step that a GPU ran: from the profile that `bench.step --profile` took of it."""

from bench.report.profiles import OURS, part_of
from bench.waterfall.bars import COPIES, GAPS, INDUCTOR, PRODUCTS, PYTORCH, Work
from kernels import grammar

_PARTS = {
    "kernels that Inductor wrote": INDUCTOR,
    "attention of PyTorch": "attention",
    "products (cuBLAS)": PRODUCTS,
    "copies and fills of memory": COPIES,
}


def works(row: dict) -> list[Work]:
    """What a row of `bench.step` with a profile says: its kernels, and the time in which none ran.

    Of kernels that ran at the same time both count, and what is between launches may then be less than nothing.
    """
    profile = row["profile"]
    found = [Work(cause(kernel["name"]), kernel["ms"], kernel["launches"]) for kernel in profile["kernels"]]
    return [*found, Work(GAPS, row["ms"] - profile["busy_ms"], 0)]


def cause(kernel: str) -> str:
    """What a kernel is counted as, by its name."""
    part = part_of(kernel)
    if part == OURS:  # a kernel bears the name of its op's file; attention's backward turns RoPE back as well
        named = (switch for switch in grammar.SWITCHES if kernel.startswith(f"_{switch}_"))
        op = max(named, key=len, default=PYTORCH)
        return "optimizer" if op in grammar.RUN_SWITCHES else op
    return _PARTS.get(part, PYTORCH)
