from hypothesis import given
from hypothesis import strategies as st

from moe.serve.text_stream import TextStream
from moe.serve.vocabulary import Vocabulary
from tests.moe.serve.serving import TOKENIZER


class Bytes:
    """A token for each byte."""

    def encode(self, text):
        return list(text.encode())

    def decode(self, tokens):
        return bytes(tokens).decode("utf-8", errors="replace")

    def special(self, name):
        return None


BYTES = Vocabulary(Bytes(), (), "bytes")


@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_the_parts_are_the_text_up_to_the_first_stop(text, stop):
    stream = TextStream(BYTES, stop)
    shown = "".join([*(stream.push(token) for token in BYTES.encode(text)), stream.finish()])
    ends = [text.index(each) for each in stop if each in text]
    if not ends:
        assert shown == text
        assert not stream.stopped
    else:
        assert stream.stopped
        assert not any(each in shown for each in stop)
        assert text.startswith(shown)


def test_no_half_character_is_shown():
    stream = TextStream(BYTES)
    parts = [stream.push(token) for token in BYTES.encode("né👩‍🚀!")]
    assert "\ufffd" not in "".join(parts)
    assert "".join(parts) == "né👩‍🚀!"


def test_bytes_that_are_no_text_are_shown_at_last():
    stream = TextStream(BYTES)
    assert [stream.push(0xE4), stream.push(0xBD)] == ["", ""]
    assert stream.finish() == "\ufffd"
    endless = TextStream(BYTES)
    assert "\ufffd" in "".join(endless.push(0x80) for _ in range(100))


def test_the_beginning_of_a_stop_text_waits():
    stream = TextStream(BYTES, ["END"])
    assert [stream.push(b) for b in b"xENy"] == ["x", "", "", "ENy"]
    assert [stream.push(b) for b in b"EN"] == ["", ""]
    assert stream.finish() == "EN"


def test_a_real_tokenizer_streams_its_own_decoding():
    vocabulary = Vocabulary(TOKENIZER_CODER, (), "trained")
    text = "老师说：你好，世界！ 🙂 naïve"
    stream = TextStream(vocabulary)
    assert "".join([*(stream.push(t) for t in vocabulary.encode(text)), stream.finish()]) == text


class _Trained:
    encode, decode = staticmethod(TOKENIZER.encode), staticmethod(TOKENIZER.decode)

    def special(self, name):
        return TOKENIZER.special(name)


TOKENIZER_CODER = _Trained()
