"""The tokenized corpus on disk: written aside and renamed when whole, so that it is there entirely or not at all."""

import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe.train.corpus import DataError
from moe.train.tokenizer import Tokenizer, load_tokenizer

_FORMAT = 1
_DOCUMENTS_AT_ONCE = 256
_SECONDS_BETWEEN_REPORTS = 5.0


@dataclass(frozen=True)
class TokenStream:
    """Documents end to end.

    tokens: uint16 or uint32, mapped from disk; each document ends with the tokenizer's <|eos|>.
    starts: i64, place of each document's first token.
    num_bytes: of the documents' text in UTF-8.
    """

    tokens: np.ndarray
    starts: np.ndarray
    num_bytes: int


@dataclass(frozen=True)
class TokenCache:
    """A tokenized corpus, its documents split into a training and a validation part."""

    tokenizer: Tokenizer
    train: TokenStream
    validation: TokenStream

    @property
    def documents(self) -> int:
        return len(self.train.starts) + len(self.validation.starts)


def open_token_cache(
    folder: Path,
    documents: Callable[[], Iterable[str]],
    tokenizer: Callable[[], Tokenizer],
    held_out: float,
    report: Callable[[str], None],
) -> TokenCache:
    """The cache at `folder`, made first where it is missing or damaged. Several processes may make it at once.

    Args:
        documents: gives the corpus's documents, anew with each call.
        tokenizer: makes or loads the tokenizer; called only where the cache is made.
        held_out: share of the documents for validation, at least one of them if not 0. Copies of a text fall on the
            same side; where there is one text only, its end is held out.
    """
    if (damage := _damage(folder)) and folder.exists():
        report(f"{folder}: the token cache is damaged ({damage}), tokenizing again")
        shutil.rmtree(folder)
    if damage:
        _make(folder, documents, tokenizer(), held_out, report)
    meta = json.loads((folder / "meta.json").read_text("utf-8"))

    def stream(name: str) -> TokenStream:
        kept = meta["streams"][name]
        tokens = np.zeros(0, meta["dtype"])
        if kept["tokens"]:
            tokens = np.memmap(folder / f"{name}.tokens", meta["dtype"], "r")
        return TokenStream(tokens, np.fromfile(folder / f"{name}.starts", np.int64), kept["bytes"])

    loaded = load_tokenizer(folder / "tokenizer.json", meta["vocab_size"])
    return TokenCache(loaded, stream("train"), stream("validation"))


def _damage(folder: Path) -> str | None:
    """What is wrong with the cache, or None: every file must have the digest that was written down."""
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        if meta["format"] != _FORMAT:
            return f"format {meta['format']} instead of {_FORMAT}"
        for name, digest in meta["files"].items():
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _make(
    folder: Path,
    documents: Callable[[], Iterable[str]],
    tokenizer: Tokenizer,
    held_out: float,
    report: Callable[[str], None],
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.making.", dir=folder.parent))
    try:
        dtype = np.dtype(np.uint16 if tokenizer.size <= 1 << 16 else np.uint32)
        (aside / "tokenizer.json").write_text(tokenizer.to_json(), "utf-8")
        streams = _tokenize(aside, documents, tokenizer, dtype, held_out, report)
        files = {file.name: _digest_and_sync(file) for file in sorted(aside.iterdir())}
        meta = {
            "format": _FORMAT,
            "dtype": dtype.name,
            "vocab_size": tokenizer.size,
            "streams": streams,
            "files": files,
        }
        (aside / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")
        _digest_and_sync(aside / "meta.json")
        try:
            aside.rename(folder)
        except OSError:
            # Another process was first: its cache is as good as ours.
            if damage := _damage(folder):
                raise DataError(f"{folder}: the token cache cannot be put in place ({damage})") from None
    except OSError as error:
        raise DataError(
            f"{folder.parent}: the token cache cannot be written ({error.strerror}); make room, or set data.cache to "
            "a folder elsewhere"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _tokenize(
    aside: Path,
    documents: Callable[[], Iterable[str]],
    tokenizer: Tokenizer,
    dtype: np.dtype,
    held_out: float,
    report: Callable[[str], None],
) -> dict[str, Any]:
    writers = [_Writer(aside / name, dtype) for name in ("train", "validation")]
    told, num_documents = time.monotonic(), 0
    for group in _groups(_split(documents, held_out), _DOCUMENTS_AT_ONCE):
        texts = [text for text, _ in group]
        for (text, is_held_out), tokens in zip(group, tokenizer.encode_all(texts), strict=True):
            writers[is_held_out].add([*tokens, tokenizer.eos], len(text.encode()))
        num_documents += len(group)
        if time.monotonic() - told > _SECONDS_BETWEEN_REPORTS:
            told = time.monotonic()
            report(f"tokenized {num_documents:,} documents, {sum(w.num_tokens for w in writers):,} tokens")
    return {writer.path.name: writer.close() for writer in writers}


class _Writer:
    """Writes one stream, document by document: `path`.tokens and `path`.starts."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path = path
        self.num_tokens = 0
        self._dtype = dtype
        self._num_bytes = 0
        self._starts: list[int] = []
        self._file = open(f"{path}.tokens", "wb")  # noqa: SIM115 - closed by `close`

    def add(self, tokens: list[int], num_bytes: int) -> None:
        self._starts.append(self.num_tokens)
        self.num_tokens += len(tokens)
        self._num_bytes += num_bytes
        self._file.write(np.array(tokens, self._dtype).tobytes())

    def close(self) -> dict[str, int]:
        """What the stream holds."""
        self._file.close()
        np.array(self._starts, np.int64).tofile(f"{self.path}.starts")
        return {"tokens": self.num_tokens, "bytes": self._num_bytes}


def _split(documents: Callable[[], Iterable[str]], held_out: float) -> Iterator[tuple[str, bool]]:
    """Each document, and whether it is held out: those whose text has the smallest digests, at least one."""
    digests = {_digest_of(text) for text in documents()} if held_out else set()
    if len(digests) == 1:
        text = next(iter(documents()))
        cut = text.rfind("\n", 0, round(len(text) * (1 - held_out))) + 1 or round(len(text) * (1 - held_out))
        yield text[:cut], False
        yield text[cut:], True
        return
    count = min(max(1, round(held_out * len(digests))), len(digests) - 1)
    chosen = set(sorted(digests)[:count]) if digests else set()
    for text in documents():
        yield text, bool(chosen) and _digest_of(text) in chosen


def _digest_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


def _groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


def _digest_and_sync(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return digest
