"""The search for culprits, and the specs it speaks in, without a model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.parity.bisection import bare, bisect, spell, union, without
from kernels import grammar
from kernels.grammar import parse

N_LAYERS = 5


def selection(spec, n_layers=N_LAYERS):
    return tuple(parse(spec, n_layers))


def contains(part, other):
    return all(theirs <= switches for theirs, switches in zip(other, part, strict=True))


@st.composite
def units(draw, **size):
    """Specs of single ops at single places, and of one that needs another never both: the other is named for the two."""
    every = [
        f"{switch}@{place}"
        for place in [*range(N_LAYERS), "out"]
        for switch in (grammar.OUT_SWITCHES if place == "out" else grammar.LAYER_SWITCHES)
    ]

    def what_is_named(unit):
        switch, _, place = unit.partition("@")
        return grammar.NEEDS.get(switch, switch), place

    return draw(st.lists(st.sampled_from(every), unique_by=what_is_named, **size))


# --------------------------------------------------------------------------------------------------------------- search


@given(units())
def test_every_culprit_is_found_and_nothing_else(guilty):
    parts = [selection(unit) for unit in guilty]
    found = bisect(selection("all"), lambda part: any(contains(part, unit) for unit in parts))
    assert sorted(spell(unit) for unit in found) == sorted(guilty)


@given(units(min_size=2, max_size=2), units(max_size=2))
def test_what_exceeds_only_together_is_found_beside_what_exceeds_alone(pair, alone):
    together, alone = selection(",".join(pair)), [selection(unit) for unit in alone]

    def exceeds(part):
        return contains(part, together) or any(contains(part, unit) for unit in alone)

    found = bisect(selection("all"), exceeds)
    assert all(bare(unit) in found for unit in alone)
    assert not exceeds(without(selection("all"), union(found)))
    if not any(contains(together, unit) for unit in alone):
        assert bare(together) in found


@pytest.mark.parametrize("guilty", ["mlp@2", "swiglu@2"])
@pytest.mark.parametrize("spec", ["all", "all@2", "mlp@2", "mlp,-mlp@3-4,rope@0"])
def test_an_op_that_needs_another_is_named_itself_where_the_other_is_fine(guilty, spec):
    asked = []

    def exceeds(part):
        asked.append(part)
        return contains(part, selection(guilty))

    found = bisect(selection(spec), exceeds)
    assert [spell(part) for part in found] == [guilty]
    assert all(selection(spell(part)) == part for part in asked)  # what no spec can say is not tried
    rest = without(selection(spec), union(found))
    assert ("swiglu" in rest[2], "mlp" in rest[2]) == (guilty == "mlp@2", False)


def test_where_an_op_and_what_it_needs_are_both_wrong_the_latter_is_named():
    assert [spell(part) for part in bisect(selection("all"), lambda part: "swiglu" in part[1])] == ["swiglu@1"]


def test_a_search_stays_within_the_selection_it_was_given():
    given_selection, asked = selection("swiglu@1-3,rope"), []

    def exceeds(part):
        asked.append(part)
        return any("swiglu" in switches for switches in part[2:3])

    assert [spell(part) for part in bisect(given_selection, exceeds)] == ["swiglu@2"]
    assert all(contains(given_selection, part) for part in asked)
    assert asked[-1] == without(given_selection, selection("swiglu@2"))  # seen to be fine without its culprit


def test_one_culprit_among_130_takes_few_runs_and_none_twice():
    asked = []

    def exceeds(part):
        asked.append(part)
        return "rope" in part[21]

    assert [spell(part) for part in bisect(selection("all", 32), exceeds)] == ["rope@21"]
    assert len(asked) <= 2 * 8 + 2  # two halves each time, the whole, and the rest
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("spec", ["all", "none", "swiglu@2"])
def test_nothing_is_found_where_nothing_exceeds(spec):
    assert bisect(selection(spec), lambda part: False) == []


def test_a_model_that_exceeds_with_whatever_is_on_has_every_kernel_named_that_can_be_on_alone():
    found = {spell(part) for part in bisect(selection("all"), any)}
    alone = {s for s in grammar.LAYER_SWITCHES if s not in grammar.NEEDS}
    of_layers = {f"{switch}@{layer}" for switch in alone for layer in range(N_LAYERS)}
    assert found == of_layers | {f"{switch}@out" for switch in grammar.OUT_SWITCHES}


# ---------------------------------------------------------------------------------------------------------------- specs


@given(units())
def test_a_spelled_selection_is_read_back(guilty):
    part = selection(",".join(guilty) or "none")
    assert selection(spell(part)) == part


@given(units(min_size=1))
def test_a_selection_spelled_with_a_minus_turns_off_just_that(guilty):
    part = selection(",".join(guilty))
    assert selection(f"all,{spell(part, '-')}") == without(selection("all"), part)


@pytest.mark.parametrize(
    ("spec", "spelled"),
    [
        ("all", "all"),
        ("none", "none"),
        ("all@0-2", "all@0-2"),
        ("all@4,all@out", "all@4,all@out"),
        ("swiglu", "swiglu@0-4"),
        ("swiglu@3,rope@3", "rope@3,swiglu@3"),
        ("rms_norm", "rms_norm@0-4,rms_norm@out"),
        ("mlp@1", "swiglu@1,mlp@1"),
    ],
)
def test_specs_are_spelled_short(spec, spelled):
    assert spell(selection(spec)) == spelled


def test_what_turns_off_names_single_ops():
    at = {"1": grammar.LAYER_SWITCHES, "out": grammar.OUT_SWITCHES}
    ops = {f"-{switch}@{place}" for place, switches in at.items() for switch in switches}
    off = spell(selection("all@1,all@out"), "-").split(",")
    assert (len(off), set(off)) == (len(ops), ops)
