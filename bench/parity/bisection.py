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
    """
    exceeds = cache(exceeds)

    def search(part: Selection) -> list[Selection]:
        if not exceeds(part):
            return []
        return [culprit for half in _halves(part) for culprit in search(half)] or [shrink(part)]

    def shrink(part: Selection) -> Selection:
        for unit in _units(part):
            rest = without(part, _only(part, [unit]))
            if any(rest) and exceeds(rest):
                part = rest
        return part

    culprits: list[Selection] = []
    rest = selection
    while any(rest) and (found := search(rest)):
        culprits += found
        rest = without(rest, union(found))
    return culprits


def _halves(part: Selection) -> list[Selection]:
    """The part in two, early layers and late ones; nothing if it is one op at one place."""
    units = _units(part)
    middle = len(units) // 2
    return [_only(part, units[:middle]), _only(part, units[middle:])] if middle else []


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
    """What is on in the first and not in the second."""
    return tuple(a - b for a, b in zip(selection, other, strict=True))


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
