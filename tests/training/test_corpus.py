import json
import os
import pickle
import subprocess
import sys
import sysconfig

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.data.corpus import open_corpus, parts, source
from training.errors import UserError

WORDS = [f"document number {i} — grüße, 日本 {'x' * (i % 7)}" for i in range(60)]


def documents(source, **options):
    """All documents of a source in order, and the set of those kept for validation."""
    opened = open_corpus(str(source), **options)
    pairs = [pair for part in opened.parts for pair in part.documents()]
    return [text for _, text in pairs], {text for split, text in pairs if split == "val"}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# The split


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text("ab \n", min_size=1, max_size=3), min_size=1, max_size=8),
    val_fraction=st.sampled_from([1e-9, 0.1, 0.5, 0.999999]),
)
def test_both_splits_get_a_document_and_never_the_same_one(tmp_path, texts, val_fraction):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": text} for text in texts])
    distinct = {text for text in texts if text.strip()}
    if len(distinct) < 2:
        with pytest.raises(UserError, match=r"one document|empty"):
            open_corpus(str(path), val_fraction=val_fraction)
        return
    opened = open_corpus(str(path), val_fraction=val_fraction)
    train, val = list(opened.documents("train")), list(opened.documents("val"))
    assert train
    assert val
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(text for text in texts if text.strip())


def test_the_split_of_a_document_does_not_depend_on_its_place(tmp_path):
    forward = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in WORDS])
    backward = write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in reversed(WORDS)])
    assert documents(forward, val_fraction=0.3)[1] == documents(backward, val_fraction=0.3)[1]


def test_about_the_fraction_asked_for_is_validation(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{i}"} for i in range(4000)])
    assert 320 < len(documents(path, val_fraction=0.1)[1]) < 480


@pytest.mark.parametrize("val_fraction", [0, 1, -0.1, float("nan")])
def test_a_fraction_that_leaves_a_split_empty_is_refused(val_fraction):
    with pytest.raises(UserError, match="--val-fraction"):
        open_corpus("stdlib", val_fraction=val_fraction)


# Text files


@pytest.mark.parametrize("part_bytes", [1, 7, 50, 1 << 20])
def test_where_the_parts_are_cut_changes_no_document(tmp_path, monkeypatch, part_bytes):
    (tmp_path / "a.txt").write_text("\n\n" + "\n \t\n\n".join(WORDS) + "\n\n\n")
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in WORDS])
    monkeypatch.setattr(parts, "PART_BYTES", part_bytes)
    for name in ("a.txt", "a.jsonl"):
        assert documents(tmp_path / name)[0] == WORDS
    assert (len(open_corpus(str(tmp_path / "a.txt")).parts) > 1) == (part_bytes < 1000)


def test_paragraphs_keep_their_indentation_tabs_and_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"  one\r\n\ttwo  \r\n\r\n    three\n\n\n")
    assert documents(tmp_path / "a.txt")[0] == ["  one\r\n\ttwo  ", "    three"]


def test_a_separator_across_two_blocks_of_reading_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 1)
    for length in range((1 << 16) - 2, (1 << 16) + 3):
        (tmp_path / "a.txt").write_text("x" * length + "\n\ny\n\nz")
        assert len(open_corpus(str(tmp_path / "a.txt")).parts) == 3


def test_a_whole_text_file_is_one_document_and_so_has_no_split(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert len(documents(tmp_path / "a.txt")[0]) == 2
    with pytest.raises(UserError, match=r"one document.*blank-lines"):
        open_corpus(str(tmp_path / "a.txt"), split_text="whole")


@pytest.mark.parametrize("suffix", [".txt", ".py", ".jsonl", ""])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b" \n\n\t\n", "empty"),
        (b"12345\0", "binary.*NUL at byte 5"),
        (b'"a"\n\n\xe9t\xe9', "binary or of another encoding: 0xe9 at byte 5"),
        ("a\n\nb".encode("utf-16"), "is UTF-16, wanted UTF-8"),
        ("a\n\nb".encode("utf-32"), "is UTF-32, wanted UTF-8; iconv -f utf-32 "),
    ],
)
def test_empty_and_binary_files_are_refused(tmp_path, suffix, content, message):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        documents(path)


def test_the_byte_in_the_message_counts_from_the_start_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 4)
    (tmp_path / "a.txt").write_bytes(b"aaaa\n\nbbbb\n\nc\xff")
    with pytest.raises(UserError, match="byte 13"):
        documents(tmp_path / "a.txt")


def test_a_missing_source_is_named_with_what_is_allowed(tmp_path):
    with pytest.raises(UserError, match=r"--data .*nowhere.*stdlib, tinystories or a path"):
        open_corpus(str(tmp_path / "nowhere"))


def test_a_document_too_large_to_encode_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 10)
    monkeypatch.setattr(parts, "MAX_DOCUMENT_BYTES", 100)
    (tmp_path / "a.txt").write_text("x" * 50 + "\n\n" + "y" * 200)
    with pytest.raises(UserError, match="a document of 200 bytes"):
        open_corpus(str(tmp_path / "a.txt"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "big").write_text("y" * 201)
    with pytest.raises(UserError, match="big holds a document of 201 bytes"):
        open_corpus(str(tmp_path / "folder"))


# Folders and the standard library


def make_tree(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


@pytest.mark.parametrize("part_bytes", [1, 1 << 20])
def test_the_stdlib_is_its_own_utf8_source_in_order_of_path(tmp_path, monkeypatch, part_bytes):
    make_tree(
        tmp_path,
        {
            "b.py": b"b = 1\r\n",
            "a/z.py": "z = 'ü'\n".encode(),
            "a/__init__.py": b"",
            "a/data.txt": b"no source",
            "test/latin.py": b"# coding: latin-1\n'\xe9'",
            "site-packages/x.py": b"x",
            "dist-packages/y.py": b"y",
            "a/__pycache__/c.py": b"c",
        },
    )
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(parts, "PART_BYTES", part_bytes)
    assert documents("stdlib")[0] == ["z = 'ü'\n", "b = 1\r\n"]


def test_this_machine_has_a_stdlib_to_train_on():
    opened = open_corpus("stdlib")
    assert sum(part.n_bytes for part in opened.parts) > 5_000_000
    assert "class OrderedDict(dict):" in "".join(text for text in opened.documents("train"))


def test_a_folder_is_one_document_a_file_without_hidden_ones(tmp_path):
    make_tree(tmp_path, {"b.txt": b"one\n\ntwo", "a/c.md": b"three", ".git/x": b"\0", "a/.hidden": b"four", "d": b" "})
    assert documents(tmp_path)[0] == ["three", "one\n\ntwo"]


def test_a_binary_file_in_a_folder_is_named(tmp_path):
    make_tree(tmp_path, {"a.txt": b"one", "b.txt": b"two", "image.png": b"\x89PNG\0"})
    with pytest.raises(UserError, match=r"image.png is binary"):
        documents(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="empty"):
        open_corpus(str(tmp_path))


# JSON lines


def test_a_row_gives_its_text_or_story_or_the_field_named(tmp_path):
    rows = [{"text": "a", "story": "b", "body": "c"}, {"story": "d", "body": "e"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert documents(path)[0] == ["a", "d"]
    assert documents(path, text_field="body")[0] == ["c", "e"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "delimiter"),
        ("[1]", "a list, wanted an object"),
        ('{"text": 3}', "field 'text' is a int"),
        ('{"text": "\\u0000"}', "binary"),
        ('{"text": "\\ud800"}', "surrogates"),
        ("[" * 100_000, "recursion"),
    ],
)
@pytest.mark.parametrize("part_bytes", [1, 1 << 20])
def test_a_bad_row_is_named_by_its_line(tmp_path, monkeypatch, line, message, part_bytes):
    monkeypatch.setattr(parts, "PART_BYTES", part_bytes)
    good = '{"text": "good"}\n\n{"text": "better"}\n' + "".join(f'{{"text": "{i}"}}\n' for i in range(50))
    (tmp_path / "a.jsonl").write_text(good + line + "\n")
    with pytest.raises(UserError, match=f"a.jsonl, line 54: .*{message}"):
        documents(tmp_path / "a.jsonl", val_fraction=0.5)


# Parquet


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
    return path


def test_a_parquet_file_gives_its_rows_in_order(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", n=list(range(61)), story=[*WORDS, None])
    assert documents(path)[0] == documents(path, text_field="story")[0] == WORDS
    assert len(open_corpus(str(path)).parts) == 9


@pytest.mark.parametrize("kind", ["large_string", "string_view"])
def test_strings_of_a_parquet_file_may_be_of_any_kind(tmp_path, kind):
    if not hasattr(pyarrow, kind):
        pytest.skip(f"pyarrow {pyarrow.__version__} has no {kind}")
    path = write_parquet(tmp_path / "a.parquet", text=pyarrow.array(WORDS, getattr(pyarrow, kind)()))
    assert documents(path)[0] == WORDS


def test_bad_parquet_files_are_refused(tmp_path):
    (tmp_path / "fake.parquet").write_bytes(b"not at all parquet")
    with pytest.raises(UserError, match=r"fake.parquet is not a parquet file"):
        open_corpus(str(tmp_path / "fake.parquet"))
    path = write_parquet(tmp_path / "a.parquet", text=[1, 2], body=["a\0", "b"])
    with pytest.raises(UserError, match="column 'text' holds int64, wanted string"):
        open_corpus(str(path))
    with pytest.raises(UserError, match="no field missing, it has text, body"):
        open_corpus(str(path), text_field="missing")
    with pytest.raises(UserError, match="column 'body' is binary"):
        documents(path, text_field="body")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", text=["a", "b"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install triton-llama\[parquet\]"):
        open_corpus(str(path))


# TinyStories


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the download: small files of the same form; counts what was asked for."""
    asked = []

    def download(*, repo_id, filename, repo_type, local_dir):
        assert (repo_id, repo_type) == ("roneneldan/TinyStories", "dataset")
        asked.append(filename)
        stories = [f"\nOnce upon a time {i}.\n\nThe end {i}.\n" for i in range(50)]
        local_dir.mkdir(exist_ok=True)
        (local_dir / filename).write_text("<|endoftext|>".join(stories if "train" in filename else ["\nHeld out.\n"]))
        return str(local_dir / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


@pytest.mark.parametrize("part_bytes", [1, 100, 1 << 20])
def test_tinystories_has_its_own_validation_file_and_is_downloaded_once(tmp_path, monkeypatch, hub, part_bytes):
    monkeypatch.setattr(parts, "PART_BYTES", part_bytes)
    for _ in range(2):
        opened = open_corpus("tinystories", download_dir=tmp_path / "d")
        stories = [f"Once upon a time {i}.\n\nThe end {i}." for i in range(50)]
        assert list(opened.documents("train")) == stories
        assert list(opened.documents("val")) == ["Held out."]
    assert hub == ["TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"]


def test_a_failed_download_is_a_mistake_the_user_can_mend(tmp_path, monkeypatch):
    def fail(**_):
        raise RuntimeError("no route to host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(UserError, match=r"TinyStoriesV2-GPT4-train.txt can't be downloaded.*no route to host"):
        open_corpus("tinystories", download_dir=tmp_path)


def test_an_empty_download_is_refused(tmp_path):
    for split in ("train", "valid"):
        (tmp_path / f"TinyStoriesV2-GPT4-{split}.txt").write_text("\n<|endoftext|>\n")
    with pytest.raises(UserError, match=r"train.txt is empty"):
        open_corpus("tinystories", download_dir=tmp_path)


# The fingerprint, and what workers need


def test_the_fingerprint_follows_the_content_and_the_options(tmp_path):
    def fingerprint(**options):
        return open_corpus(str(tmp_path / "d"), **options).fingerprint

    make_tree(tmp_path, {"d/a": b"one", "d/b": b"two", "d/c": b"three"})
    first = fingerprint()
    (tmp_path / "d/a").touch()
    assert fingerprint() == first
    seen = {first, fingerprint(val_fraction=0.2), fingerprint(split_text="whole"), fingerprint(text_field="x")}
    (tmp_path / "d/a").write_bytes(b"eno")
    seen.add(fingerprint())
    (tmp_path / "d/c").rename(tmp_path / "d/d")
    seen.add(fingerprint())
    assert len(seen) == 6


def test_a_large_source_is_known_by_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "HASHED_BYTES", 5)
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo")
    first = open_corpus(str(path)).fingerprint
    assert open_corpus(str(path)).fingerprint == first
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert open_corpus(str(path)).fingerprint != first


def test_parts_survive_pickling(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(WORDS))
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in WORDS])
    write_parquet(tmp_path / "a.parquet", text=WORDS)
    make_tree(tmp_path / "d", {f"{i:02}": text.encode() for i, text in enumerate(WORDS)})
    for name in ("a.txt", "a.jsonl", "a.parquet", "d"):
        parts = open_corpus(str(tmp_path / name)).parts
        assert [list(p.documents()) for p in pickle.loads(pickle.dumps(parts))] == [list(p.documents()) for p in parts]


def test_few_parts_are_spread_over_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 1)
    (tmp_path / "a.txt").write_text("\n\n".join(WORDS))
    opened = open_corpus(str(tmp_path / "a.txt"), val_fraction=1e-9)
    some = list(opened.documents("train", max_parts=10))
    assert 9 <= len(some) <= 10
    assert set(some) <= set(opened.documents("train"))
    assert {WORDS.index(text) // 20 for text in some} == {0, 1, 2}
    assert list(opened.documents("train", max_parts=1000)) == list(opened.documents("train"))


def test_importing_the_data_path_imports_nothing_heavy():
    code = (
        "import sys, training.data.corpus, training.data.tokenizer, training.data.prepare;"
        "print({'torch', 'sentencepiece', 'pyarrow', 'huggingface_hub', 'rich'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
