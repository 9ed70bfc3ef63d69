"""The loops of a kernel, found in its machine code, and the one in which it spends its time."""

from collections import defaultdict
from dataclasses import dataclass

from bench.machine_code.disassembly import Instruction

WORK = {"matrix", "global load", "global store", "shared load", "shared store", "special", "float"}
"""Kinds of instructions of which a loop that does something has at least one; the others wait for memory or a barrier."""


@dataclass(frozen=True)
class Loop:
    """A natural loop: what is passed between two passes of its first instruction."""

    body: tuple[int, ...]
    """Places in the list of instructions, in order, those of the loops in it included."""
    depth: int
    """1 for a loop that is in no other."""


def find_loops(instructions: list[Instruction]) -> list[Loop]:
    """All loops, by their first instructions, outer before inner."""
    successors = [_successors(at, instruction) for at, instruction in enumerate(instructions)]
    predecessors = defaultdict(list)
    for at, following in enumerate(successors):
        for successor in following:
            predecessors[successor].append(at)
    tails = defaultdict(list)
    for tail, head in _back_edges(successors):
        tails[head].append(tail)
    bodies = []
    for head, ends in tails.items():
        body, ahead = {head}, list(ends)
        while ahead:
            if (at := ahead.pop()) not in body:
                body.add(at)
                ahead += predecessors[at]
        bodies.append(body)
    found = [Loop(tuple(sorted(body)), sum(body <= other for other in bodies)) for body in bodies]
    return sorted(found, key=lambda loop: (loop.body[0], loop.depth))


def _successors(at: int, instruction: Instruction) -> list[int]:
    following = [at + 1] if instruction.falls_through else []
    return following if instruction.target is None else [*following, instruction.target]


def _back_edges(successors: list[list[int]]) -> list[tuple[int, int]]:
    """Edges to an instruction that is on the way from the first one to them: a backward branch alone can be a way back
    from code that was moved behind the kernel's end, which is no loop.
    """
    edges, done, on_the_way = [], set(), {0}
    path = [(0, iter(successors[0]))]
    while path:
        at, following = path[-1]
        successor = next(following, None)
        if successor is None:
            path.pop()
            on_the_way.remove(at)
            done.add(at)
        elif successor in on_the_way:
            edges.append((at, successor))
        elif successor not in done and successor < len(successors):
            on_the_way.add(successor)
            path.append((successor, iter(successors[successor])))
    return edges


def works(loop: Loop, instructions: list[Instruction]) -> bool:
    """Whether a loop does more than wait."""
    return any(instructions[at].kind in WORK for at in loop.body)


def hottest(loops: list[Loop], instructions: list[Instruction]) -> Loop | None:
    """Of the loops that do not only wait the deepest, then that with most matrix instructions, then with most bytes of
    global memory, then the first: what runs most often can't be read in the code, so this is a guess. None without loops.
    """

    def heat(loop: Loop) -> tuple[int, int, int]:
        body = [instructions[at] for at in loop.body]
        n_bytes = sum(x.width for x in body if x.kind in ("global load", "global store"))
        return loop.depth, sum(x.kind == "matrix" for x in body), n_bytes

    return max((loop for loop in loops if works(loop, instructions)), key=heat, default=None)
