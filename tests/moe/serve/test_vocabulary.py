import base64
import json

import pytest

from moe.model.config import ConfigError
from moe.serve.chat import ChatError, chat_tokens
from moe.serve.vocabulary import open_vocabulary
from tests.moe.serve.serving import TOKENIZER

MERGES = [b"he", b"ll", b"hell", b"hello", b" w", b"\xe4\xbd", "你".encode()]


@pytest.fixture
def hunyuan(tmp_path):
    """A vocabulary in Hunyuan's format: 256 bytes and a few merges."""
    tokens = [bytes([byte]) for byte in range(256)] + MERGES
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (tmp_path / "hy.tiktoken").write_text("\n".join(lines) + "\n")
    return open_vocabulary(tmp_path, {"eos_token_id": 7})


def test_hunyuans_format(hunyuan):
    first = 256 + len(MERGES)
    assert hunyuan.encode("hello 你 12") == [259, 32, 262, 32, 49, 50]
    assert hunyuan.special("<|endoftext|>") == first
    assert hunyuan.special("<|eos|>") == first + 3
    assert hunyuan.special("<|extra_0|>") == first + 5
    assert hunyuan.special("<|extra_203|>") == first + 208
    assert hunyuan.eos == {7, first + 3}
    text = "hello <|eos|> naïve\n\n  x 🙂"
    assert hunyuan.decode(hunyuan.encode(text)) == text
    assert not hunyuan.eos & set(hunyuan.encode("<|eos|>"))
    assert hunyuan.decode([259, first + 3]) == "hello"
    # Composed and decomposed letters are the same text (released code, tokenization_hy.py).
    assert hunyuan.encode("e\u0301") == hunyuan.encode("\u00e9")


def test_the_released_vocabularys_special_ids(tmp_path):
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"%06d" % number for number in range(127_957 - 256)]
    text = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (tmp_path / "hy.tiktoken").write_text(text)
    vocabulary = open_vocabulary(tmp_path, {})
    assert vocabulary.special("<|eos|>") == 127_960
    assert vocabulary.special("<|pad|>") == 127_961
    assert vocabulary.special("<|extra_203|>") == 128_165


def test_a_tokenizer_json(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    vocabulary = open_vocabulary(tmp_path, {"eos_token_id": 5})
    assert vocabulary.eos == {3, 4, 5, TOKENIZER.eos}
    assert vocabulary.encode("In the <|eos|>") == TOKENIZER.encode("In the <|eos|>")
    assert vocabulary.decode([TOKENIZER.eos, *TOKENIZER.encode("In")]) == "In"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other", "", "holds neither tokenizer.json nor hy.tiktoken"),
        ("tokenizer.json", "{}", "is no readable tokenizer.json"),
        ("hy.tiktoken", "YQ== 0\nnonsense\n", "line 2: is no token in base64"),
        ("hy.tiktoken", "YQ== 0\n", "lacks some of the 256 single bytes"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        open_vocabulary(tmp_path, {})


def test_a_conversation(hunyuan):
    start, eos = hunyuan.special("<|startoftext|>"), hunyuan.special("<|eos|>")
    after_system, after_user = hunyuan.special("<|extra_4|>"), hunyuan.special("<|extra_0|>")
    hello = hunyuan.encode("hello")
    say = [{"role": role, "content": "hello"} for role in ("system", "user", "assistant", "user")]
    assert chat_tokens(say, hunyuan) == [
        start, *hello, after_system, *hello, after_user, *hello, eos, start, *hello, after_user
    ]  # fmt: skip
    assert chat_tokens(say[1:2], hunyuan) == [start, *hello, after_user]
    assert chat_tokens(say[1:], hunyuan) == [start, *hello, after_user, *hello, eos, start, *hello, after_user]


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ([], "the last one must be the user's"),
        (["system"], "the last one must be the user's"),
        (["user", "user"], r"messages\[1\]: role 'user'.*by assistant is due"),
        (["assistant"], "by system or user is due"),
        (["user", "assistant"], "the last one must be the user's"),
        (["tool"], "role 'tool'"),
    ],
)
def test_messages_out_of_turn(hunyuan, roles, message):
    with pytest.raises(ChatError, match=message):
        chat_tokens([{"role": role, "content": "x"} for role in roles], hunyuan)
