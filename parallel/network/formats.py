"""What the parsers of the doctor's inputs share."""

import re

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class FormatError(ValueError):
    """A text that is not what the command or file prints: says which line, and what was expected."""


def plain_lines(text: str) -> list[str]:
    """Lines without terminal codes (nvidia-smi underlines its header) and without a trailing carriage return.

    Raises:
        FormatError: there is nothing but blanks.
    """
    if not text.strip():
        raise FormatError("is empty")
    return [line.rstrip("\r") for line in _ANSI.sub("", text).split("\n")]


def path_values(text: str) -> dict[str, str]:
    """The lines of `grep -H . PATHS`, /path:value, as a dictionary; lines that start with # are remarks.

    A path on several lines keeps them all, one a line.

    Raises:
        FormatError: a line has no path.
    """
    values: dict[str, str] = {}
    for number, line in enumerate(plain_lines(text), 1):
        if not line.strip() or line.startswith("#"):
            continue
        path, colon, value = line.partition(":")
        if not colon or not path.startswith("/"):
            raise FormatError(f"line {number}, {line[:60]!r}: expected /path:value, as grep -H prints it")
        values[path] = f"{values[path]}\n{value}" if path in values else value
    return values


def assignments(text: str) -> dict[str, str]:
    """The lines NAME=value; remarks and blanks are skipped, and the first of a name counts, as in NCCL.

    Raises:
        FormatError: a line is no assignment, or there is not even a remark.
    """
    values: dict[str, str] = {}
    for number, line in enumerate(plain_lines(text), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not name.strip().isidentifier():
            raise FormatError(f"line {number}, {line[:60]!r}: expected NAME=value")
        values.setdefault(name.strip(), value.strip())
    return values
