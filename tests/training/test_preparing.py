"""How text is prepared: what survives a kill, what it takes of memory, what is said of it, and what tokens a writing gets."""

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.support.run_testing import ROOT, TINY, arguments, finish, start, wait_until, write_text
from training.data import build, encode
from training.data import prepare as preparing
from training.data.corpus import Part, parts, source
from training.data.description import describe
from training.data.prepare import prepare
from training.data.tokenizer import train_tokenizer
from training.data.workers import WorkerDied
from training.errors import UserError

STORIES = [f"Once {name} went to the {place}, {i} times." for i in range(60) for name, place in
           [("a bear", "sea"), ("an owl", "wood"), ("Tim", "market")]]  # fmt: skip


def prepare_here(data, folder, **options):
    return prepare(str(data), **{"vocab_size": 320, "data_dir": folder, "val_fraction": 0.2} | options)


def contents(folder):
    (prepared,) = (path for path in folder.iterdir() if not path.name.startswith("."))
    return {path.name: path.read_bytes() for path in prepared.iterdir()}


# A kill


def read_or_die(flag: Path, texts: list[str]):
    """What a part reads; one of the encoding processes is killed while the flag is there."""
    if flag.exists() and multiprocessing.parent_process():
        os.kill(os.getpid(), signal.SIGKILL)
    yield from texts


@pytest.mark.fault(
    "a process that encodes text is killed (the system does that when memory runs out)",
    "the run ends at once, says so and what to lower; what was encoded is kept for the next try",
)
def test_a_killed_worker_ends_the_preparation_and_the_next_one_goes_on(tmp_path, monkeypatch):
    flag = tmp_path / "kill"
    groups = [STORIES[i : i + 9] for i in range(0, len(STORIES), 9)]
    made = [Part(((tmp_path / "x", partial(read_or_die, tmp_path / "no", texts)),), 500, 1 << 62) for texts in groups]
    made[15] = Part(((tmp_path / "x", partial(read_or_die, flag, groups[15])),), 500, 1 << 62)
    corpus = source.Corpus("x", "f" * 64, tuple(made), "a story a document")
    monkeypatch.setattr(preparing, "open_corpus", lambda *_, **__: corpus)
    undisturbed = prepare_here("x", tmp_path / "undisturbed", workers=1)
    monkeypatch.setattr(encode, "POOL_BYTES", 0)
    encoded = []
    append = build.ShardWriter.append
    monkeypatch.setattr(build.ShardWriter, "append", lambda self, new: (append(self, new), encoded.append(new)))
    monkeypatch.setattr(build, "train_tokenizer", lambda *arguments: trained.append(1) or train_tokenizer(*arguments))
    trained = []
    flag.touch()
    with pytest.raises(
        WorkerDied, match=r"process \d+ was killed by SIGKILL.*/x\. What.*lower --data-workers \(now 2\)"
    ):
        prepare_here("x", tmp_path / "data", workers=2)
    (first,) = (tmp_path / "data").iterdir()
    assert first.name.startswith(".tmp-")
    done = json.loads((first / "progress.json").read_text())["done"]
    assert 10 < done <= 15
    flag.unlink()
    encoded.clear()
    again = prepare_here("x", tmp_path / "data", workers=2)
    assert trained == [1]
    assert again.train.n_documents == undisturbed.train.n_documents
    assert sum(new.n_documents for new in encoded) == len(STORIES) - 9 * done
    assert contents(tmp_path / "data") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("damage", ["short", "journal", "other"])
def test_what_does_not_fit_an_unfinished_preparation_is_made_anew(tmp_path, monkeypatch, damage):
    path = write_text(tmp_path / "text.txt")
    monkeypatch.setattr(parts, "PART_BYTES", 500)
    prepare_here(path, tmp_path / "undisturbed", workers=1)
    monkeypatch.setattr(encode, "POOL_BYTES", 0)
    with monkeypatch.context() as patch:
        patch.setattr(build.ShardWriter, "close", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare_here(path, tmp_path / "data", workers=1)
    (folder,) = (tmp_path / "data").iterdir()
    journal = folder / "progress.json"
    if damage == "short":
        writer_state = {"names": ["train-00000.bin"], "counts": [10**6, 1, 1], "n_byte_tokens": 0}
        state = {"key": json.loads(journal.read_text())["key"] if journal.exists() else [], "done": 3}
        journal.write_text(json.dumps(state | {"writers": {"train": writer_state, "val": writer_state}}))
    elif damage == "journal":
        journal.write_text("{")
    else:
        journal.write_text(json.dumps({"key": ["another"], "done": 5, "writers": {}}))
    prepare_here(path, tmp_path / "data", workers=1)
    assert contents(tmp_path / "data") == contents(tmp_path / "undisturbed")


@pytest.mark.fault("kill -9, SIGTERM or Ctrl-C while a large text is prepared", "the next run goes on where it was")
@pytest.mark.slow
def test_a_preparation_that_was_killed_goes_on(tmp_path):
    write_text(tmp_path / "text.txt", documents=40_000)
    options = TINY | {"data": tmp_path / "text.txt", "max_iters": 1, "out_dir": tmp_path / "out"}
    # In a process that writes down what it has done after each part.
    code = "import train; from training.data import build; build._JOURNAL_SECONDS = 0\nif __name__ == '__main__': train.main()"
    process = start("train.py", arguments(**options, data_dir=tmp_path / "data"), code)
    wait_until(lambda: list(tmp_path.glob("data/.tmp-*/progress.json")), process)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    (unfinished,) = tmp_path.glob("data/.tmp-*")
    assert 0 < json.loads((unfinished / "progress.json").read_text())["done"] < 5
    for folder in ("data", "whole"):
        prepare_here(tmp_path / "text.txt", tmp_path / folder, vocab_size=300, val_fraction=0.05, workers=1)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


# Memory

MEASURE = """
import resource, sys
from pathlib import Path
from training.data.corpus import Report, open_corpus
from training.data.encode import encode_part
from training.data.tokenizer import load_tokenizer
import pyarrow.parquet
tokenizer = load_tokenizer(sys.argv[1])
tokenizer.encode("warm " * 9999), tokenizer.is_byte
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for part in open_corpus(sys.argv[2], val_fraction=0.5).parts:
    for piece in part.pieces(Report()):
        encode_part(piece, tokenizer)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize(("kind", "most"), [("one document", 4), ("one row group", 1)])
def test_memory_is_bounded_by_the_text_of_a_document_and_not_by_that_of_a_file(tmp_path, kind, most):
    """Most: MiB for each of the 16 MiB of text. Encoded at once, a document takes 47."""
    draw = random.Random(0)
    sentences = ["".join(draw.choices("abcdefgh ", k=60)) for _ in range(500)]
    train_tokenizer(sentences * 20, 300, tmp_path / "t.model")
    text = (" ".join(sentences) * 700)[: 16 << 20]
    if kind == "one document":
        path = tmp_path / "a.txt"
        path.write_text(f"{text}\n\nshort")
    else:
        import pyarrow.parquet

        path = tmp_path / "a.parquet"
        rows = [text[i : i + 2000] for i in range(0, len(text), 2000)]
        table = pyarrow.table({"text": [*rows, "other"]})
        pyarrow.parquet.write_table(table, path, use_dictionary=False, row_group_size=10**9)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "t.model"), str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(run.stdout) < 16 * most + 16, run.stdout


def test_processes_are_no_more_than_fit_half_of_the_memory(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    for gigabytes, workers in ((64, 16), (4, 4), (1, 1), (0.1, 1)):
        monkeypatch.setattr(encode, "memory_bytes", lambda gigabytes=gigabytes: int(gigabytes * 2**30))
        assert encode.default_workers() == workers
    monkeypatch.undo()
    assert encode.memory_bytes() > 1 << 28


# What is said of the data


def test_the_first_lines_say_how_much_text_there_is_how_it_was_cut_and_how_it_begins(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(STORIES))
    for _ in range(2):  # prepared now, and before
        dataset = prepare_here(path, tmp_path / "data")
        first, last = describe(dataset)
        assert re.fullmatch(
            rf"data stories\.txt, cut at '<\|endoftext\|>': {dataset.train.n_documents} documents of [\d,]+ tokens to train on, "
            rf"{dataset.val.n_documents} of [\d,]+ to validate on",
            first,
        )
        assert last.startswith("the first document begins 'Once a ")
        assert last.rstrip("'").partition("begins '")[2] in STORIES
    dataset.manifest.pop("cut")  # as an earlier version has prepared it
    assert describe(dataset)[0].startswith("data stories.txt: ")


def test_what_was_left_out_is_said(tmp_path):
    rows = [json.dumps({"text": text}) for text in STORIES] + ['{"text": null}'] * 3 + ['{"text": 1}'] * 30
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match=r"a\.jsonl, line 184: field 'text' is a int"):
        prepare_here(tmp_path / "a.jsonl", tmp_path / "data")
    lines = describe(prepare_here(tmp_path / "a.jsonl", tmp_path / "data", skip_bad=True))
    assert lines[1] == "left out: 3 records without text"
    assert lines[2].endswith("a.jsonl, line 184: field 'text' is a int, wanted a string")
    assert lines[7] == "left out: 25 more that can't be read"


# Writing without an alphabet


def chinese(n_documents=300):
    draw = random.Random(0)
    characters = [chr(0x4E00 + i) for i in range(3000)]
    weights = [1 / (i + 3) for i in range(3000)]
    return ["".join(draw.choices(characters, weights, k=120)) + f"。{i}" for i in range(n_documents)]


def test_chinese_text_fits_a_small_vocabulary_and_bytes_carry_the_rest(tmp_path):
    texts = chinese()
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    dataset = prepare_here(tmp_path / "a.txt", tmp_path / "data", vocab_size=1024)
    tokenizer = dataset.tokenizer
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts)
    single = [token for token in range(1024) if len(tokenizer.decode([tokenizer.encode("1")[0], token]).strip()) == 1]
    assert 300 < len(single) < 800  # about half of the vocabulary; the other half are pairs and longer
    n_bytes = sum(len(text.encode()) for text in texts)
    n_byte_tokens = sum(tokenizer.is_byte_token(token) for text in texts for token in tokenizer.encode(text))
    (line,) = (line for line in describe(dataset) if "tokens of one byte" in line)
    assert line.startswith(f"{n_byte_tokens / n_bytes:.1%} of the text's bytes are tokens of one byte")


def test_coverage_can_be_chosen(tmp_path):
    texts = chinese()
    shares = []
    for coverage in (0.2, 0.6):
        tokenizer = train_tokenizer(texts, 600, tmp_path / "t.model", coverage)
        ids = [token for text in texts for token in tokenizer.encode(text)]
        shares.append(sum(map(tokenizer.is_byte_token, ids)) / 3 / sum(map(len, texts)))
    assert shares == pytest.approx([0.8, 0.4], abs=0.03)
    with pytest.raises(
        UserError, match=r"--vocab-size is 1024, .*: \d+ or more, or a lower --character-coverage than 0\.99"
    ):
        train_tokenizer(texts, 1024, tmp_path / "t.model", 0.99)
    with pytest.raises(UserError, match=r"--vocab-size is 260, allowed for this text: \d+ or more"):
        train_tokenizer(texts, 260, tmp_path / "t.model")


def test_another_coverage_is_another_preparation(tmp_path):
    path = write_text(tmp_path / "text.txt")
    trained = [
        prepare_here(path, tmp_path / "data", vocab_size=275, character_coverage=share).tokenizer
        for share in (0.0, 0.5)
    ]
    assert trained[0].hash != trained[1].hash
    assert len(list((tmp_path / "data").iterdir())) == 2
