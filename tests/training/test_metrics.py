"""What a run reports: the lines people read, the file programs read, the backends, and the picture at the end."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy
import pytest

from training.errors import UserError
from training.log import plot
from training.log.metrics import Metrics, StepRecord, read_metrics, step_line


def record(step, **changes):
    values = {
        "step": step,
        "loss": 8.31776,
        "lr": 5e-4,
        "ms": 1780.126,
        "mfu": 0.01319,
        "tflops": 4.118,
        "tokens_per_second": 73636.4,
        "grad_norm": 1.23456,
        "peak_memory": 3 * 2**29,
    }
    return StepRecord(**(values | changes))


def metrics(out_dir, **changes):
    options = {
        "total_steps": 100,
        "start_step": 0,
        "log_interval": 1,
        "run_name": "run",
        "config": {"dim": 288, "out_dir": out_dir},
        "tensorboard": False,
    }
    log = Metrics(out_dir, **(options | changes))
    log.open()
    return log


def lines(out_dir):
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_step_is_a_line_in_the_form_of_the_reference():
    assert step_line(record(7)) == (
        "7 | loss 8.3178 | lr 5.000000e-04 | 1780.13ms | mfu 1.32% | 73,636 tok/s | grad 1.235 | 1.50 GiB"
    )


def test_an_unknown_mfu_is_not_a_number_and_tflops_stand_in_for_it():
    assert step_line(record(7, mfu=None, peak_memory=700 * 2**20)) == (
        "7 | loss 8.3178 | lr 5.000000e-04 | 1780.13ms | mfu n/a | 4.12 TFLOP/s | 73,636 tok/s | grad 1.235 | 700 MiB"
    )


def test_a_skipped_step_says_so():
    assert step_line(record(7, loss=float("nan"), grad_norm=float("inf"), skipped=True)) == (
        "7 | loss nan | lr 5.000000e-04 | 1780.13ms | mfu 1.32% | 73,636 tok/s | grad inf | 1.50 GiB"
        " | skipped: not finite"
    )


@pytest.mark.parametrize("mfu", [0.3, None])
def test_the_first_line_says_where_the_formula_of_the_mfu_is(tmp_path, capsys, mfu):
    log = metrics(tmp_path)
    log.step(record(0, mfu=mfu))
    log.step(record(1, mfu=mfu))
    log.close()
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3
    assert "model/flops.py" in out[0]
    assert "training/hardware.py" in out[0]


def test_lines_are_printed_at_the_interval_and_for_skipped_steps_and_all_steps_are_in_the_file(tmp_path, capsys):
    log = metrics(tmp_path, log_interval=5)
    for step in range(11):
        log.step(record(step, skipped=step == 7))
    log.close()
    printed = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert printed == ["0", "5", "7", "10"]
    assert [line["step"] for line in lines(tmp_path) if line["kind"] == "step"] == list(range(11))


def test_an_evaluation_is_a_line_and_its_sample_follows(tmp_path, capsys):
    log = metrics(tmp_path)
    log.evaluation(40, 2.34567, 2.45678, 1.01234, sample="def f():\n\treturn 1")
    log.close()
    assert capsys.readouterr().out == (
        "step 40: train loss 2.3457, val loss 2.4568, 1.0123 bits per byte\ndef f():\n\treturn 1\n"
    )
    entry = lines(tmp_path)[-1]
    assert entry.pop("time") > 1.7e9
    assert entry == {
        "kind": "eval",
        "step": 40,
        "train_loss": 2.34567,
        "val_loss": 2.45678,
        "bits_per_byte": 1.01234,
        "sample": "def f():\n\treturn 1",
    }


def test_the_file_holds_each_line_at_once_and_full_precision_and_no_nan(tmp_path):
    log = metrics(tmp_path)
    log.step(record(3, loss=0.1 + 0.2, grad_norm=float("inf"), mfu=None))
    log.note("saved a checkpoint")
    written = (tmp_path / "metrics.jsonl").read_text()  # before close: a kill loses no line
    assert "NaN" not in written
    assert "Infinity" not in written
    start, step, note = lines(tmp_path)
    assert (start["kind"], start["step"], start["config"]["dim"]) == ("start", 0, 288)
    assert (step["kind"], step["step"], step["loss"]) == ("step", 3, 0.1 + 0.2)
    assert step["grad_norm"] is step["mfu"] is None
    assert step["skipped"] is False
    assert (note["kind"], note["step"], note["text"]) == ("note", 3, "saved a checkpoint")
    log.close()
    log.close()


def test_a_resumed_run_appends_and_the_last_value_of_a_step_counts(tmp_path):
    first = metrics(tmp_path)
    for step in range(10):
        first.step(record(step, loss=1.0))
    first.evaluation(9, 1.0, 1.0, 1.0)
    first.close()
    second = metrics(tmp_path, start_step=5)
    for step in range(5, 8):
        second.step(record(step, loss=2.0))
    second.evaluation(7, 2.0, 2.0, 2.0)
    second.close()

    assert len(lines(tmp_path)) == 11 + 1 + 4 + 1
    steps, evaluations = read_metrics(tmp_path / "metrics.jsonl")
    # Steps 8 and 9 belong to a future that did not happen.
    assert [(line["step"], line["loss"]) for line in steps] == [(i, 1.0) for i in range(5)] + [
        (i, 2.0) for i in range(5, 8)
    ]
    assert [line["step"] for line in evaluations] == [7]


def test_a_line_that_a_kill_cut_short_spoils_nothing(tmp_path):
    metrics(tmp_path).close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "st')
    log = metrics(tmp_path)
    log.step(record(1))
    log.close()
    steps, _ = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in steps] == [1]
    assert [text[:16] for text in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        '{"kind": "start"',
        '{"kind": "step",',
        '{"kind": "start"',
        '{"kind": "step",',
    ]


def test_a_file_that_cannot_be_opened_is_a_user_error(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"--out-dir .*metrics\.jsonl cannot be written: Is a directory"):
        metrics(tmp_path)


def test_a_full_disk_is_told_once_and_what_fits_later_is_kept(tmp_path, monkeypatch, capsys):
    """A disk with room for half a line at first, and for all of them later: no half line stays."""
    from training.log import appended

    write, room = appended.AppendedFile.write, [10_000]

    def write_what_fits(self, piece):
        if len(piece) <= room[0]:
            return write(self, piece)
        file, self._file = (
            self._file,
            types.SimpleNamespace(
                fileno=self._file.fileno, truncate=self._file.truncate, write=nearly_full(self._file)
            ),
        )
        try:
            return write(self, piece)
        finally:
            self._file = file

    monkeypatch.setattr(appended.AppendedFile, "write", write_what_fits)
    log = metrics(tmp_path, tensorboard=True)
    room[0] = 0
    for step in range(3):
        log.step(record(step))
    log.evaluation(3, 1.0, 1.0, 1.0, sample="x")
    room[0] = 10_000
    log.step(record(3))
    log.close()
    assert capsys.readouterr().err.splitlines() == [
        f"{Path(sys.argv[0]).name}: {name} in {tmp_path} could not be written: No space left on device; "
        "the run goes on without what it misses"
        for name in ("metrics.jsonl", "tensorboard")
    ]
    assert [(line["kind"], line["step"]) for line in lines(tmp_path)] == [("start", 0), ("step", 3)]
    assert [event.step for event in scalars(tmp_path, "train/loss")] == [3]


def nearly_full(file):
    """What writing is on a disk with room for three bytes."""
    room = [3]

    def write(piece):
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0], fits = 0, room[0]
        return file.write(piece[:fits])

    return write


def scalars(out_dir, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(out_dir / "tensorboard")).Reload().Scalars(name)


def test_without_a_folder_everything_is_printed_and_nothing_is_kept(tmp_path, capsys):
    log = Metrics(
        tmp_path / "out", total_steps=9, start_step=0, log_interval=1, run_name="", config={}, tensorboard=True
    )
    log.note("a note")
    log.evaluation(3, 1.0, 1.0, 1.0, sample="a sample")
    log.close()
    assert capsys.readouterr().out.splitlines()[-1] == "a sample"
    assert not (tmp_path / "out").exists()


def test_wandb_that_does_not_start_is_a_user_error(tmp_path, monkeypatch):
    module = types.SimpleNamespace(init=lambda **_: 1 / 0)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(UserError, match=r"--wandb-log: wandb does not start: division by zero; `wandb login`"):
        metrics(tmp_path / "run", wandb_project="llama")
    assert not (tmp_path / "run").exists()


def test_wandb_that_fails_later_is_told_once(tmp_path, monkeypatch, capsys):
    run = types.SimpleNamespace(log=lambda *_, **__: 1 / 0, finish=lambda: 1 / 0)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run))
    log = metrics(tmp_path, wandb_project="llama")
    log.step(record(0))
    log.step(record(1))
    log.close()
    assert capsys.readouterr().err.count("wandb in") == 1
    assert [line["step"] for line in lines(tmp_path) if line["kind"] == "step"] == [0, 1]


def test_a_stdout_that_is_full_is_told_once(tmp_path):
    code = f"from tests.training.test_metrics import report_a_run; import pathlib; report_a_run(pathlib.Path({str(tmp_path)!r}))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    told = "-c: stdout could not be written: No space left on device; the run goes on without the lines it misses\n"
    assert (done.returncode, done.stderr) == (0, told)
    assert len([line for line in lines(tmp_path) if line["kind"] == "step"]) == 10


def test_an_out_dir_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out-dir .*: Not a directory"):
        metrics(tmp_path / "file" / "run")


def report_a_run(out_dir):
    log = metrics(out_dir, total_steps=10)
    for step in range(10):
        log.step(record(step))
    log.evaluation(10, 1.0, 1.0, 1.0, sample="a\x1b[31mred\x07\rline\u2028é😀 [bold]x[/bold]")
    log.close()


def test_no_control_character_reaches_a_pipe(tmp_path, capsys):
    report_a_run(tmp_path)
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out)
    assert out.endswith("a\\x1b[31mred\\x07\\rline\\u2028é😀 [bold]x[/bold]\n")


def test_a_stdout_that_knows_only_ascii_is_no_reason_to_stop(tmp_path):
    code = f"from tests.training.test_metrics import report_a_run; import pathlib; report_a_run(pathlib.Path({str(tmp_path)!r}))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    assert rb"\xe9\U0001f600" in done.stdout
    assert done.stdout.isascii()


def test_a_terminal_gets_a_bar_below_the_lines(tmp_path, monkeypatch):
    pty = pytest.importorskip("pty")
    monkeypatch.setenv("TERM", "xterm-256color")
    reader, writer = pty.openpty()
    with open(writer, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        report_a_run(tmp_path)
        monkeypatch.undo()
    shown = b""
    with contextlib.suppress(OSError):  # what Linux says at the end of a closed terminal
        while chunk := os.read(reader, 65536):
            shown += chunk
    os.close(reader)
    text = shown.decode()
    assert step_line(record(9)) in text
    assert "10/10" in text
    assert "loss 8.3178" in text.split("10/10")[1]
    assert "\x1b[31m" not in text.split("step 10:")[1].split("10/10")[0]  # the sample's own escape is shown, not obeyed
    assert "[bold]x[/bold]" in text


def test_tensorboard_gets_the_numbers_and_a_resumed_run_hides_what_it_replaces(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, loss in ((0, 1.0), (2, 2.0)):
        log = metrics(tmp_path, start_step=start, tensorboard=True)
        for step in range(start, 4):
            log.step(record(step, loss=loss, mfu=None, grad_norm=float("nan")))
        log.evaluation(4, 1.5, 2.5, 3.5, sample="x")
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(0, 1), (1, 1), (2, 2), (3, 2)]
    assert [event.value for event in events.Scalars("eval/val_loss")] == [2.5]
    assert "train/tokens_per_second" in events.Tags()["scalars"]
    assert not {"train/mfu", "train/grad_norm", "train/step"} & set(events.Tags()["scalars"])


def test_wandb_that_is_not_installed_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"--wandb-log: .*pip install wandb"):
        metrics(tmp_path / "run", wandb_project="llama")
    assert not (tmp_path / "run").exists()


def test_wandb_gets_the_numbers(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish")
    )
    module = types.SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", module)
    log = metrics(tmp_path, wandb_project="llama")
    log.step(record(0))
    log.evaluation(1, 1.5, 2.5, 3.5)
    log.close()
    assert calls[0] == {
        "project": "llama",
        "name": "run",
        "config": {"dim": 288, "out_dir": tmp_path},
        "dir": str(tmp_path),
    }
    assert calls[1][0] == 0
    assert calls[1][1]["train/loss"] == 8.31776
    assert calls[2:] == [(1, {"eval/train_loss": 1.5, "eval/val_loss": 2.5, "eval/bits_per_byte": 3.5}), "finish"]


def test_nothing_heavy_is_imported_before_it_is_used():
    code = (
        "import sys, training.log.metrics, training.hardware; "
        "print([m for m in ('torch', 'matplotlib', 'tensorboard', 'rich', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"[]\n"


def fill(out_dir, losses, evaluations=(), skipped=()):
    log = metrics(out_dir)
    for step, loss in enumerate(losses):
        log.step(record(step, loss=loss, skipped=step in skipped))
    for step, loss in evaluations:
        log.evaluation(step, loss, loss, loss)
    log.close()
    return out_dir / "metrics.jsonl"


def drawn_pixels(path):
    """How many pixels are of the colours of the three lines: raw, smoothed, validation."""
    from matplotlib.image import imread

    pixels = (imread(path)[..., :3] * 255).round().astype(int)
    colours = ((0x9E, 0xCA, 0xE1), (0x08, 0x51, 0x9C), (0xD9, 0x48, 0x01))
    return [int((abs(pixels - colour).sum(-1) < 30).sum()) for colour in colours]


@pytest.mark.parametrize("log_x", [False, True])
def test_the_curve_shows_raw_smoothed_and_validation_losses(tmp_path, log_x):
    noise = numpy.random.default_rng(0).normal(0, 0.2, 300)
    losses = 2 + 6 * numpy.exp(-numpy.arange(300) / 40) + noise
    path = fill(tmp_path, losses.tolist(), [(0, 8.3), (100, 2.5), (299, 2.1)])
    assert plot.draw_loss_curve(path, tmp_path / "loss.png", log_x=log_x)
    raw, smoothed, validation = drawn_pixels(tmp_path / "loss.png")
    assert min(raw, smoothed) > 500
    assert validation > 100  # at least two of the three points
    assert "matplotlib.pyplot" not in sys.modules


def test_steps_that_are_skipped_or_not_finite_are_gaps_in_the_curve(tmp_path):
    flat, holes = [3.0] * 100, [3.0] * 30 + [float("nan")] * 40 + [3.0] * 30
    drawn = {}
    for name, losses, skipped in [("whole", flat, ()), ("nan", holes, ()), ("skipped", flat, range(30, 70))]:
        path = fill(tmp_path / name, losses, skipped=skipped)
        plot.draw_loss_curve(path, tmp_path / name / "loss.png")
        drawn[name] = drawn_pixels(tmp_path / name / "loss.png")[1]
    assert drawn["nan"] == drawn["skipped"] < 0.75 * drawn["whole"]


@pytest.mark.parametrize("losses", [[], [float("nan")] * 3])
def test_a_run_without_a_loss_has_no_picture(tmp_path, losses):
    assert not plot.draw_loss_curve(fill(tmp_path, losses), tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_a_picture_that_cannot_be_written_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"loss\.png cannot be written: No such file"):
        plot.draw_loss_curve(fill(tmp_path, [1.0]), tmp_path / "missing" / "loss.png")


def test_a_run_that_only_evaluated_has_a_picture(tmp_path):
    assert plot.draw_loss_curve(fill(tmp_path, [], [(0, 2.5)]), tmp_path / "loss.png")


def test_smoothing_is_a_centred_mean_that_keeps_the_start_and_the_gaps():
    values = numpy.arange(500.0)
    assert numpy.allclose(plot.smooth(values)[:495], values[:495])  # a straight line stays, so nothing lags
    assert plot.smooth(numpy.array([10.0, 1, 1, 1]))[0] == 10
    noisy = numpy.random.default_rng(0).normal(size=2000)
    assert plot.smooth(noisy)[50:].std() < 0.3 * noisy.std()
    holes = noisy.copy()
    holes[100:110] = numpy.nan
    assert (numpy.isnan(plot.smooth(holes)) == numpy.isnan(holes)).all()
