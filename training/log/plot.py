"""The loss curve of a run as a picture."""

from pathlib import Path

import numpy

from training.errors import UserError
from training.log.metrics import read_metrics


def draw_loss_curve(metrics_jsonl: str | Path, png: str | Path, *, log_x: bool = False) -> bool:
    """Draw the training loss of every step, raw and smoothed, and the validation losses; True if it drew anything.

    metrics_jsonl: as `training.log.metrics.Metrics` writes it. Skipped steps and losses that are not finite are gaps. Where
    the file has no finite loss at all, no picture is made. log_x: steps on a logarithmic axis, which has no step 0.
    Raises UserError where the file cannot be read or the picture not be written.
    """
    try:
        steps, evaluations = read_metrics(metrics_jsonl)
    except OSError as error:
        raise UserError(f"{metrics_jsonl} cannot be read: {error.strerror or error}") from error
    steps = [line | {"loss": None} if line["skipped"] else line for line in steps]
    train_x, train_y = _series(steps, "loss")
    val_x, val_y = _series(evaluations, "val_loss")
    if not numpy.isfinite(numpy.concatenate([train_y, val_y])).any():
        return False

    # Not by pyplot, which keeps every figure alive and opens a window where there is a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if numpy.isfinite(train_y).any():
        axes.plot(train_x, train_y, color="#9ecae1", linewidth=0.8, label="training, each step")
        axes.plot(train_x, smooth(train_y), color="#08519c", linewidth=1.6, label="training, smoothed")
    if numpy.isfinite(val_y).any():
        last = val_y[numpy.isfinite(val_y)][-1]
        label = f"validation ({last:.4f} at the end)"
        axes.plot(val_x, val_y, "o", color="#d94801", markersize=4.5, label=label)
    if log_x:
        axes.set_xscale("log", nonpositive="mask")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(Path(metrics_jsonl).resolve().parent.name, fontsize=11)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)
    draft = Path(png).with_name(f".tmp-{Path(png).name}")
    try:
        figure.savefig(draft, format="png")
        draft.replace(png)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise UserError(f"{png} cannot be written: {error.strerror or error}") from error
    return True


def smooth(values: numpy.ndarray) -> numpy.ndarray:
    """Centred moving average over 2% of the points, NaN where `values` is; values (N,) float64.

    At the start the window is narrowed on both sides, or the steep first losses would be averaged with what follows.
    """
    position = numpy.arange(len(values))
    half = max(len(values) // 100, 1)
    first = position - numpy.minimum(half, position)
    end = numpy.minimum(position + numpy.minimum(half, position) + 1, len(values))
    known = numpy.isfinite(values)
    total = numpy.concatenate([[0.0], numpy.cumsum(numpy.where(known, values, 0.0))])
    count = numpy.concatenate([[0], numpy.cumsum(known)])
    mean = (total[end] - total[first]) / numpy.maximum(count[end] - count[first], 1)
    return numpy.where(known, mean, numpy.nan)


def _series(lines: list[dict], key: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Steps and values of some lines; a null is NaN, at which matplotlib breaks a line."""
    steps = numpy.array([line["step"] for line in lines], dtype=numpy.int64)
    return steps, numpy.array([numpy.nan if line[key] is None else line[key] for line in lines], dtype=numpy.float64)
