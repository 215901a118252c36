import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe.train.corpus import DataError, default_corpus, open_corpus


def texts(*paths):
    return list(open_corpus(tuple(str(path) for path in paths)).documents())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("text b", "utf-8")
    (tmp_path / "sub" / "a.jsonl").write_text('{"text": "line 1"}\n\n{"text": "第二行", "id": 2}', "utf-8")
    pq.write_table(pa.table({"text": ["row 1", None, "row 2"], "n": [1, 2, 3]}), tmp_path / "c.parquet")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    return tmp_path


def test_files_folders_and_globs(folder):
    assert texts(folder / "b.txt") == ["text b"]
    assert texts(folder / "sub" / "a.jsonl") == ["line 1", "第二行"]
    assert texts(folder / "c.parquet") == ["row 1", "row 2"]
    assert texts(folder) == ["text b", "row 1", "row 2", "line 1", "第二行"]
    assert texts(folder / "**" / "*.jsonl") == ["line 1", "第二行"]


def test_a_file_named_twice_counts_once(folder):
    assert texts(folder / "b.txt", folder / "*.txt") == ["text b"]


def test_digest_follows_the_content_not_the_name(folder):
    before = open_corpus((str(folder / "b.txt"),)).digest()
    (folder / "b.txt").rename(folder / "renamed.txt")
    assert open_corpus((str(folder / "renamed.txt"),)).digest() == before
    (folder / "renamed.txt").write_text("text c")
    assert open_corpus((str(folder / "renamed.txt"),)).digest() != before


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbftext")
    assert texts(tmp_path) == ["text"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.txt", b"good \xff bad", r"bad.txt: byte 5 is not UTF-8 \(0xff\); convert the file"),
        ("bad.jsonl", b'{"text": "ok"}\n{"text": "\xff"}', "bad.jsonl: byte 25 is not UTF-8"),
        ("bad.jsonl", b'{"text": "ok"}\n{oops', "bad.jsonl:2: not JSON"),
        ("bad.jsonl", b'{"body": "x"}', r'bad.jsonl:1: no string in field "text" \(its fields are body\)'),
        ("bad.jsonl", b"[1]", 'bad.jsonl:1: no string in field "text"'),
        ("bad.jsonl", json.dumps({"text": "\ud800"}).encode(), "half of a surrogate pair"),
        ("bad.parquet", b"not parquet", "bad.parquet: cannot be read as parquet"),
        ("empty.txt", b"", "no text in 1 file"),
        ("blank.txt", b" \n\t\n", "no text in 1 file"),
        ("bad.pdf", b"%PDF", "cannot read .pdf; give .txt"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts(tmp_path / name)


def test_a_parquet_file_without_text(tmp_path):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match='no column "text"; its columns are body'):
        texts(tmp_path / "other.parquet")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.txt", "missing.txt: no such file or folder"),
        ("*.txt", "no file matches this pattern"),
        (".", "no .txt, .md, .py, .jsonl, .parquet file in this folder"),
    ],
)
def test_paths_without_files(tmp_path, path, message):
    with pytest.raises(DataError, match=message):
        texts(tmp_path / path)


def test_the_default_corpus_is_the_world_english_bible():
    documents = list(default_corpus().documents())
    assert len(documents) == 1189
    assert documents[0].startswith("Genesis 1\n\nIn the beginning God created the heavens and the earth.")
    assert 4.0e6 < sum(len(document) for document in documents) < 4.2e6
