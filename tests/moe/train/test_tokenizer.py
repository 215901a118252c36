import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.model.config import ConfigError
from moe.train.corpus import DataError
from moe.train.tokenizer import EOS, SPECIAL, load_tokenizer, train_tokenizer

TEXTS = ["the cat sat on the mat\n" * 50, "猫坐在垫子上。" * 50]
TOKENIZER = train_tokenizer(TEXTS, 320)


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["one\r\ntwo\r\n", "no newline at the end", " \t  spaces ", "猫坐在垫子上", "x" * 200_000]
)
def test_awkward_texts_come_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_a_special_tokens_name_in_a_text_is_text():
    assert TOKENIZER.eos not in TOKENIZER.encode(f"this {EOS} ends nothing")
    assert TOKENIZER.decode([TOKENIZER.eos]) == EOS


def test_training_learns_merges_and_is_reproducible():
    assert len(TOKENIZER.encode("the mat")) < len("the mat")
    assert TOKENIZER.to_json() == train_tokenizer(TEXTS, 320).to_json()
    assert TOKENIZER.size <= 320


def test_long_texts_in_pieces_are_the_same_text():
    text = "a line of text\n" * 20_000
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_saved_and_loaded(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json", 320)
    assert loaded.encode(TEXTS[1]) == TOKENIZER.encode(TEXTS[1])
    assert (loaded.eos, loaded.pad, loaded.size) == (TOKENIZER.eos, TOKENIZER.pad, TOKENIZER.size)
    with pytest.raises(DataError, match="the model has vocab_size=270; set model.vocab_size to at least"):
        load_tokenizer(tmp_path / "tokenizer.json", 270)


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such tokenizer file"):
        load_tokenizer(tmp_path / "none.json", 300)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="not a readable tokenizer.json"):
        load_tokenizer(tmp_path / "bad.json", 300)


def test_a_vocabulary_without_room_for_all_bytes():
    assert len(SPECIAL) == 5
    with pytest.raises(ConfigError, match="vocab_size=260: a byte-level tokenizer needs at least 261 ids"):
        train_tokenizer(TEXTS, 260)
