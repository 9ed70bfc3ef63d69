"""Which kernels each layer gets: the grammar of a selection, and what `kernels.select` makes of it."""

import subprocess
import sys
from dataclasses import MISSING, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kernels
from kernels.grammar import LAYER_SWITCHES, OUT_SWITCHES, RUN_SWITCHES, SWITCHES, of_run, parse

OP_NAMES = [field.name for field in fields(kernels.Ops) if field.default is MISSING or field.name == "mlp"]
"""Those that a switch turns; rope_attention and decode_attention follow from them."""
N_LAYERS = 4
NEEDS, NEEDED_BY = {"mlp": ("swiglu",)}, {"swiglu": ("mlp",)}
"""A kernel that has another op in it is turned on with that one's, and off with it."""


# -------------------------------------------------------------------------------------------------------------- grammar


def by_hand(items: list[tuple[str, str | None]], n_layers: int) -> list[set[str]]:
    """The rules, spelled out place by place: items are (word, place). Behind the last place stands the run."""
    chosen = [set() for _ in range(n_layers + 2)]
    for i, here in enumerate(chosen):
        occurs = [*[LAYER_SWITCHES] * n_layers, OUT_SWITCHES, RUN_SWITCHES][i]
        for word, place in items:
            if place is None:
                covered = True
            elif place == "out":
                covered = i == n_layers
            else:
                first, _, last = place.partition("-")
                covered = int(first) <= i <= int(last or first)
            for switch in occurs:
                if covered and word in ("all", switch, *NEEDED_BY.get(switch, ())):
                    here.add(switch)
                elif covered and word in ("none", f"-{switch}", *(f"-{other}" for other in NEEDS.get(switch, ()))):
                    here.discard(switch)
    return chosen


@st.composite
def valid_items(draw):
    words = st.sampled_from(["all", "none", *SWITCHES, *(f"-{switch}" for switch in SWITCHES)])
    word = draw(words)
    switch = word.removeprefix("-")
    places = [st.none()]
    if switch in (*LAYER_SWITCHES, "all", "none"):
        layer = st.integers(0, N_LAYERS - 1)
        places += [layer.map(str), st.tuples(layer, layer).map(lambda pair: f"{min(pair)}-{max(pair)}")]
    if switch in (*OUT_SWITCHES, "all", "none"):
        places.append(st.just("out"))
    return word, draw(st.one_of(places))


@given(items=st.lists(valid_items(), min_size=1, max_size=6), blank=st.sampled_from(["", " ", "\t "]))
def test_a_selection_means_what_its_items_say_in_order(items, blank):
    spec = ",".join(blank + word + (f"{blank}@{blank}{place}" if place else "") + blank for word, place in items)
    assert [*parse(spec, N_LAYERS), of_run(spec, N_LAYERS)] == by_hand(items, N_LAYERS)


@given(spec=st.text(alphabet="almnoeropsw_igutk@-,0129 \t٣²", max_size=20), n_layers=st.integers(1, 12))
def test_any_text_is_a_selection_or_a_value_error(spec, n_layers):
    try:
        chosen = parse(spec, n_layers)
    except ValueError:
        with pytest.raises(ValueError, match="kernels"):
            of_run(spec, n_layers)
        return
    assert of_run(spec, n_layers) <= set(RUN_SWITCHES)
    assert len(chosen) == n_layers + 1
    assert all(here <= set(LAYER_SWITCHES) for here in chosen[:-1])
    assert chosen[-1] <= set(OUT_SWITCHES)


@pytest.mark.parametrize(
    ("spec", "layers", "out"),
    [
        ("none", [set()] * 3, set()),
        ("all", [set(LAYER_SWITCHES)] * 3, set(OUT_SWITCHES)),
        ("all,-rope@0-1", [set(LAYER_SWITCHES) - {"rope"}] * 2 + [set(LAYER_SWITCHES)], set(OUT_SWITCHES)),
        ("attention@1-2,swiglu", [{"swiglu"}] + [{"attention", "swiglu"}] * 2, set()),
        ("all,-rms_norm@out", [set(LAYER_SWITCHES)] * 3, {"embedding", "linear_cross_entropy"}),
        ("rms_norm", [{"rms_norm"}] * 3, {"rms_norm"}),
        ("rms_norm@out", [set()] * 3, {"rms_norm"}),
        ("linear_cross_entropy", [set()] * 3, {"linear_cross_entropy"}),
        ("all@1", [set(), set(LAYER_SWITCHES), set()], set()),
        ("all,none@0-2", [set()] * 3, set(OUT_SWITCHES)),
        ("rope,-rope,rope@2", [set(), set(), {"rope"}], set()),
        ("-rope", [set()] * 3, set()),
        ("mlp", [{"mlp", "swiglu"}] * 3, set()),
        ("mlp@1", [set(), {"mlp", "swiglu"}, set()], set()),
        ("swiglu", [{"swiglu"}] * 3, set()),
        ("mlp,-mlp", [{"swiglu"}] * 3, set()),
        ("all,-mlp@0", [set(LAYER_SWITCHES) - {"mlp"}] + [set(LAYER_SWITCHES)] * 2, set(OUT_SWITCHES)),
        ("all,-swiglu", [set(LAYER_SWITCHES) - {"mlp", "swiglu"}] * 3, set(OUT_SWITCHES)),
        ("mlp,-swiglu@0-1", [set()] * 2 + [{"mlp", "swiglu"}], set()),
        ("mlp,-swiglu,swiglu@0", [{"swiglu"}, set(), set()], set()),
        ("-swiglu,mlp", [{"mlp", "swiglu"}] * 3, set()),
        ("-mlp,swiglu", [{"swiglu"}] * 3, set()),
        (" rope @ 0 - 1 ", [{"rope"}] * 2 + [set()], set()),
        ("rope@00", [{"rope"}, set(), set()], set()),
    ],
)
def test_examples(spec, layers, out):
    assert parse(spec, 3) == [*layers, out]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "kernels '': empty item; write one or more of all, none, rms_norm"),
        ("rope,", "kernels 'rope,': empty item"),
        (",rope", "kernels ',rope': empty item"),
        ("rope, ,swiglu", "empty item"),
        (
            "softmax",
            "kernels item 'softmax': unknown switch 'softmax'; allowed: all, none, rms_norm, rope, swiglu, attention, mlp",
        ),
        ("add_rms_norm", "unknown switch 'add_rms_norm'"),
        ("Rope", "unknown switch 'Rope'"),
        ("-all", "all and none take no -; to turn all off, write none"),
        ("-none", "all and none take no -"),
        ("--rope", "unknown switch '-rope'"),
        ("-", "unknown switch ''"),
        ("@0", "unknown switch ''"),
        ("rope@3", "kernels item 'rope@3': layer 3 is out of range; allowed: 0 to 2, or out"),
        ("rope@0-3", "layer 3 is out of range"),
        ("all@3", "layer 3 is out of range"),
        ("rope@2-1", "place '2-1' is reversed; write 1-2"),
        ("rope@9-1", "place '9-1' is reversed"),
        ("rope@", "place '' is not a layer, a range such as 0-3, or out"),
        ("rope@-1", "place '-1' is not a layer"),
        ("rope@1-", "place '1-' is not a layer"),
        ("rope@0-1-2", "place '0-1-2' is not a layer"),
        ("rope@first", "place 'first' is not a layer"),
        ("rope@0@1", "place '0@1' is not a layer"),
        ("rope@0-out", "place '0-out' is not a layer"),
        ("rope@1.0", "place '1.0' is not a layer"),
        ("rope@²", "place '²' is not a layer"),
        ("rope@٣", "place '٣' is not a layer"),
        (
            "rope@out",
            "kernels item 'rope@out': rope does not occur at out, which has embedding, linear_cross_entropy, rms_norm",
        ),
        ("-attention@out", "attention does not occur at out"),
        ("mlp@out", "mlp does not occur at out"),
        (
            "linear_cross_entropy@1",
            f"linear_cross_entropy does not occur at layer 1, which has {', '.join(sorted(LAYER_SWITCHES))}",
        ),
        ("-linear_cross_entropy@0-2", "linear_cross_entropy does not occur at layer 0"),
        ("adamw@1", "kernels item 'adamw@1': adamw is of the whole run and takes no place; write adamw"),
        ("-adamw@out", "adamw is of the whole run and takes no place; write -adamw"),
        ("adamw@", "adamw is of the whole run and takes no place"),
    ],
)
def test_each_mistake_is_named_with_what_is_allowed(spec, message):
    with pytest.raises(ValueError, match="kernels") as caught:
        parse(spec, 3)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "on"),
    [
        ("all", True),
        ("none", False),
        ("adamw", True),
        ("swiglu", False),
        ("all,-adamw", False),
        ("all,-rope,-adamw,adamw", True),
        ("all,none", False),
        ("adamw,none@0-2,none@out", True),
        ("all@0-2,all@out", False),
    ],
)
def test_the_update_is_turned_by_its_name_and_by_all_and_none_without_a_place(spec, on):
    assert of_run(spec, 3) == ({"adamw"} if on else set())


def test_the_last_layer_of_a_model_of_one_is_layer_0():
    assert parse("rope@0", 1) == [{"rope"}, set()]
    with pytest.raises(ValueError, match="allowed: 0 to 0"):
        parse("rope@1", 1)


# --------------------------------------------------------------------------------------------------------------- select


def test_the_switches_are_the_ops():
    assert set(OP_NAMES) == {*SWITCHES, "add_rms_norm"} - set(RUN_SWITCHES)


@pytest.mark.parametrize("op", OP_NAMES)
def test_triton_never_answers_with_a_torch_twin(op):
    assert getattr(kernels.TRITON, op) is not getattr(kernels.TORCH, op)


def test_without_a_switch_every_place_is_torch():
    assert kernels.select("none", 3) == [kernels.TORCH] * 4


def test_all_is_triton_wherever_an_op_occurs():
    *layers, out = kernels.select("all", 2)
    for op in OP_NAMES:
        switch = "rms_norm" if op == "add_rms_norm" else op
        for here, occurring in [(layers[0], LAYER_SWITCHES), (layers[1], LAYER_SWITCHES), (out, OUT_SWITCHES)]:
            turned = switch in occurring
            assert getattr(here, op) is getattr(kernels.TRITON if turned else kernels.TORCH, op)


@pytest.mark.parametrize("switch", LAYER_SWITCHES)
def test_a_switch_turns_its_ops_and_no_other(switch):
    ops = kernels.select(f"{switch}@1", 2)
    turned = {"rms_norm", "add_rms_norm"} if switch == "rms_norm" else {switch, *NEEDS.get(switch, ())}
    assert ops[0] == ops[2] == kernels.TORCH
    for op in OP_NAMES:
        assert getattr(ops[1], op) is getattr(kernels.TRITON if op in turned else kernels.TORCH, op)


def test_the_feed_forwards_kernel_gives_way_to_another_swiglu():
    def other(gate_up):
        raise AssertionError

    assert replace(kernels.TRITON, swiglu=other).mlp is kernels.TORCH.mlp
    assert replace(kernels.TRITON, swiglu=kernels.TORCH.swiglu).mlp is kernels.TORCH.mlp
    assert replace(kernels.TRITON, rope=other).mlp is kernels.TRITON.mlp
    assert replace(kernels.TRITON, swiglu=other, mlp=other).mlp is other
    assert replace(kernels.TORCH, swiglu=kernels.TRITON.swiglu).mlp is kernels.TORCH.mlp


def test_a_switch_of_the_run_turns_no_op():
    assert kernels.select("adamw", 2) == kernels.select("none", 2)
    assert kernels.select("all,-adamw", 2) == kernels.select("all", 2)


def test_equal_places_share_one_set_of_ops():
    ops = kernels.select("rope@1-2", 4)
    assert ops[0] is ops[3] is ops[4]
    assert ops[1] is ops[2]
    assert ops[0] is not ops[1]


def test_select_raises_as_the_grammar_does():
    with pytest.raises(ValueError, match="layer 2 is out of range; allowed: 0 to 1"):
        kernels.select("rope@2", 2)


def test_the_grammar_needs_neither_torch_nor_triton_nor_numpy():
    code = (
        "import sys, kernels; from kernels import grammar; grammar.parse('all', 2)\n"
        "print({'torch', 'triton', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
