"""train.py from the outside: what a run leaves behind, and how it stops."""

import json
import re
import signal
from dataclasses import replace

import pytest
import torch

import train
from tests.support import run_testing
from tests.support.run_testing import (
    TINY,
    Result,
    arguments,
    finish,
    pointers,
    records,
    start,
    state,
    wait_until,
    write_text,
)
from training import evaluation
from training.checkpoint import files as checkpoint
from training.command_line import from_toml, parse
from training.data.tokenizer import load_tokenizer
from training.distributed import World
from training.step import readback
from training.step import trainer as step
from training.step.schedule import learning_rate

# ------------------------------------------------------------------------------------------------------- a run's traces


def test_a_run_ends_well_and_says_where_everything_is(finished):
    out_dir, result = finished
    assert (result.status, result.err) == (0, "")
    assert result.out.endswith(f"everything is in {out_dir}\n")
    assert "done: 12 steps, best val loss " in result.out


def test_the_log_has_a_line_of_the_reference_at_each_interval(finished):
    form = (
        r"(\d+) \| loss \d+\.\d{4} \| lr \d\.\d{6}e[+-]\d\d \| \d+\.\d\dms \| mfu n/a \| \d+\.\d\d TFLOP/s"
        r" \| [\d,]+ tok/s \| grad \d+\.\d{3} \| [\d.]+ [MG]iB"
    )
    lines = [line for line in finished[1].out.splitlines() if " | " in line]
    assert [re.fullmatch(form, line)[1] for line in lines] == ["0", "3", "6", "9"]


def test_the_first_line_says_what_is_trained_where_and_on_how_much(finished, text):
    first = finished[1].out.splitlines()[0]
    parameters = 300 * 16 + 2 * (16 * 32 + 16 * 16 + 3 * 16 * 64 + 2 * 16) + 16
    assert first.startswith(f"2 layers of width 16: {parameters:,} parameters on cpu, float32, kernels none; ")
    assert "64 a step" in first


def test_the_next_lines_say_how_the_text_was_cut_and_how_it_begins(finished, text):
    data, begins = finished[1].out.splitlines()[1:3]
    assert data.startswith("data text.txt, cut at blank lines: ")
    documents = text["data"].read_text().split("\n\n")
    assert begins.removeprefix("the first document begins ")[1:-5] in "\n".join(documents)


def test_the_metrics_hold_every_step_and_every_evaluation(finished):
    out_dir, _ = finished
    steps, evaluations = records(out_dir, "step"), records(out_dir, "eval")
    assert [line["step"] for line in steps] == list(range(12))
    assert [line["step"] for line in evaluations] == [0, 6, 12]
    config = from_toml((out_dir / "config.toml").read_text(), "config.toml")
    assert [line["lr"] for line in steps] == [learning_rate(config, i) for i in range(12)]
    assert evaluations[0]["val_loss"] == pytest.approx(torch.log(torch.tensor(300.0)).item(), rel=0.02)
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"]
    assert not any(line["skipped"] for line in steps)


def test_bits_per_byte_are_the_loss_of_the_validation_text_over_its_bytes(finished, text):
    out_dir, _ = finished
    tokenizer = load_tokenizer(out_dir / "step-00000012" / "tokenizer.model")
    documents = text["data"].read_text().split("\n\n")
    n_bytes = sum(len(document.encode()) for document in documents)
    n_tokens = sum(len(tokenizer.encode(document, bos=True)) for document in documents)
    line = records(out_dir, "eval")[-1]
    bits_per_token = line["val_loss"] / torch.log(torch.tensor(2.0)).item()
    assert line["bits_per_byte"] == pytest.approx(bits_per_token * n_tokens / n_bytes, rel=0.05)


def test_each_evaluation_shows_a_sample(finished):
    out_dir, result = finished
    samples = [line["sample"] for line in records(out_dir, "eval")]
    assert len(samples) == 3
    assert all(isinstance(sample, str) for sample in samples)
    assert result.out.count("val loss") == 4  # three evaluations and the last line


def test_a_sample_continues_its_prompt_and_can_be_left_out(run, tmp_path):
    run(max_iters=1, sample_prompt="the cat", sample_tokens=3)
    assert all(line["sample"].startswith("the cat") for line in records(tmp_path / "out", "eval"))
    run(max_iters=1, sample_tokens=0)
    assert [line["sample"] for line in records(tmp_path / "out", "eval")] == [None, None]


def test_a_sample_continues_the_beginning_of_a_prompt_that_is_too_long_and_says_so(run):
    said = r"^--sample-prompt has (\d+) tokens: samples continue the first (\d+) \(--max-seq-len\)$"
    (found,) = re.findall(said, run(max_iters=1, sample_prompt="the cat " * 30, sample_tokens=3).out, re.M)
    assert int(found[0]) > TINY["max_seq_len"] == int(found[1]) + 1
    assert not re.search(said, run(max_iters=1, sample_prompt="the cat " * 30, sample_tokens=0).out, re.M)


def test_sequences_of_one_token_train_without_a_sample(run, tmp_path):
    assert re.search("^--sample-tokens has no effect: --max-seq-len is 1", run(max_iters=1, max_seq_len=1).out, re.M)
    assert [line["sample"] for line in records(tmp_path / "out", "eval")] == [None, None]


def test_the_curve_and_the_events_are_drawn(finished):
    out_dir, _ = finished
    assert (out_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((out_dir / "tensorboard").glob("events.*"))


def test_the_merged_configuration_is_saved_with_the_run_and_starts_it_again(finished, text):
    out_dir, _ = finished
    config = parse(arguments(**TINY | text | {"out_dir": out_dir, "tensorboard": True}))
    for path in (out_dir / "config.toml", out_dir / "step-00000012" / "config.toml"):
        assert from_toml(path.read_text(), str(path)) == config
        assert parse([f"--config={path}"]) == replace(config, config=str(path))


def test_nothing_half_made_is_left(finished, run, tmp_path):
    data = tmp_path / "data"  # of its own: in what tests share one may have killed a run that was preparing
    assert run(data_dir=data, max_iters=2).status == 0
    assert not [path for folder in (finished[0], tmp_path / "out", data) for path in folder.rglob(".tmp-*")]
    assert [(folder / "manifest.json").is_file() for folder in data.iterdir()] == [True]


@pytest.mark.parametrize("always", [False, True])
def test_best_and_last_are_the_best_and_the_last(run, tmp_path, monkeypatch, always):
    losses = iter([9.0, 5.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr(evaluation.Evaluation, "losses", lambda self, stop: (1.0, next(losses), 1.0))
    assert run(eval_interval=3, always_save_checkpoint=always, keep_checkpoints=1).status == 0
    out_dir = tmp_path / "out"
    assert pointers(out_dir) == ("step-00000003", "step-00000012")
    assert sorted(path.name for path in out_dir.glob("step-*")) == ["step-00000003", "step-00000012"]
    saved = [line["step"] for line in records(out_dir, "note") if line["text"].startswith("saved")]
    assert saved == ([2, 5, 8, 11] if always else [2, 11])
    assert state(out_dir / "step-00000012")["best_val_loss"] == 5.0


def test_wsd_is_constant_and_then_linear_to_its_end(run, tmp_path):
    run(schedule="wsd", decay_iters=4, warmup_iters=2, learning_rate=0.01, min_lr=0.002, eval_iters=1)
    rates = [line["lr"] for line in records(tmp_path / "out", "step")]
    assert rates == pytest.approx([0.005, 0.01, *[0.01] * 6, 0.01, 0.008, 0.006, 0.004])


def test_packed_documents_are_masked_and_their_mean_length_is_told(run, tmp_path):
    plain = run(max_iters=3)
    packed = run(max_iters=3, packed_documents=True, out_dir=tmp_path / "packed")
    assert "tokens each on average" not in plain.out
    assert re.search(r"packed documents: .* [\d,]+ documents to train on, \d+\.\d tokens each on average", packed.out)
    losses, masked = ([line["loss"] for line in records(tmp_path / name, "step")] for name in ("out", "packed"))
    assert losses != masked
    assert masked == pytest.approx(losses, rel=0.05)


def test_kernels_run_in_the_interpreter_where_it_is_asked_for(run, tmp_path, text):
    assert "kernels none" in run(max_iters=2).out
    options = {"max_iters": 2, "kernels": "swiglu@0", "out_dir": tmp_path / "kernels"}
    result = finish(start("train.py", arguments(**TINY | text | options), TRITON_INTERPRET="1"))
    assert "kernels swiglu@0" in result.out
    plain, fused = (records(tmp_path / name, "step") for name in ("out", "kernels"))
    assert [line["loss"] for line in fused] == pytest.approx([line["loss"] for line in plain], rel=1e-5)


@pytest.mark.parametrize("breaks_down", [False, True])
def test_figures_that_arrive_a_step_late_are_those_of_their_step(run, tmp_path, monkeypatch, breaks_down):
    """As on a GPU, where the next step is launched before the last one's loss is read."""
    results = {}
    for name, steps in (("in time", 0), ("late", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(readback, "lag", lambda device, steps=steps: steps)
            poison(patch, {2, *range(6, 100)} if breaks_down else {})
            results[name] = run(eval_interval=5, max_skipped_steps=3, explain_skips=0, out_dir=tmp_path / name)
    in_time, late = results.values()
    assert late.status == in_time.status == int(breaks_down)
    assert late.err == in_time.err
    for kind in ("step", "eval"):
        ones, others = (records(tmp_path / name, kind) for name in results)
        if breaks_down and kind == "step":
            assert others.pop()["skipped"]  # the one that was under way when the break-down was seen
        for key in ("step", *(("loss", "grad_norm", "lr", "skipped") if kind == "step" else ("val_loss",))):
            assert [line[key] for line in ones] == [line[key] for line in others]
    printed, printed_late = (re.findall(r"^\d+ \|", result.out, re.M) for result in (in_time, late))
    assert printed == printed_late[: len(printed)]
    assert len(printed_late) == len(printed) + breaks_down


def test_a_trace_of_steps_3_to_5_is_written_and_what_took_longest_is_said(run, tmp_path):
    result = run(max_iters=7, profile=True)
    assert result.status == 0
    _, _, lines = result.out.partition("profile: ")
    head, *longest = lines.splitlines()[:11]
    assert re.fullmatch(r"\d+\.\d ms a step, of which", head)
    shares = [float(re.match(r" +(\d+\.\d)% +\d+\.\d\d ms in +\d+: \S", line)[1]) for line in longest]
    assert shares[:-1] == sorted(shares[:-1], reverse=True)
    assert 20 < sum(shares) <= 101
    assert longest[-1].endswith(": waiting for data")
    trace = json.loads((tmp_path / "out" / "profile.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert {name for name in names if name.startswith("ProfilerStep#")} == {f"ProfilerStep#{i}" for i in (3, 4, 5)}


def test_a_run_too_short_for_a_trace_says_so(run, tmp_path):
    result = run(max_iters=3, profile=True)
    assert result.status == 0
    assert "--profile has no effect: it records from step 3 of a call on, and this one makes 3" in result.out
    assert not (tmp_path / "out" / "profile.json").exists()


# ----------------------------------------------------------------------------------------------------- steps gone wrong


def poison(monkeypatch, steps):
    """Makes the loss of some steps of every run infinite."""
    count, loss_sum = iter(range(10**6)), step.Trainer._loss_sum

    def poisoned(self, *batch):
        loss = loss_sum(self, *batch)
        return loss * float("inf") if torch.is_grad_enabled() and next(count) in steps else loss

    monkeypatch.setattr(step.Trainer, "_loss_sum", poisoned)


@pytest.mark.fault("the loss or the gradient of a step is not finite", "the step is skipped, shown and counted")
@pytest.mark.parametrize("not_finite", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_of_a_loss_that_is_changes_nothing(run, tmp_path, monkeypatch, not_finite):
    """One number of the gradient is enough."""
    sum_over_processes, sums = World.sum, iter(range(10**6))

    def sum_and_poison(self, tensor):
        sum_over_processes(self, tensor)
        if tensor.numel() > 2 and next(sums) in (4, 11):  # of the gradients, which a step sums last
            tensor[tensor.numel() // 2] = not_finite

    monkeypatch.setattr(World, "sum", sum_and_poison)
    result = run(eval_interval=4, always_save_checkpoint=True)
    assert result.status == 0
    assert [line["step"] for line in records(tmp_path / "out", "step") if line["skipped"]] == [4, 11]
    assert all(line["loss"] is not None for line in records(tmp_path / "out", "step"))
    assert re.findall(r"^(\d+) \| loss \d\.\d+ .*skipped: not finite$", result.out, re.M) == ["4", "11"]
    saved = checkpoint.load(tmp_path / "out")
    assert (saved.state["skipped"], saved.state["updates"]) == (2, 10)
    assert all(tensor.isfinite().all() for group in ("model", "optimizer") for tensor in saved.tensors(group).values())


@pytest.mark.fault("the loss or the gradient of a step is not finite", "the step is skipped, shown and counted")
def test_a_step_that_is_not_finite_is_skipped_counted_and_shown(run, tmp_path, monkeypatch):
    poison(monkeypatch, {4, 5, 8})
    result = run(explain_skips=0)
    assert result.status == 0
    assert [line["step"] for line in records(tmp_path / "out", "step") if line["skipped"]] == [4, 5, 8]
    assert re.findall(r"^(\d+) \| loss inf .*skipped: not finite$", result.out, re.M) == ["4", "5", "8"]
    saved = state(tmp_path / "out" / "step-00000012")
    assert (saved["skipped"], saved["skipped_in_a_row"], saved["updates"]) == (3, 0, 9)
    assert state(tmp_path / "out" / "step-00000006")["skipped_in_a_row"] == 2


@pytest.mark.fault(
    "they stay so for `--max-skipped-steps` steps", "the run ends with status 1; the last good state is saved"
)
def test_too_many_in_a_row_end_the_run_with_a_reason_and_the_last_good_state(run, tmp_path, monkeypatch):
    poison(monkeypatch, {2, *range(5, 100)})
    result = run(max_skipped_steps=3, eval_interval=5, always_save_checkpoint=True, explain_skips=0)
    assert result.status == 1
    assert re.fullmatch(
        r"train\.py: error: step 7: the loss .* not finite 3 steps in a row .*--learning-rate.*\n", result.err
    )
    out_dir = tmp_path / "out"
    saved = state(out_dir / "step-00000008")
    assert (saved["skipped"], saved["skipped_in_a_row"], saved["updates"]) == (4, 0, 4)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (out_dir / "step-00000008" / name).read_bytes() == (out_dir / "step-00000005" / name).read_bytes()
    assert (out_dir / "loss.png").exists()
    monkeypatch.undo()
    assert run(init_from="resume").status == 0


def test_a_run_that_really_explodes_stops_by_itself(run, tmp_path):
    result = run(
        learning_rate=1e30, warmup_iters=0, grad_clip=0.0, max_iters=100, eval_interval=100, max_skipped_steps=4
    )
    assert result.status == 1
    assert "not finite 4 steps in a row" in result.err
    tensors = checkpoint.load(tmp_path / "out").tensors("model")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


# ------------------------------------------------------------------------------------------------------- being stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=["SIGTERM", "SIGHUP", "Ctrl-C"])
@pytest.mark.fault("SIGTERM, Ctrl-C, or a connection that drops (SIGHUP)", "the run is saved and ends with status 0")
def test_a_signal_saves_and_ends_the_run_well(tmp_path, text, number):
    out_dir = tmp_path / "out"
    words = arguments(
        **TINY | text | {"out_dir": out_dir, "max_iters": 10**6, "eval_interval": 10**6, "log_interval": 1000}
    )
    process = start("train.py", words)
    wait_until(lambda: len(records(out_dir, "step")) > 3, process)
    process.send_signal(number)
    result = finish(process)
    assert (result.status, result.err) == (0, "")
    done = len(records(out_dir, "step"))
    assert f"stopping after step {done - 1}, as asked" in result.out
    assert checkpoint.load(out_dir).step == done
    assert (out_dir / "loss.png").exists()


@pytest.fixture
def ctrl_c_raises():
    """As Python has it at its start, unless what started this process ignores Ctrl-C, as a shell does for its background jobs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_does_what_it_always_did(ctrl_c_raises):
    with train.StopSignal() as stop:
        stop.begun = True
        assert not stop.asked
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def end_while_preparing(tmp_path, number, **options) -> Result:
    process = start(
        "train.py", arguments(**TINY | {"data_dir": tmp_path / "data", "out_dir": tmp_path / "out"} | options)
    )
    wait_until(lambda: list(tmp_path.glob("data/.tmp-*/tokenizer.model")), process)
    run_testing.os.killpg(process.pid, number)  # as a terminal does: the encoding processes get it as well
    return finish(process)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_while_the_data_is_prepared_leaves_no_trace(tmp_path, number, status):
    write_text(tmp_path / "text.txt", documents=25_000)  # encoded in this process, for about a second
    result = end_while_preparing(tmp_path, number, data=tmp_path / "text.txt")
    assert result == Result(status, "", "")
    assert not list((tmp_path / "data").iterdir())


def test_ctrl_c_while_processes_encode_leaves_what_the_next_try_goes_on_from(tmp_path):
    write_text(tmp_path / "text.txt", documents=60_000)
    result = end_while_preparing(tmp_path, signal.SIGINT, data=tmp_path / "text.txt")
    assert result == Result(130, "", "")
    (unfinished,) = (tmp_path / "data").iterdir()
    assert {"tokenizer.model", "progress.json"} <= {path.name for path in unfinished.iterdir()}


@pytest.mark.fault("the reader of stdout goes away (`| head`)", "the run goes on; its files have everything")
def test_a_reader_that_goes_away_does_not_stop_the_run(tmp_path, text):
    process = start("train.py", arguments(**TINY | text | {"out_dir": tmp_path / "out"}))
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert process.stderr.read() == ""
    process.stderr.close()
    assert len(records(tmp_path / "out", "step")) == 12
    assert pointers(tmp_path / "out")[1] == "step-00000012"


def test_help_into_a_reader_that_goes_away_is_quiet():
    process = start("train.py", ["--help"])
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""
    process.stderr.close()
