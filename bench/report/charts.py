"""The charts of `bench.report`: bars of steps and ops, loss curves, and the heat map of errors. Same results, same bytes."""

from collections.abc import Callable
from pathlib import Path

import numpy

from bench.archive import Result
from bench.report.standings import CPU, Standings
from training.errors import UserError

BLUE, LIGHT, ORANGE = "#08519c", "#9ecae1", "#d94801"
HEAT_RANGE = (0.5, 2.0)
"""Of fused over plain: 2 is what `bench.parity` allows."""


def draw(results: list[Result], folder: Path) -> list[str]:
    """Draw what there is into `folder`, delete other pictures there, and return the names of the files."""
    charts = _charts(results)
    try:
        for old in folder.glob("*.png"):
            old.unlink()
        for name, paint in charts.items():
            folder.mkdir(parents=True, exist_ok=True)
            figure, axes = _figure()
            paint(axes)
            figure.savefig(folder / name, metadata={"Software": None})  # which would name matplotlib's version
    except OSError as error:
        raise UserError(f"{folder} can't be written: {error.strerror}") from None
    return list(charts)


def names(results: list[Result]) -> list[str]:
    """The files that `draw` would write."""
    return list(_charts(results))


def _charts(results: list[Result]) -> dict[str, Callable]:
    """What to paint on a chart's axes, by file name."""
    standings = Standings(results)
    charts: dict[str, Callable] = {}
    for steps in standings.all_steps():
        timed = {variant: row for variant, row in steps.variants.items() if "ms" in row}
        if timed and steps.plain_settings and steps.where != CPU:
            title = f"{steps.preset} on {steps.where}, ms a step"
            charts[_name("step", steps.where, steps.preset)] = lambda axes, t=title, v=timed: _steps(axes, t, v)
    for gpu in standings.gpus:
        shares = {key[1:]: f for key, f in standings.all_ops().items() if key[0] == gpu and "of_copy" in f}
        shares = {key: f for key, f in shares.items() if key[2] != "both"}
        if shares:
            title = f"kernels on {gpu}, share of a copy's speed"
            charts[_name("ops", gpu)] = lambda axes, t=title, s=shares: _ops(axes, t, s)
    for result in standings.newest("loss_parity", "preset"):
        if {"plain", "fused"} <= result.data["losses"].keys():
            charts[_name("loss", result.gpu or CPU, result.data["preset"])] = lambda axes, r=result: _losses(axes, r)
    for result in standings.newest("parity", "preset", "dtype"):
        if any(row["excess"] is not None for row in result.data["ops"]):
            name = _name("parity", result.gpu or CPU, result.data["preset"], result.data["dtype"])
            charts[name] = lambda axes, r=result: _heat_map(axes, r)
    for result in standings.newest("time_to_loss", "preset"):
        name = _name("time-to-loss", result.gpu or CPU, result.data["preset"])
        charts[name] = lambda axes, r=result: _time_to_loss(axes, r)
    for result in standings.newest("waterfall", "preset", "of_gpu", "variant"):
        name = _name("waterfall", result.data["of_gpu"], result.data["preset"], result.data["variant"])
        charts[name] = lambda axes, r=result: _waterfall(axes, r)
    for result in standings.newest("roofline", "preset"):
        for of in result.data["gpus"]:
            charts[_name("floor", of["gpu"], result.data["preset"])] = lambda axes, r=result, o=of: _floor(axes, r, o)
    return charts


def _name(*words: str) -> str:
    return "-".join(word.lower().replace(" ", "-") for word in words) + ".png"


def _figure():
    # The object interface: pyplot keeps figures alive and picks a screen where it finds one.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


# ------------------------------------------------------------------------------------------------------------- pictures


def _steps(axes, title: str, variants: dict[str, dict]) -> None:
    """A bar a variant, with its spread."""
    ms = numpy.array([row["ms"] for row in variants.values()])
    spread = [ms - [row["ms_min"] for row in variants.values()], [row["ms_max"] for row in variants.values()] - ms]
    colors = [ORANGE if variant == "fused" else BLUE for variant in variants]
    bars = axes.barh(list(variants), ms, xerr=spread, color=colors)
    axes.bar_label(bars, [f"{x:.1f}" for x in ms], padding=6)
    axes.invert_yaxis()
    axes.set_title(title)


def _ops(axes, title: str, shares: dict[tuple[str, str, str], dict]) -> None:
    """A bar an op, size and pass; the line is a copy's speed."""
    labels = [" ".join(key) for key in shares]
    colors = [BLUE if key[2] == "forward" else LIGHT for key in shares]
    axes.barh(labels, [figures["of_copy"] for figures in shares.values()], color=colors)
    axes.axvline(1.0, color=ORANGE, linewidth=1)
    axes.figure.set_figheight(max(4.5, 0.2 * len(labels)))
    axes.invert_yaxis()
    axes.set_title(title)


def _losses(axes, result: Result) -> None:
    """How far each run drifted from the plain one, averaged over a twentieth of the steps."""
    losses = result.data["losses"]
    plain = numpy.array(losses["plain"])
    window = max(1, len(plain) // 20)
    for name, values in losses.items():
        n = min(len(values), len(plain))
        if name == "plain" or n < window:
            continue
        drift = numpy.convolve(numpy.array(values[:n]) - plain[:n], numpy.ones(window) / window, mode="valid")
        is_fused = name == "fused"
        axes.plot(drift, label=name, color=ORANGE if is_fused else LIGHT, linewidth=1.6 if is_fused else 1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss less that of plain (nats)")
    axes.legend(frameon=False)
    axes.set_title(f"{result.data['preset']}, {result.data['dtype']}, on {result.gpu or CPU}")


def _heat_map(axes, result: Result) -> None:
    """Layers by ops: the worst of the op's outputs and gradients, as fused over plain."""
    rows = [row for row in result.data["ops"] if row["excess"] is not None]
    layers = list(dict.fromkeys(str(row["layer"]) for row in rows))
    calls = list(dict.fromkeys(row["call"] for row in rows))
    worst = numpy.full((len(layers), len(calls)), numpy.nan)
    for row in rows:
        at = layers.index(str(row["layer"])), calls.index(row["call"])
        bad = numpy.inf if row["excess"] != row["excess"] else row["excess"]  # NaN stands for an op that is not there
        worst[at] = numpy.fmax(worst[at], bad)
    low, high = HEAT_RANGE
    image = axes.imshow(numpy.minimum(worst, high), cmap="coolwarm", vmin=low, vmax=high, aspect="auto")
    axes.set_xticks(range(len(calls)), calls, rotation=30, ha="right")
    axes.set_yticks(range(len(layers)), layers)
    axes.set_ylabel("layer")
    for y, x in numpy.argwhere(~numpy.isnan(worst)):
        axes.text(x, y, f"{worst[y, x]:.2f}", ha="center", va="center", fontsize=8)
    axes.figure.colorbar(image, label="error of fused over that of plain")
    axes.set_title(f"{result.data['preset']}, {result.data['dtype']}, on {result.gpu or CPU}")


def _floor(axes, result: Result, of: dict) -> None:
    """The floor, op by op, above the bars of what was measured."""
    left = 0.0
    for i, row in enumerate(of["rows"]):
        name = " ".join((row["op"], row["part"])).strip()
        axes.barh("floor", row["ms"], left=left, label=name, color=f"C{i % 10}", hatch="//" if i >= 10 else None)
        left += row["ms"]
    for row in of["measured"]:
        axes.barh(row["variant"], row["ms"], color=LIGHT)
    axes.invert_yaxis()
    axes.set_xlabel("ms a step")
    axes.legend(frameon=False, fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    axes.set_title(f"the floor of a step of {result.data['preset']} on {of['gpu']}, and what was measured")


def _waterfall(axes, result: Result) -> None:
    """The floor, and each cause from where the one before it ended, up to the step."""
    data = result.data
    bars = [("the floor", 0.0, data["floor_ms"]), *((r["cause"], r["from_ms"], r["above_ms"]) for r in data["rows"])]
    bars.append(("the step", 0.0, data["ms"]))
    names, starts, widths = zip(*bars, strict=True)
    colors = [BLUE, *[ORANGE] * len(data["rows"]), BLUE]
    drawn = axes.barh(names, widths, left=starts, color=colors)
    axes.bar_label(drawn, [f"{width:+.2f}" for width in widths[:-1]] + [f"{data['ms']:.2f}"], padding=4, fontsize=8)
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_title(f"a step of {data['preset']} on {data['of_gpu']}: {data['source']}", fontsize=10)


def _time_to_loss(axes, result: Result) -> None:
    """Validation loss over seconds: a colour a run, a line a seed; the level line is the target."""
    names = list(dict.fromkeys(row["run"] for row in result.data["rows"]))
    for row in result.data["rows"]:
        _, seconds, losses = zip(*row["curve"], strict=True)
        seen = any(line.get_label() == row["run"] for line in axes.get_lines())
        axes.plot(seconds, losses, color=f"C{names.index(row['run'])}", label=None if seen else row["run"], linewidth=1)
    axes.axhline(result.data["target"], color="grey", linewidth=0.8)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("validation loss (nats)")
    axes.legend(frameon=False)
    axes.set_title(f"{result.data['preset']}, {result.data['dtype']}, on {result.gpu or CPU}")
