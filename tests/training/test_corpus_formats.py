"""Text is read as what it holds, whatever its file is called: records, arrays, compressed files, separators."""

import bz2
import gzip
import json
import lzma
import os
import re
import sys

import pyarrow
import pyarrow.parquet
import pytest

from tests.support.corpus_testing import JSONL, TEXTS, documents, parquet, write
from training.data.corpus import Report, open_corpus, parts, records
from training.errors import UserError

COMPRESSORS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


# What a file holds


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.JSONL", "a.json", "a.txt", "a"])
def test_records_are_read_whatever_the_file_is_called(tmp_path, name):
    assert documents(write(tmp_path / name, JSONL)) == TEXTS


@pytest.mark.parametrize("name", ["a.json", "a.JSON", "a.txt"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_an_array_of_records_is_read_a_piece_at_a_time(tmp_path, monkeypatch, name, indent, size):
    monkeypatch.setattr(records, "_READ_CHARACTERS", size)
    monkeypatch.setattr(parts, "PART_BYTES", 100)
    path = write(tmp_path / name, json.dumps([{"text": text} for text in TEXTS], indent=indent))
    assert documents(path) == TEXTS


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt", "d/a.json"])
@pytest.mark.parametrize(("indent", "between"), [(1, "\n"), (None, ",\n"), (None, " "), (2, "")])
def test_records_may_take_lines_as_they_like(tmp_path, monkeypatch, name, indent, between):
    """As jq prints them, and others with commas."""
    monkeypatch.setattr(parts, "PART_BYTES", 100)
    path = write(tmp_path / name, between.join(json.dumps({"text": text, "n": 1}, indent=indent) for text in TEXTS))
    for size in (1, 50, 1 << 20):
        monkeypatch.setattr(records, "_READ_CHARACTERS", size)
        assert documents(path.parent if "/" in name else path) == TEXTS


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_of_records_may_be_called_lines(tmp_path, indent):
    assert (
        documents(write(tmp_path / "a.jsonl", json.dumps([{"text": text} for text in TEXTS], indent=indent))) == TEXTS
    )


def test_whoever_says_how_text_is_cut_gets_text(tmp_path):
    path = write(tmp_path / "a.txt", JSONL)
    assert documents(path, split_text="lines") == JSONL.splitlines()
    assert documents(write(tmp_path / "a.jsonl", JSONL), split_text="lines") == TEXTS  # its name says what it is


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("part_bytes", [1, 500, 1 << 20])
def test_compressed_files_are_read_as_plain_ones(tmp_path, monkeypatch, suffix, part_bytes):
    monkeypatch.setattr(parts, "PART_BYTES", part_bytes)
    text = "\n \n".join(text.replace("\n\n", "\n") for text in TEXTS)
    array = json.dumps([{"text": text} for text in TEXTS])
    for name, content in (("a.txt", text), ("a.jsonl", JSONL), ("a.json", array)):
        write(tmp_path / name, content)
        packed = write(tmp_path / f"{name.upper()}{suffix}", COMPRESSORS[suffix](content.encode()))
        assert documents(packed) == documents(tmp_path / name)
        assert documents(packed.rename(tmp_path / f"{name}-no-suffix")) == documents(tmp_path / name)


def test_zstd_is_read_where_the_library_is(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    compress = zstandard.ZstdCompressor().compress
    path = write(tmp_path / "a.jsonl.zst", compress(JSONL[:900].encode()) + compress(JSONL[900:].encode()))
    assert documents(path) == TEXTS


def test_zstd_that_is_cut_short_is_named(tmp_path, monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    monkeypatch.setattr(parts, "PART_BYTES", 1000)
    frames = [zstandard.ZstdCompressor().compress(os.urandom(200_000).hex().encode()) for _ in range(2)]
    path = write(tmp_path / "a.txt.zst", b"".join(frames))
    assert sum(map(len, documents(path, split_text="0"))) > 700_000
    for length in (5, len(frames[0]) - 1, len(frames[0]) + 1, len(path.read_bytes()) - 1):
        write(tmp_path / "b.txt.zst", path.read_bytes()[:length])
        with pytest.raises(UserError, match=r"b\.txt\.zst can't be read: Compressed file ended within a frame"):
            documents(tmp_path / "b.txt.zst", split_text="0")


def test_zstd_without_the_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = write(tmp_path / "a.txt.zst", b"\x28\xb5\x2f\xfd" + bytes(20))
    with pytest.raises(UserError, match=r"a\.txt\.zst is compressed with zstd, .*pip install triton-llama\[zstd\]"):
        open_corpus(str(path))


# Where documents end


def test_separators_of_others_are_found(tmp_path):
    stories = [text.replace("\n\n", "\n") for text in TEXTS]
    for number, between in enumerate(("\n<|endoftext|>\n", "<|endoftext|>", "\n\n<|end_of_text|>\n\n")):
        path = write(tmp_path / f"{number}.txt", between.join(TEXTS))
        assert documents(path) == TEXTS
        assert open_corpus(str(path)).cut == f"cut at {between.strip()!r}"
        assert documents(path, split_text="blank-lines") != TEXTS
        left = f"cut at blank lines, {between.strip()!r} left in it as --split-text blank-lines says"
        assert open_corpus(str(path), split_text="blank-lines").cut == left
    quoted = write(tmp_path / "code.py", 'A = "<|endoftext|>"\nB = "<|endoftext|>"\n\n' + "\n\n".join(stories))
    assert documents(quoted)[1:] == stories
    assert open_corpus(str(quoted)).cut == "cut at blank lines"


def test_a_folder_of_text_with_separators_is_cut_at_them(tmp_path):
    write(tmp_path / "d" / "1.txt", "\n<|endoftext|>\n".join(TEXTS[:9]))
    write(tmp_path / "d" / "2.txt", "\n<|endoftext|>\n".join(TEXTS[9:]))
    assert documents(tmp_path / "d") == TEXTS
    assert len(documents(tmp_path / "d", split_text="whole")) == 2


@pytest.mark.parametrize(("option", "between"), [("----", "----"), (r"\n\n\n", "\n\n\n"), ("§", "§"), (".*", ".*")])
def test_any_separator_can_be_given(tmp_path, monkeypatch, option, between):
    monkeypatch.setattr(parts, "PART_BYTES", 100)
    path = write(tmp_path / "a.txt", between.join(TEXTS))
    assert documents(path, split_text=option) == TEXTS


def test_lines_are_documents_where_asked(tmp_path):
    path = write(tmp_path / "a.txt", "one\r\ntwo\n\n three\nfour")
    assert documents(path, split_text="lines") == ["one", "two", " three", "four"]


@pytest.mark.parametrize("option", ["blank_lines", "line", "blanklines", "Whole", "", "x" * 65])
def test_a_separator_that_was_meant_to_be_something_else_is_refused(tmp_path, option):
    path = write(tmp_path / "a.txt", "a\n\nb")
    with pytest.raises(UserError, match=r"--split-text is .*, allowed: auto, blank-lines, whole, lines, or the char"):
        open_corpus(str(path), split_text=option)


# Records without text, and byte order marks

NO_TEXT = [{"text": "a"}, {"text": None}, {"n": 1}, {"text": "b", "n": 2}, {"text": ""}, {"text": " \n"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.jsonl.gz"])
def test_records_without_text_are_left_out_and_counted_in_every_format(tmp_path, name):
    lines = "\n".join(map(json.dumps, NO_TEXT))
    path = tmp_path / name
    if name == "a.parquet":
        parquet(path, text=[row.get("text") for row in NO_TEXT])
    else:
        raw = (json.dumps(NO_TEXT) if name == "a.json" else lines).encode()
        write(path, gzip.compress(raw) if name.endswith(".gz") else raw)
    report = Report()
    assert documents(path, report) == ["a", "b"]
    assert (report.without_text, report.bad) == (4, [])


ENDED = [{"text": f"{text}<|endoftext|>"} for text in TEXTS]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_records_are_cut_at_a_separator_that_they_hold(tmp_path, name):
    path = tmp_path / name
    if name == "a.parquet":
        parquet(path, text=[row["text"] for row in ENDED])
    else:
        write(path, json.dumps(ENDED) if name == "a.json" else "\n".join(map(json.dumps, ENDED)))
    report = Report()
    assert documents(path, report) == TEXTS
    assert report.without_text == 0
    assert open_corpus(str(path)).cut.endswith(", cut at '<|endoftext|>'")
    assert documents(path, split_text="The end") == [
        piece for row in ENDED for piece in row["text"].split("The end") if piece.strip()
    ]
    whole = open_corpus(str(path), split_text="whole")
    assert [text for part in whole.parts for _, text in part.documents()] == [row["text"] for row in ENDED]
    assert len({opened.fingerprint for opened in (whole, open_corpus(str(path)))}) == 2
    assert "--split-text lines cuts text, not records" in open_corpus(str(path), split_text="lines").cut


def test_what_goes_on_behind_an_array_is_refused(tmp_path, monkeypatch):
    content = json.dumps([{"text": "a"}, {"text": "b"}])
    for size in (3, 1 << 20):
        monkeypatch.setattr(records, "_READ_CHARACTERS", size)
        assert documents(write(tmp_path / "a.json", content + " \n" * 9)) == ["a", "b"]
        write(tmp_path / "two.json", f"{content}\n\n{content}")
        with pytest.raises(
            UserError, match=r"two\.json goes on behind its array, with '\[.*; wanted one array, or a record"
        ):
            documents(tmp_path / "two.json")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_records_that_never_have_the_field_are_refused_with_the_names_that_there_are(tmp_path, name):
    rows = [{"body": "a", "n": 1}, {"body": "b", "n": 2}]
    path = tmp_path / name
    if name == "a.parquet":
        parquet(path, body=["a", "b"], n=[1, 2])
    else:
        write(path, json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"no field text or story, it has body, n; name one with --text-field"):
        open_corpus(str(path))
    assert documents(path, text_field="body") == ["a", "b"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.txt.gz", "d/a.txt", "d/a.jsonl"])
def test_a_byte_order_mark_is_not_text_in_any_file(tmp_path, name):
    rows = [{"text": "one"}, {"text": "two"}]
    content = (
        "one\n\ntwo" if ".txt" in name else json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows))
    )
    plain = write(tmp_path / "plain" / name.rpartition("/")[2].removesuffix(".gz"), content)
    raw = b"\xef\xbb\xbf" + content.encode()
    path = write(tmp_path / name, gzip.compress(raw) if name.endswith(".gz") else raw)
    if name.startswith("d/"):
        write(tmp_path / "d" / "b.txt" if ".txt" in name else tmp_path / "d" / "b.jsonl", raw.replace(b"two", b"three"))
        assert "\ufeff" not in "".join(documents(tmp_path / "d"))
    else:
        assert documents(path) == documents(plain)
        assert open_corpus(str(path)).fingerprint != open_corpus(str(plain)).fingerprint


# Bad files


def make_bad(tmp_path, kind):
    """A folder of three files whose second is damaged, and what is left of it where that may be skipped."""
    good, bad = TEXTS[:3], TEXTS[3:6]
    if kind == "binary":
        contents = {"1.txt": good[0], "2.txt": b"a\0b", "3.txt": good[1]}
        left = good[:2]
    elif kind == "gzip":
        packed = gzip.compress(os.urandom(300_000).hex().encode())
        contents = {"1.txt": good[0], "2.txt.gz": packed[: len(packed) // 2], "3.txt": good[1]}
        left = good[:2]
    elif kind == "row":
        rows = [json.dumps({"text": text}) for text in (*good, *bad)]
        contents = {"1.jsonl": rows[0], "2.jsonl": f'{rows[1]}\n{{"text": 3}}\n{rows[2]}', "3.jsonl": rows[3]}
        left = [*good, bad[0]]
    else:
        for number, text in enumerate(good, 1):
            parquet(tmp_path / "d" / f"{number}.parquet", text=[text])
        raw = (tmp_path / "d" / "2.parquet").read_bytes()
        if kind == "parquet footer":
            write(tmp_path / "d" / "2.parquet", raw[:-20])
        elif kind == "parquet UTF-8":
            at = raw.index(good[1].encode())
            write(tmp_path / "d" / "2.parquet", raw[:at] + b"\xff" + raw[at + 1 :])
        elif kind == "parquet column twice":
            table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
            pyarrow.parquet.write_table(table, tmp_path / "d" / "2.parquet")
        contents, left = {}, [good[0], good[2]]
    for name, content in contents.items():
        write(tmp_path / "d" / name, content)
    return tmp_path / "d", left


BAD = {
    "binary": r"2\.txt is binary: it holds a NUL at byte 1",
    "gzip": r"2\.txt\.gz can't be read: Compressed file ended",
    "row": r"2\.jsonl, line 2: field 'text' is a int, wanted a string",
    "parquet footer": r"2\.parquet is not a parquet file",
    "parquet UTF-8": r"2\.parquet can't be read: .*(UTF8|utf-8)",
    "parquet column twice": r"2\.parquet: it has 2 columns 'text', wanted one",
}


@pytest.mark.fault(
    "a damaged file among those of `--data` (binary, cut off, a bad row, a bad column)",
    "one line names the file and what is wrong; `--skip-bad-files` leaves out what can't be read, and says so",
)
@pytest.mark.parametrize("kind", BAD)
def test_one_bad_file_is_named_and_skipped_if_asked(tmp_path, kind):
    folder, left = make_bad(tmp_path, kind)
    with pytest.raises(UserError, match=BAD[kind]):
        documents(folder, val_fraction=0.5)
    report = Report()
    opened = open_corpus(str(folder), val_fraction=0.5, skip_bad=True)
    assert [text for part in opened.parts for _, text in part.documents(report)] == left
    (line,) = {*opened.bad, *report.bad}
    assert re.search(BAD[kind], line)


@pytest.mark.parametrize(
    ("name", "content"), [("a.gz", gzip.compress(b"text", mtime=0)[:-9]), ("a.jsonl", '{"text":\n' * 3)]
)
def test_where_nothing_is_left_what_was_bad_is_said(tmp_path, name, content):
    with pytest.raises(
        UserError, match=rf"--skip-bad-files leaves nothing of it: .*{re.escape(name)}.*(ended|Expecting)"
    ):
        open_corpus(str(write(tmp_path / name, content)), skip_bad=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {"text": "b"}', r"a\.json, record 3: "),
        ('[{"text": "a"}, {"text": 5}, {"text": "b"}]', r"a\.json, record 2: field 'text' is a int"),
        ('[{"text": "a"}, 7, {"text": "b"}]', r"a\.json, record 2: a int, wanted an object"),
        ('[{"text": "a"}, {"text" "b"}' + " " * 200 + "]", r"a\.json, record 2: Expecting ':' delimiter"),
        ('[{"text": "a"}, {"text": "b', r"a\.json, record 2: Unterminated string"),
        ('[{"text": "a"}, \xff', r"a\.json, record 2: Expecting value"),
        (
            '{\n"a": "b"\n}',
            r"a\.json: no field text or story, it has a; .*; wanted records, one a line or an array of them",
        ),
        ('{"text": "a",\n"n": 1}\n{"text":', r"a\.json, record 2: Expecting value"),
        ("[" * 100_000, r"a\.json can't be read: .*recursion"),
        ("[]", "empty, it holds no text"),
    ],
)
def test_a_bad_array_is_named_by_its_record(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        documents(write(tmp_path / "a.json", content), val_fraction=0.5)


def test_a_document_too_large_is_refused_in_every_format(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 10)
    monkeypatch.setattr(parts, "MAX_DOCUMENT_BYTES", 200)
    monkeypatch.setattr(records, "_READ_CHARACTERS", 10)
    texts = ["a" * 50, "b" * 300, "c" * 50]
    rows = [{"text": text} for text in texts]
    parquet(tmp_path / "a.parquet", text=texts)
    write(tmp_path / "a.json", json.dumps(rows))
    write(tmp_path / "a.jsonl.gz", gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    write(tmp_path / "a.txt.gz", gzip.compress("\n\n".join(texts).encode()))
    for name in ("a.parquet", "a.json", "a.jsonl.gz", "a.txt.gz"):
        with pytest.raises(UserError, match=rf"{name}.* holds a document of [\d,]+ bytes, allowed: up to 200"):
            documents(tmp_path / name, val_fraction=0.5)


@pytest.mark.parametrize("large", [1, 10**9])
def test_large_row_groups_are_read_a_piece_at_a_time(tmp_path, monkeypatch, large):
    monkeypatch.setattr("training.data.corpus.parquet._LARGE_GROUP_BYTES", large)
    monkeypatch.setattr(parts, "PART_BYTES", 100)
    path = parquet(tmp_path / "a.parquet", n=list(range(40)), text=TEXTS)
    assert documents(path) == TEXTS
    opened = open_corpus(str(path))
    assert (sum(1 for part in opened.parts for _ in part.pieces(Report())) > 5) == (large == 1)
