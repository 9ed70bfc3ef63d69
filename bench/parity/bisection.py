"""Which kernels make a model exceed a tolerance: found by turning them on in ever smaller parts of a selection.

A selection is what `kernels.grammar.parse` makes of a spec: the switches that are on, at each place.
"""

from collections.abc import Callable
from functools import cache
from itertools import groupby

from kernels import grammar

Selection = tuple[frozenset[str], ...]


def bisect(selection: Selection, exceeds: Callable[[Selection], bool]) -> list[Selection]:
    """The smallest parts of `selection` that exceed: single ops at single places, several if several do.

    exceeds: whether a model with just these kernels on does; it is asked once a selection. A part that exceeds is halved and
    both halves are tried, so no culprit hides another. Where neither half exceeds by itself the errors of ops in both add up:
    ops are then left out one by one, and those that can't be are a culprit together. What is left without the culprits is tried
    in the end, and searched in turn if it exceeds: so the selection without all that is returned was seen not to exceed.

    An op that needs another (`grammar.NEEDS`) is tried with it, and after it. If that one exceeds by itself, it alone is named,
    and the other stays unknown.
    """
    exceeds = cache(exceeds)

    def search(part: Selection) -> list[Selection]:
        if not exceeds(part):
            return []
        return [culprit for piece in _pieces(part) for culprit in search(piece)] or [shrink(part)]

    def shrink(part: Selection) -> Selection:
        for unit in _units(part):
            rest = without(part, _only(part, [unit]))
            if any(rest) and exceeds(rest):
                part = rest
        return bare(part)

    culprits: list[Selection] = []
    rest = selection
    while any(rest) and (found := search(rest)):
        culprits += found
        rest = without(rest, union(found))
    return culprits


def _pieces(part: Selection) -> list[Selection]:
    """The part in two, early layers and late ones; an op that needs another with that; of such a pair the other alone."""
    whole = [(place, switch) for place, switch in _units(part) if switch not in grammar.NEEDS]
    middle = len(whole) // 2
    if middle:
        return [_with_what_needs_them(part, units) for units in (whole[:middle], whole[middle:])]
    return [_only(part, whole)] if whole != _units(part) else []


def _with_what_needs_them(part: Selection, units: list[tuple[int, str]]) -> Selection:
    return _only(part, [*units, *((place, s) for place, s in _units(part) if (place, grammar.NEEDS.get(s)) in units)])


def _units(part: Selection) -> list[tuple[int, str]]:
    """Place and switch of all that is on."""
    return [(place, switch) for place, switches in enumerate(part) for switch in _in_order(switches)]


def _only(part: Selection, units: list[tuple[int, str]]) -> Selection:
    return tuple(frozenset(s for s in switches if (place, s) in units) for place, switches in enumerate(part))


def _in_order(switches: frozenset[str]) -> list[str]:
    return [switch for switch in grammar.SWITCHES if switch in switches]


def union(selections: list[Selection]) -> Selection:
    """What is on in any of them."""
    return tuple(frozenset().union(*switches) for switches in zip(*selections, strict=True))


def without(selection: Selection, other: Selection) -> Selection:
    """What is on in the first and not in the second, and needs nothing that is off."""
    left = [a - b for a, b in zip(selection, other, strict=True)]
    return tuple(frozenset(s for s in switches if grammar.NEEDS.get(s, s) in switches) for switches in left)


def bare(selection: Selection) -> Selection:
    """The selection but for what comes with another of it: `grammar.parse` turns that on unasked."""
    return tuple(switches - {grammar.NEEDS[s] for s in switches if s in grammar.NEEDS} for switches in selection)


def spell(selection: Selection, sign: str = "") -> str:
    """The selection as a spec: `parse` gives it back. With the sign "-", the items that turn all of it off."""
    n_layers = len(selection) - 1
    everything = tuple(grammar.parse("all", n_layers))
    if not sign and selection in (everything, tuple(grammar.parse("none", n_layers))):
        return "all" if selection == everything else "none"
    items = []
    for switches, layers in groupby(range(n_layers), key=lambda i: selection[i]):
        first, *more = layers
        place = f"@{first}-{more[-1]}" if more else f"@{first}"
        items += _items(switches, everything[0], sign, place)
    return ",".join(items + _items(selection[-1], everything[-1], sign, "@out"))


def _items(switches: frozenset[str], everything: frozenset[str], sign: str, place: str) -> list[str]:
    if switches == everything and not sign:
        return [f"all{place}"]
    return [f"{sign}{switch}{place}" for switch in _in_order(switches)]
