"""train.py from the outside: what a run leaves behind, how it stops, and what it says of bad input."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from tests import run_testing
from tests.run_testing import ROOT, TINY, Result, arguments, call, finish, records, start, state, wait_until, write_text
from training import checkpoint, checkpoint_folder, evaluation, readback, step
from training.config import TrainConfig, from_toml, parse
from training.schedule import learning_rate
from training.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> dict[str, Path]:
    """Options that name a text and a folder where it is prepared, once for all runs."""
    folder = tmp_path_factory.mktemp("text")
    return {"data": write_text(folder / "text.txt"), "data_dir": folder / "data"}


@pytest.fixture
def run(tmp_path, text):
    """A run in this process; into tmp_path / "out" unless told otherwise."""

    def run(**options) -> Result:
        return call(train, arguments(**TINY | text | {"out_dir": tmp_path / "out"} | options))

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory, text) -> tuple[Path, Result]:
    """A run that went to its end, and its folder."""
    out_dir = tmp_path_factory.mktemp("finished") / "out"
    return out_dir, call(train, arguments(**TINY | text | {"out_dir": out_dir, "tensorboard": True}))


def pointers(out_dir: Path) -> tuple[str, str]:
    return tuple((out_dir / name).read_text().strip() for name in ("best", "last"))


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
    assert first.startswith(f"smoke: {parameters:,} parameters on cpu, float32, kernels none; ")
    assert "64 a step" in first


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
    tokenizer = Tokenizer((out_dir / "step-00000012" / "tokenizer.model").read_bytes())
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


def test_nothing_half_made_is_left(finished, text):
    assert not [path for folder in (finished[0], text["data_dir"]) for path in folder.rglob(".tmp-*")]
    assert len(list(text["data_dir"].iterdir())) == 1


@pytest.mark.parametrize("always", [False, True])
def test_best_and_last_are_the_best_and_the_last(run, tmp_path, monkeypatch, always):
    losses = iter([9.0, 5.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr(evaluation.Evaluation, "losses", lambda self: (1.0, next(losses), 1.0))
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


def test_kernels_run_in_the_interpreter_where_it_is_asked_for(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "kernels none" in run(max_iters=2).out
    result = run(max_iters=2, kernels="swiglu@0", out_dir=tmp_path / "kernels")
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
            results[name] = run(eval_interval=5, max_skipped_steps=3, out_dir=tmp_path / name)
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


def test_a_trace_of_steps_3_to_5_is_written(run, tmp_path):
    assert run(max_iters=7, profile=True).status == 0
    trace = json.loads((tmp_path / "out" / "profile.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert {name for name in names if name.startswith("ProfilerStep#")} == {f"ProfilerStep#{i}" for i in (3, 4, 5)}


def test_an_evaluation_alone_changes_nothing(run, tmp_path):
    run()
    out_dir = tmp_path / "out"
    before = {path: path.read_bytes() for path in out_dir.rglob("*") if path.is_file() and path.name != "metrics.jsonl"}
    steps = records(out_dir, "step")
    result = run(init_from="resume", eval_only=True, eval_iters=1)
    assert (result.status, result.err) == (0, "")
    assert re.search(r"step 12: train loss \d", result.out)
    assert {path: path.read_bytes() for path in before} == before
    assert records(out_dir, "step") == steps


def test_an_evaluation_alone_of_a_fresh_model_saves_nothing(run, tmp_path):
    result = run(eval_only=True)
    assert result.status == 0
    assert "step 0: train loss" in result.out
    assert not list((tmp_path / "out").glob("step-*"))


# ------------------------------------------------------------------------------------------------------ nothing is lost


def test_a_run_that_starts_in_a_used_folder_sets_the_earlier_one_aside(run, tmp_path):
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    (out_dir / "notes.md").write_text("mine")
    run(max_iters=1)
    first = {path.name: path.read_bytes() for path in (out_dir / "step-00000001").iterdir()}
    metrics = (out_dir / "metrics.jsonl").read_bytes()
    result = run(max_iters=2, tensorboard=True)
    assert f"{out_dir} held an earlier run, which is now in {out_dir / 'earlier-1'}" in result.out
    earlier = out_dir / "earlier-1"
    assert {path.name: path.read_bytes() for path in (earlier / "step-00000001").iterdir()} == first
    assert (earlier / "metrics.jsonl").read_bytes() == metrics
    assert pointers(earlier) == ("step-00000001", "step-00000001")
    assert (out_dir / "notes.md").read_text() == "mine"
    run(max_iters=3)
    assert pointers(out_dir / "earlier-2") == ("step-00000002", "step-00000002")
    assert (out_dir / "earlier-2" / "tensorboard").is_dir()
    assert pointers(out_dir) == ("step-00000003", "step-00000003")
    assert {path.name for path in out_dir.iterdir()} == {
        *("earlier-1", "earlier-2", "notes.md", "step-00000003", "best", "last"),
        *("config.toml", "metrics.jsonl", "loss.png"),
    }


def test_a_run_that_is_refused_leaves_the_earlier_one_where_it_is(run, tmp_path):
    run(max_iters=1)
    before = sorted((tmp_path / "out").iterdir())
    assert run(data="nowhere").status == 2
    assert run(batch_size=10**6).status == 2
    assert sorted((tmp_path / "out").iterdir()) == before


def test_a_full_disk_while_saving_leaves_the_earlier_checkpoint(run, tmp_path, monkeypatch):
    write, saves = checkpoint._write_tensors, []

    def write_until_full(folder, group, *rest):
        saves.append(group)
        if len(saves) > 4:  # the first save has three groups
            raise OSError(28, "No space left on device")
        write(folder, group, *rest)

    monkeypatch.setattr(checkpoint, "_write_tensors", write_until_full)
    result = run(always_save_checkpoint=True)
    assert result.status == 2
    assert re.fullmatch(
        r"train\.py: error: --out-dir .*step 12 could not be saved: No space left on device.*\n", result.err
    )
    assert checkpoint.load(tmp_path / "out").step == 6
    assert not list((tmp_path / "out").glob(".tmp-*"))


def test_a_disk_too_full_for_the_configuration_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(ValueError, match=r"--out-dir .* cannot be written: No space left on device"):
        checkpoint_folder.open_run(tmp_path, "", resume=False)


# ----------------------------------------------------------------------------------------------------- steps gone wrong


def poison(monkeypatch, steps):
    """Makes the loss of some steps of every run infinite."""
    count, loss_sum = iter(range(10**6)), step.Trainer._loss_sum

    def poisoned(self, *batch):
        loss = loss_sum(self, *batch)
        return loss * float("inf") if torch.is_grad_enabled() and next(count) in steps else loss

    monkeypatch.setattr(step.Trainer, "_loss_sum", poisoned)


def test_a_step_that_is_not_finite_is_skipped_counted_and_shown(run, tmp_path, monkeypatch):
    poison(monkeypatch, {4, 5, 8})
    result = run()
    assert result.status == 0
    assert [line["step"] for line in records(tmp_path / "out", "step") if line["skipped"]] == [4, 5, 8]
    assert re.findall(r"^(\d+) \| loss inf .*skipped: not finite$", result.out, re.M) == ["4", "5", "8"]
    saved = state(tmp_path / "out" / "step-00000012")
    assert (saved["skipped"], saved["skipped_in_a_row"], saved["updates"]) == (3, 0, 9)
    assert state(tmp_path / "out" / "step-00000006")["skipped_in_a_row"] == 2


def test_too_many_in_a_row_end_the_run_with_a_reason_and_the_last_good_state(run, tmp_path, monkeypatch):
    poison(monkeypatch, {2, *range(5, 100)})
    result = run(max_skipped_steps=3, eval_interval=5, always_save_checkpoint=True)
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
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


def test_a_second_signal_does_what_it_always_did():
    with train.StopSignal() as stop:
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


def test_ctrl_c_while_processes_encode_leaves_no_trace(tmp_path):
    write_text(tmp_path / "text.txt", documents=60_000)
    result = end_while_preparing(tmp_path, signal.SIGINT, data=tmp_path / "text.txt")
    assert result == Result(130, "", "")
    assert not list((tmp_path / "data").iterdir())


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


# ------------------------------------------------------------------------------------------------------------ bad input

BEFORE_TORCH = [
    ("--help", 0, ""),
    ("--bogus", 2, "unknown option '--bogus'"),
    ("--preset huge", 2, "--preset is 'huge'; allowed: reference"),
    ("--dim x", 2, "--dim"),
    ("--dim 100", 2, "--dim 100 is not divisible by --n-heads 8"),
    ("--n-kv-heads 3", 2, "--n-heads 8 is not divisible by --n-kv-heads 3"),
    ("--dim 120", 2, "odd head dim, 15"),
    ("--vocab-size 255", 2, "--vocab-size is 255; it must be from 256"),
    ("--kernels foo", 2, "unknown switch 'foo'; allowed: all, none"),
    ("--fused --device cpu", 2, "Leave it off for plain PyTorch (--kernels none), or set TRITON_INTERPRET=1"),
    ("--config nowhere.toml", 2, "nowhere.toml could not be read: No such file"),
    ("--init-from resume --out-dir nowhere", 2, "there is no checkpoint 'last' in nowhere, which holds no checkpoint"),
    (f"--out-dir {__file__}/out", 2, "cannot be written: Not a directory"),
]


@pytest.fixture(scope="session")
def before_torch(tmp_path_factory) -> list[dict]:
    """How train.py ends for each of these command lines, in one process, and which heavy modules it imported for them."""
    code = """
import contextlib, io, json, sys
import train
for words in json.load(sys.stdin):
    sys.argv, out, err = ["train.py", *words], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = train.main()
        except SystemExit as exit:
            status = exit.code
    heavy = sorted({"torch", "triton", "numpy", "sentencepiece", "matplotlib"} & set(sys.modules))
    print(json.dumps({"status": status, "out": out.getvalue(), "err": err.getvalue(), "heavy": heavy}))
"""
    environment = {name: value for name, value in run_testing.os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([words.split() for words, *_ in BEFORE_TORCH]),
        capture_output=True,
        text=True,
        check=True,
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path_factory.mktemp("elsewhere"),
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("index", range(len(BEFORE_TORCH)), ids=[words for words, *_ in BEFORE_TORCH])
def test_help_and_mistakes_in_the_options_are_answered_before_anything_heavy_is_imported(before_torch, index):
    (_, status, message), found = BEFORE_TORCH[index], before_torch[index]
    assert found["status"] == status
    assert found["heavy"] == []
    assert message in found["err"]
    if status == 0:
        assert "--max-iters" in found["out"]
    elif "--dim x" not in BEFORE_TORCH[index]:  # tyro's own box
        assert re.fullmatch(r"train\.py: error: [^\n]*\n", found["err"])


def refused(result: Result, message: str) -> None:
    assert result.status == 2
    assert re.fullmatch(r"train\.py: error: [^\n]*\n", result.err), result.err
    assert re.search(message, result.err)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"--data .*text\.txt: no such file or folder"),
        (b"", r"--data .*text\.txt: empty"),
        (b" \n\n ", r"--data .*text\.txt: empty"),
        (b"one\0two\n\nthree", r"text\.txt is binary: it holds a NUL at byte 3"),
        (b"one\n\n\xff\xfe\xfd", r"text\.txt is binary or of another encoding: 0xff"),
        (b"one document", "it holds one document, and training and validation need two"),
        (b"one two three\n\nfour five six", "--vocab-size is 300, allowed for this text: up to"),
    ],
)
def test_bad_text_is_refused(run, tmp_path, content, message):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    refused(run(data=tmp_path / "text.txt", data_dir=tmp_path / "data"), message)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1000}, r"the train split of text\.txt is too short: .* a step takes 1000 \(--batch-size"),
        ({"batch_size": 100}, r"the val split of text\.txt is too short"),
        ({"vocab_size": 10**5}, "--vocab-size is 100000, allowed for this text: up to"),
        ({"tokenizer": "nowhere.model"}, r"--tokenizer nowhere\.model: No such file"),
        ({"tokenizer": __file__}, r"--tokenizer .*test_train\.py is not a sentencepiece model"),
        ({"data_dir": f"{__file__}/data"}, r"--data .* can't be prepared in .*: .*Not a directory"),
    ],
)
def test_data_that_does_not_fit_the_options_is_refused(run, options, message):
    refused(run(**options), message)


@pytest.mark.parametrize("size", [400, 299])
def test_a_vocabulary_that_is_not_the_tokenizers_is_refused(run, finished, size):
    tokenizer = finished[0] / "step-00000012" / "tokenizer.model"
    refused(run(tokenizer=tokenizer, vocab_size=size), rf"--vocab-size is {size}.*300")


@pytest.fixture
def shard(run, tmp_path, text):
    """A shard of a prepared text of its own, which the test may damage, and the run that reads it."""
    options = {"data_dir": tmp_path / "data"}
    assert run(**options, max_iters=1, eval_iters=1).status == 0
    return next((tmp_path / "data").glob("*/train-00000.bin")), lambda: run(**options)


def test_a_truncated_shard_is_refused(shard):
    path, run = shard
    path.write_bytes(path.read_bytes()[:-2])
    refused(run(), r"train-00000\.bin is truncated or damaged: .*delete .* and they are made anew")


def test_a_shard_of_another_tokenizer_is_refused(shard):
    path, run = shard
    raw = bytearray(path.read_bytes())
    raw[8 + 4 + 4 + 5 * 8] ^= 1  # the first byte of the tokenizer's hash
    path.write_bytes(raw)
    refused(run(), r"train-00000\.bin is of another tokenizer")


def test_a_token_id_past_the_vocabulary_is_refused(shard):
    path, run = shard
    raw = bytearray(path.read_bytes())
    raw[88:] = b"\x2c\x01" * ((len(raw) - 88) // 2)  # 300, the first one that is none
    path.write_bytes(raw)
    refused(run(), "token id 300, allowed: below the vocabulary size 300")


def test_a_dtype_that_the_device_does_not_have_is_refused(run, monkeypatch):
    attend = torch.nn.functional.scaled_dot_product_attention

    def without_float16(q, *rest, **options):
        if q.dtype == torch.float16:
            raise RuntimeError('"attention" not implemented for Half\nand a second line')
        return attend(q, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", without_float16)
    refused(
        run(dtype="float16"),
        "--dtype is float16, which cpu does not have .*not implemented.*try one of float32, bfloat16",
    )
    assert run(dtype="float32", max_iters=1).status == 0


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_refused(run, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(run(device=device), f"--device is {device}, and PyTorch .* finds no GPU; allowed here: auto, cpu")


def test_kernels_where_torch_finds_no_gpu_name_the_two_ways_on(monkeypatch):
    """A driver without a GPU that torch can use: seen only after torch is imported."""
    from training.device import resolve_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"no GPU was found\. Leave it off .*TRITON_INTERPRET=1"):
        resolve_device(TrainConfig(fused=True))
    monkeypatch.setenv("TRITON_INTERPRET", "yes")
    assert resolve_device(TrainConfig(fused=True)) == torch.device("cpu")
    monkeypatch.delenv("TRITON_INTERPRET")
    assert resolve_device(TrainConfig(fused=True, kernels="none")) == torch.device("cpu")
