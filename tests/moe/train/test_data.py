import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.model.config import ConfigError
from moe.train.corpus import DataError
from moe.train.data import DataConfig, open_data, pack
from moe.train.token_cache import TokenStream
from tests.oracle import packing as oracle

VOCAB = 300
LINES = [
    f"Document {i}: in the beginning was the word, and the word was {'long ' * (i % 7)}number {i}." for i in range(40)
]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}) for line in LINES), "utf-8")
    return path


def config_of(corpus, **changes):
    settings = {"sequence_length": 32, "batch_size": 4, "held_out": 0.1, "cache": str(corpus.parent / "cache")}
    return DataConfig(paths=(str(corpus),), **(settings | changes))


def open_small(corpus, seed=0, **changes):
    processes = {name: changes.pop(name) for name in ("process_index", "process_count") if name in changes}
    return open_data(config_of(corpus, **changes), vocab_size=VOCAB, seed=seed, **processes)


def take(data, count):
    return [next(data.train) for _ in range(count)]


def assert_same(batches, others):
    for one, other in zip(batches, others, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    sequence_length=st.integers(1, 9),
)
def test_packing_is_the_oracles(lengths, sequence_length):
    r = np.random.default_rng(0)
    documents = [r.integers(0, 100, length).tolist() for length in lengths]
    starts = np.cumsum([0, *lengths[:-1]])
    stream = TokenStream(np.concatenate(documents).astype(np.uint16), starts, 0)
    expected = oracle.rows(documents, sequence_length, 7)
    if not expected:
        return
    batch = pack(stream, sequence_length, 7, np.arange(len(expected)))
    for r, row in enumerate(expected):
        inside = np.array(row["segments"]) > 0
        np.testing.assert_array_equal(batch.tokens_BT[r], row["tokens"])
        np.testing.assert_array_equal(batch.targets_BT[r], row["targets"])
        np.testing.assert_array_equal(batch.segments_BT[r], row["segments"])
        np.testing.assert_array_equal(batch.weights_BT[r], row["weights"])
        np.testing.assert_array_equal(batch.positions_BT[r][inside], np.array(row["positions"])[inside])


def test_a_row_beyond_the_end_is_padding():
    batch = pack(TokenStream(np.arange(5, dtype=np.uint16), np.array([0]), 0), 4, 9, np.array([3]))
    assert (batch.segments_BT == 0).all()
    assert (batch.weights_BT == 0).all()
    assert (batch.tokens_BT == 9).all()


def test_an_epoch_holds_every_row_once_in_another_order_each_time(corpus):
    data = open_small(corpus, batch_size=1)
    num_rows = (data.statistics.tokens - 1) // 32
    first, second = (np.concatenate([b.tokens_BT for b in take(data, num_rows)]) for _ in range(2))
    assert (first != second).any()
    np.testing.assert_array_equal(np.unique(first, axis=0), np.unique(second, axis=0))
    assert len(np.unique(first, axis=0)) == num_rows
    other = np.concatenate([b.tokens_BT for b in take(open_small(corpus, batch_size=1, seed=1), num_rows)])
    assert (first != other).any()


@pytest.mark.parametrize("steps", [0, 3, 29])
def test_resuming_is_exact(corpus, steps):
    data = open_small(corpus)
    take(data, steps)
    state = json.loads(json.dumps(data.train.get_state()))
    undisturbed = take(data, 25)
    resumed = open_small(corpus)
    resumed.train.set_state(state)
    assert_same(take(resumed, 25), undisturbed)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_batches(corpus, processes):
    whole = take(open_small(corpus), 12)
    parts = [take(open_small(corpus, process_index=i, process_count=processes), 12) for i in range(processes)]
    joined = [
        type(whole[0])(*(np.concatenate(field) for field in zip(*step, strict=True)))
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_see_no_row_twice_in_an_epoch(corpus, processes):
    num_rows = (open_small(corpus).statistics.tokens - 1) // 32
    steps = num_rows // 4
    seen = [
        np.concatenate([b.tokens_BT for b in take(open_small(corpus, process_index=i, process_count=processes), steps)])
        for i in range(processes)
    ]
    assert len(np.unique(np.concatenate(seen), axis=0)) == steps * 4
    # No two rows of the corpus are alike, so that counting them tells.
    whole = np.concatenate([b.tokens_BT for b in take(open_small(corpus, batch_size=1), num_rows)])
    assert len(np.unique(whole, axis=0)) == num_rows


def test_validation_holds_every_held_out_token_once(corpus):
    data = open_small(corpus)
    batches = list(data.validation())
    assert all(batch.tokens_BT.shape == (4, 32) for batch in batches)
    assert 0 < sum((batch.segments_BT > 0).sum() for batch in batches) >= data.statistics.validation_tokens - 1
    assert_same(list(data.validation()), batches)
    text = data.tokenizer.decode(np.concatenate([b.tokens_BT[b.segments_BT > 0] for b in batches]))
    held_out = [line for line in LINES if line in text]
    assert len(held_out) == 4
    trained = data.tokenizer.decode(np.concatenate([b.tokens_BT.reshape(-1) for b in take(data, 40)]))
    assert not any(line in trained for line in held_out)


def test_without_held_out_documents_there_is_no_validation(corpus):
    data = open_small(corpus, held_out=0.0)
    assert list(data.validation()) == []
    assert data.statistics.validation_tokens == 0


def test_one_document_alone_is_cut_in_two(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n".join(LINES), "utf-8")
    data = open_small(path, held_out=0.2)
    assert data.statistics.documents == 2
    assert 0.1 < data.statistics.validation_tokens / data.statistics.tokens < 0.35


def test_unigram_entropy(corpus):
    data = open_small(corpus, batch_size=1)
    rows = take(data, (data.statistics.tokens - 1) // 32)
    targets = np.concatenate([row.targets_BT[row.weights_BT > 0] for row in rows])
    probs = np.unique(targets, return_counts=True)[1] / len(targets)
    # The rows leave out the few tokens behind the last whole one.
    np.testing.assert_allclose(data.statistics.unigram_entropy, -(probs * np.log(probs)).sum(), rtol=0.01)


def test_the_cache_is_made_once(corpus):
    lines: list[str] = []
    open_data(config_of(corpus), vocab_size=VOCAB, seed=0, report=lines.append)
    assert any("training a tokenizer" in line for line in lines)
    lines.clear()
    open_data(config_of(corpus), vocab_size=VOCAB, seed=5, report=lines.append)
    assert lines == []


@pytest.mark.parametrize("file", ["train.tokens", "train.starts", "validation.tokens", "tokenizer.json", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_cache_is_made_again(corpus, file, damage):
    whole = take(open_small(corpus), 3)
    (path,) = (corpus.parent / "cache").glob(f"*/{file}")
    content = path.read_bytes()
    # The first run still maps the old file: a new one takes its name.
    path.unlink()
    if damage != "remove":
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"\xff" + content[1:])
    lines: list[str] = []
    data = open_data(config_of(corpus), vocab_size=VOCAB, seed=0, report=lines.append)
    assert "is damaged" in lines[0]
    assert_same(take(data, 3), whole)


def test_killed_while_tokenizing_leaves_no_cache(corpus):
    code = f"""
    import os
    from moe.train import token_cache
    from moe.train.data import DataConfig, open_data
    token_cache._digest_and_sync = lambda path: os.kill(os.getpid(), 9)
    open_data({config_of(corpus)!r}, vocab_size={VOCAB}, seed=0)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert killed.returncode == -9
    assert not list((corpus.parent / "cache").glob("*/meta.json"))
    assert_same(take(open_small(corpus), 2), take(open_small(corpus), 2))


def test_a_full_disk_is_said(corpus, monkeypatch):
    def full(path):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("moe.train.token_cache._digest_and_sync", full)
    with pytest.raises(DataError, match="cannot be written .No space left on device.; make room, or set data.cache"):
        open_small(corpus)
    assert list((corpus.parent / "cache").iterdir()) == []


def test_too_little_text(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("Only this.", "utf-8")
    with pytest.raises(DataError, match="fewer than one row of data.sequence_length=32"):
        open_small(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 0}, "data.sequence_length=0: give a whole number"),
        ({"batch_size": True}, "data.batch_size=True"),
        ({"held_out": 1.0}, "data.held_out=1.0: give a share"),
        ({"paths": "corpus.txt"}, r"data.paths='corpus.txt': give a tuple of paths, \('corpus.txt',\)"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**changes)


def test_a_batch_that_does_not_divide_over_the_processes(corpus):
    with pytest.raises(ConfigError, match="data.batch_size=4 does not divide over 3 processes: use a multiple of 3"):
        open_small(corpus, process_count=3)


def test_a_vocabulary_too_small(corpus):
    with pytest.raises(ConfigError, match="vocab_size=100: a byte-level tokenizer needs at least 261"):
        open_data(config_of(corpus), vocab_size=100, seed=0)
