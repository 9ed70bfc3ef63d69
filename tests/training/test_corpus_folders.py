"""A folder is read as what its files hold: shards of one kind, links followed, what runs write left out."""

import gzip
import json
import os

import pytest

from tests.support.corpus_testing import JSONL, TEXTS, documents, parquet, write
from training.data.corpus import open_corpus
from training.errors import UserError


@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".ndjson", ".json", ".json.gz"])
def test_a_folder_of_shards_is_its_records(tmp_path, suffix):
    for number, half in enumerate((TEXTS[:11], TEXTS[11:])):
        rows = [{"story": text} for text in half]
        content = json.dumps(rows) if suffix in (".json", ".json.gz") else "\n".join(map(json.dumps, rows))
        raw = gzip.compress(content.encode()) if suffix.endswith(".gz") else content.encode()
        write(tmp_path / "d" / f"data{number:02}{suffix}", raw)
    assert documents(tmp_path / "d") == TEXTS


def test_a_folder_of_parquet_files_is_its_rows(tmp_path):
    parquet(tmp_path / "d" / "1.parquet", text=TEXTS[:11])
    parquet(tmp_path / "d" / "2.PARQUET", text=TEXTS[11:])
    assert documents(tmp_path / "d") == TEXTS


def test_a_mixed_folder_is_refused_with_the_way_on(tmp_path):
    parquet(tmp_path / "d" / "1.parquet", text=TEXTS)
    write(tmp_path / "d" / "README.md", "about")
    write(tmp_path / "d" / "more.jsonl", JSONL)
    with pytest.raises(UserError, match=r"1 of JSON records \(such as more\.jsonl\).*--data-files '\*\.") as error:
        open_corpus(str(tmp_path / "d"))
    assert "1 of parquet (such as 1.parquet)" in str(error.value)
    assert "1 of text (such as README.md)" in str(error.value)
    assert documents(tmp_path / "d", data_files="*.parquet") == documents(tmp_path / "d", data_files="*.jsonl") == TEXTS
    with pytest.raises(UserError, match=r"no files that match --data-files \*\.csv"):
        open_corpus(str(tmp_path / "d"), data_files="*.csv")
    with pytest.raises(UserError, match=r"--data-files \*\.csv: --data .* is a file"):
        open_corpus(str(tmp_path / "d" / "more.jsonl"), data_files="*.csv")


def test_json_without_texts_is_text_among_others(tmp_path):
    write(tmp_path / "d" / "package.json", '{\n "name": "x"\n}\n')
    write(tmp_path / "d" / "main.py", "print()")
    assert documents(tmp_path / "d") == ["print()", '{\n "name": "x"\n}\n']


@pytest.mark.parametrize("content", ['{"data": [{"text": "%s"}]}', '[{"body": "%s"}]', '{\n"body": "%s"\n}', '["%s"]'])
def test_a_folder_of_json_without_texts_is_refused_unless_it_is_to_be_text(tmp_path, content):
    for name in "ab":
        write(tmp_path / "d" / f"{name}.json", content % name)
    with pytest.raises(UserError, match=r"its files are JSON, .* no field text or story, it has .*--split-text whole"):
        open_corpus(str(tmp_path / "d"))
    assert documents(tmp_path / "d", split_text="whole") == [content % "a", content % "b"]


def test_what_runs_and_preparations_write_into_a_folder_is_no_text(tmp_path):
    for name in ("a.txt", "b/c.txt"):
        write(tmp_path / "d" / name, name)
    alone = open_corpus(str(tmp_path / "d")).fingerprint
    for name in ("out/config.toml", "out/metrics.jsonl", "out/README.md", "out/step-00000001/config.toml"):
        write(tmp_path / "d" / name, "x")
    for name in ("data/d-300-0/manifest.json", "data/d-300-0/train-00000.bin", "data/d-300-0/tokenizer.model"):
        write(tmp_path / "d" / name, b"\0")
    assert documents(tmp_path / "d") == ["a.txt", "b/c.txt"]
    assert open_corpus(str(tmp_path / "d")).fingerprint == alone
    for name, what in (("out", "the folder of a run"), ("data/d-300-0", "a prepared text")):
        with pytest.raises(UserError, match=f"{name} is {what}; name the text itself"):
            open_corpus(str(tmp_path / "d" / name))


def test_what_can_be_read_only_once_is_refused():
    """Such as the pipe that --data <(zcat a.gz) names, which would be waited for."""
    with pytest.raises(UserError, match=f"{os.devnull} is a pipe or a device, which can be read only once"):
        open_corpus(os.devnull)


def test_linked_folders_are_read_once_each_and_dangling_links_named(tmp_path):
    write(tmp_path / "elsewhere" / "b.txt", "two")
    write(tmp_path / "d" / "a.txt", "one")
    (tmp_path / "d" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "d")
    assert documents(tmp_path / "d") == ["one", "two"]
    (tmp_path / "d" / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"d/gone is a link to .*nowhere, which is not there"):
        open_corpus(str(tmp_path / "d"))
    assert documents(tmp_path / "d", skip_bad=True) == ["one", "two"]


@pytest.mark.fault(
    "a folder of text that may not be read", "it is named; `--skip-bad-files` leaves it out, and says so"
)
def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    write(tmp_path / "d" / "a.txt", "one")
    write(tmp_path / "d" / "c.txt", "three")
    (tmp_path / "d" / "b").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"/d/b can't be read: Permission denied"):
        open_corpus(str(tmp_path / "d"))
    opened = open_corpus(str(tmp_path / "d"), skip_bad=True)
    assert [line.partition("/d/")[2] for line in opened.bad] == ["b can't be read: Permission denied"]


def test_of_a_mixed_folder_the_files_of_the_most_bytes_are_proposed(tmp_path):
    for name in ("README.md", "dataset_info.json"):
        write(tmp_path / "d" / name, "{}")
    write(tmp_path / "d" / "a.jsonl", JSONL)
    with pytest.raises(UserError, match=r"for instance --data-files '\*\.jsonl'"):
        open_corpus(str(tmp_path / "d"))
