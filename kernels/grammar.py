"""The grammar of a kernel selection, e.g. `all,-rope@0-1` or `attention@4-7,swiglu`. Imports neither torch nor triton.

    spec   := item ("," item)*          later items win; spaces are ignored; the start is all torch
    item   := ("all" | "none" | SWITCH | "-" SWITCH) [ "@" place ]
    place  := LAYER | LAYER "-" LAYER | "out"

A switch is a kernel file. Layer i holds its ops and the norm that opens it; `out` holds the embedding, the final
norm and the loss head. `adamw`, the update, is of the whole run and takes no place. An item without a place covers all that it
can: every place where its op occurs, and for `all` and `none` the update too.

`mlp` has SwiGLU in it: it turns `swiglu` on with it, and `-swiglu` turns it off.
"""

LAYER_SWITCHES = ("rms_norm", "rope", "swiglu", "attention", "mlp")
OUT_SWITCHES = ("embedding", "rms_norm", "linear_cross_entropy")
RUN_SWITCHES = ("adamw",)
SWITCHES = tuple(dict.fromkeys((*LAYER_SWITCHES, *OUT_SWITCHES, *RUN_SWITCHES)))
NEEDS = {"mlp": "swiglu"}
"""Of a switch that is on at no place without another: that other."""


def attention_serves(head_dim: int) -> bool:
    """Whether the attention kernel takes this head dim; said here, where an option is checked before torch is imported."""
    return head_dim % 4 == 0 and 16 <= head_dim <= 256


MLP_WIDEST = 288
"""Columns of the widest model whose feed-forward is one kernel: a row in float32 in registers, 256 + 32 of them, fills a
multiprocessor of the present."""
MLP_FEWEST_ROWS = 12_288
"""Tokens below which that kernel would leave a quarter of a large GPU without work, or more."""


def mlp_serves(dim: int, hidden_dim: int, rows: int, itemsize: int) -> bool:
    """Whether the feed-forward kernel is meant for so many rows (tokens) of such a model, in a dtype of so many bytes.

    Rows that are aligned, and many; and half precision: float32 has no tensor core that would wait for memory.
    """
    aligned = dim % 16 == 0 and hidden_dim % 16 == 0
    return aligned and dim <= MLP_WIDEST and rows >= MLP_FEWEST_ROWS and itemsize == 2


def parse(spec: str, n_layers: int) -> list[frozenset[str]]:
    """Switches that `spec` turns to Triton at each place: `n_layers` layers, then `out`.

    Raises ValueError, naming the item and what is allowed, for an unknown switch, a place that is out of range or reversed, an op
    named where it does not occur, and an empty item.
    """
    return _chosen(spec, n_layers)[:-1]


def of_run(spec: str, n_layers: int) -> frozenset[str]:
    """Switches of the whole run that `spec` turns to Triton: `adamw`, or none. Raises ValueError as `parse` does."""
    return _chosen(spec, n_layers)[-1]


def _chosen(spec: str, n_layers: int) -> list[frozenset[str]]:
    """What `parse` returns, and behind it what `of_run` does."""
    occurs = [frozenset(LAYER_SWITCHES)] * n_layers + [frozenset(OUT_SWITCHES), frozenset(RUN_SWITCHES)]
    chosen = [frozenset()] * len(occurs)
    for raw in spec.split(","):
        item = "".join(raw.split())
        if not item:
            raise ValueError(f"kernels {spec!r}: empty item; write one or more of {_allowed(n_layers)}")
        word, at, place = item.partition("@")
        on = not word.startswith("-")
        named = _named(item, word, n_layers)
        if at and named <= frozenset(RUN_SWITCHES):
            raise ValueError(
                f"kernels item {item!r}: {word.lstrip('-')} is of the whole run and takes no place; write {word}"
            )
        covered = _places(item, place, n_layers) if at else range(len(occurs))
        if at and word not in ("all", "none"):
            for i in covered:
                if not named & occurs[i]:
                    here = "out" if i == n_layers else f"layer {i}"
                    has = ", ".join(sorted(occurs[i]))
                    raise ValueError(
                        f"kernels item {item!r}: {word.lstrip('-')} does not occur at {here}, which has {has}"
                    )
        if on:
            named |= {NEEDS[switch] for switch in named if switch in NEEDS}
        else:
            named |= {switch for switch, needed in NEEDS.items() if needed in named}
        for i in covered:
            chosen[i] = chosen[i] | (named & occurs[i]) if on and word != "none" else chosen[i] - named
    return chosen


def _named(item: str, word: str, n_layers: int) -> frozenset[str]:
    """Switches that one item speaks of."""
    if word in ("all", "none"):
        return frozenset(SWITCHES)
    if word in ("-all", "-none"):
        raise ValueError(f"kernels item {item!r}: all and none take no -; to turn all off, write none")
    switch = word.removeprefix("-")
    if switch not in SWITCHES:
        raise ValueError(f"kernels item {item!r}: unknown switch {switch!r}; allowed: {_allowed(n_layers)}")
    return frozenset((switch,))


def _places(item: str, place: str, n_layers: int) -> range:
    """Indices that one `@place` covers; `n_layers` is `out`."""
    if place == "out":
        return range(n_layers, n_layers + 1)
    first, dash, last = place.partition("-")
    numbers = (first, last) if dash else (first, first)
    if not all(n.isascii() and n.isdecimal() for n in numbers):
        raise ValueError(f"kernels item {item!r}: place {place!r} is not a layer, a range such as 0-3, or out")
    low, high = (int(n) for n in numbers)
    if low > high:
        raise ValueError(f"kernels item {item!r}: place {place!r} is reversed; write {high}-{low}")
    if high >= n_layers:
        raise ValueError(f"kernels item {item!r}: layer {high} is out of range; allowed: 0 to {n_layers - 1}, or out")
    return range(low, high + 1)


def _allowed(n_layers: int) -> str:
    last = n_layers - 1
    return (
        f"all, none, {', '.join(SWITCHES)}, each switch also as -switch, "
        f"each but {', '.join(RUN_SWITCHES)} with an optional place @0 to @{last}, @0-{last} or @out"
    )
