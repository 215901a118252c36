"""The tokenizer that stands beside a checkpoint: tokenizer.json, or Hunyuan's hy.tiktoken."""

import base64
import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import tiktoken
import tokenizers

from moe.model.config import ConfigError

EOS = "<|eos|>"
HUNYUAN_SPECIAL = ["<|endoftext|>", "<|startoftext|>", "<|bos|>", EOS, "<|pad|>"]
HUNYUAN_SPECIAL += [f"<|extra_{i}|>" for i in range(204)]
"""Special tokens of Hunyuan-Large's tokenizer, in the order of their ids, behind the ordinary ones: 128,166 in all."""

HUNYUAN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How text is cut into words before the merges (released code, tokenization_hy.py)."""


class _Coder(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...

    def special(self, name: str) -> int | None: ...


class Vocabulary:
    """Text to token ids and back.

    A special token's name within text is ordinary text, so what a user writes cannot end a turn.

    Attributes:
        eos: ids that end a text.
    """

    def __init__(self, coder: _Coder, eos: Iterable[int], where: str) -> None:
        self._coder, self._where = coder, where
        self.eos = frozenset(eos)

    def encode(self, text: str) -> list[int]:
        """Token ids; no special token is added."""
        return self._coder.encode(text)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text, special tokens left out. Bytes that are no UTF-8 become U+FFFD."""
        return self._coder.decode(list(tokens))

    def special(self, name: str) -> int:
        """The id of a special token.

        Raises:
            ConfigError: the vocabulary lacks it.
        """
        found = self._coder.special(name)
        if found is None:
            raise ConfigError(f"{self._where}: the vocabulary has no special token {name}")
        return found


class _HuggingFace:
    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        return self._inner.decode(tokens, skip_special_tokens=True)

    def special(self, name: str) -> int | None:
        return self._inner.token_to_id(name)


class _Tiktoken:
    def __init__(self, ranks: dict[bytes, int]) -> None:
        special = {name: len(ranks) + i for i, name in enumerate(HUNYUAN_SPECIAL)}
        self._special = special
        self._inner = tiktoken.Encoding(
            "hunyuan", pat_str=HUNYUAN_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )

    def encode(self, text: str) -> list[int]:
        return self._inner.encode_ordinary(unicodedata.normalize("NFC", text))

    def decode(self, tokens: list[int]) -> str:
        ordinary = [token for token in tokens if token < self._inner.n_vocab - len(self._special)]
        return self._inner.decode(ordinary, errors="replace")

    def special(self, name: str) -> int | None:
        return self._special.get(name)


def open_vocabulary(folder: Path, settings: dict[str, Any]) -> Vocabulary:
    """The tokenizer in `folder`.

    Args:
        settings: the checkpoint's config.json; its eos_token_id ends a text, together with that of
            generation_config.json and the token <|eos|>.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    coder: _Coder
    if (folder / "tokenizer.json").is_file():
        file = folder / "tokenizer.json"
        try:
            coder = _HuggingFace(tokenizers.Tokenizer.from_str(file.read_text("utf-8")))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{file}: is no readable tokenizer.json ({error})") from None
    elif (folder / "hy.tiktoken").is_file():
        file = folder / "hy.tiktoken"
        coder = _Tiktoken(_ranks(file))
    else:
        raise ConfigError(
            f"{folder}: holds neither tokenizer.json nor hy.tiktoken; put the model's tokenizer there, "
            "or call the model with token ids"
        )
    ends = {*_eos_ids(settings), *_eos_ids(_read_json(folder / "generation_config.json"))}
    named = coder.special(EOS)
    return Vocabulary(coder, ends if named is None else ends | {named}, str(file))


def _ranks(file: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            token, _ = line.split()
            ranks.setdefault(base64.b64decode(token, validate=True), len(ranks))
        except ValueError as error:
            raise ConfigError(f"{file}, line {number}: is no token in base64 and its rank ({error})") from None
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise ConfigError(f"{file}: lacks some of the 256 single bytes, so not every text has tokens")
    return ranks


def _eos_ids(settings: dict[str, Any]) -> set[int]:
    told = settings.get("eos_token_id")
    return set() if told is None else set(told) if isinstance(told, list) else {told}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{file}: is not JSON ({error})") from error
