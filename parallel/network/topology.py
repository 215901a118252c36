"""What `nvidia-smi topo -m` prints: how far each GPU is from each network card on the PCIe tree."""

import re
from dataclasses import dataclass

from parallel.network.formats import FormatError, plain_lines

DISTANCES = ("PIX", "PXB", "PHB", "NODE", "SYS")
"""From near to far: one PCIe bridge, several, the CPU's host bridge, two host bridges of a socket, two sockets."""
DISTANCE_IN_WORDS = {
    "PIX": "the same PCIe switch",
    "PXB": "PCIe switches only",
    "PHB": "a PCIe host bridge, so the CPU",
    "NODE": "two PCIe host bridges of one socket, so the CPU",
    "SYS": "the link of the two sockets, so both CPUs",
}
_CELL = re.compile(r"X|NV\d+|PIX|PXB|PHB|NODE|SYS")
_GPU = re.compile(r"GPU(\d+)")
_NIC = re.compile(r"NIC\d+")


@dataclass(frozen=True)
class Topology:
    """GPUs by index and network cards by name, with the distance of each pair.

    distances: by (GPU, card): PIX, PXB, PHB, NODE or SYS.
    numa: by GPU, the NUMA node, where it is told.
    nvlink: whether any two GPUs are joined by NVLink.
    """

    gpus: tuple[int, ...]
    nics: tuple[str, ...]
    distances: dict[tuple[int, str], str]
    numa: dict[int, int]
    nvlink: bool


def parse_topology(text: str) -> Topology:
    """Reads the matrix by its header, so that columns may stand in any order.

    Raises:
        FormatError: no matrix, a row that is cut off, an entry that is none, or a NICn that the legend does not name.
    """
    lines = plain_lines(text)
    start, columns = _header(lines)
    rows: dict[str, list[str]] = {}
    for number, line in enumerate(lines[start + 1 :], start + 2):
        tokens = line.split()
        if tokens and tokens[0] in columns:
            rows[tokens[0]] = _row(number, tokens, len(columns))
    gpus = [column for column in columns if _GPU.fullmatch(column)]
    for gpu in gpus:
        if gpu not in rows:
            raise FormatError(f"the header names {gpu}, and no row does: the output is cut off")
    names = _names([column for column in columns if column not in gpus], lines)
    place = {column: i for i, column in enumerate(columns)}
    return Topology(
        gpus=tuple(_index(gpu) for gpu in gpus),
        nics=tuple(names.values()),
        distances={
            (_index(gpu), name): _distance(rows[gpu][place[column]], gpu, column)
            for gpu in gpus
            for column, name in names.items()
        },
        numa={
            _index(gpu): int(tail[1])
            for gpu in gpus
            if len(tail := rows[gpu][len(columns) :]) > 1 and tail[1].isdecimal()
        },
        nvlink=any(rows[gpu][place[other]].startswith("NV") for gpu in gpus for other in gpus),
    )


def _header(lines: list[str]) -> tuple[int, list[str]]:
    for i, line in enumerate(lines):
        tokens = line.split()
        cells_follow = len(tokens) > 1 and _CELL.fullmatch(tokens[1])
        if any(_GPU.fullmatch(token) for token in tokens) and not cells_follow:
            columns = tokens[: tokens.index("CPU")] if "CPU" in tokens else tokens
            twice = {column for column in columns if columns.count(column) > 1}
            if twice:
                raise FormatError(f"line {i + 1}: the header names {', '.join(sorted(twice))} twice")
            return i, columns
    raise FormatError("holds no matrix with a header GPU0 …, as `nvidia-smi topo -m` prints it")


def _row(number: int, tokens: list[str], size: int) -> list[str]:
    cells = tokens[1:]
    if len(cells) < size:
        raise FormatError(f"line {number}: {tokens[0]} has {len(cells)} entries for {size} columns: it is cut off")
    for cell in cells[:size]:
        if not _CELL.fullmatch(cell):
            raise FormatError(
                f"line {number}: {tokens[0]} has the entry {cell!r}; expected X, NV#, {', '.join(DISTANCES)}"
            )
    return cells


def _names(columns: list[str], lines: list[str]) -> dict[str, str]:
    """The cards' names by column: older drivers head the columns with them, newer ones add a legend."""
    legend = {found[1]: found[2] for line in lines if (found := re.fullmatch(r"\s*(NIC\d+):\s*(\S+)\s*", line))}
    for column in columns:
        if _NIC.fullmatch(column) and column not in legend:
            raise FormatError(f"the legend does not name {column}: the output is cut off")
    return {column: legend.get(column, column) for column in columns}


def _distance(cell: str, gpu: str, column: str) -> str:
    if cell not in DISTANCES:
        raise FormatError(f"{gpu} to {column} is {cell!r}; expected one of {', '.join(DISTANCES)}")
    return cell


def _index(gpu: str) -> int:
    return int(gpu.removeprefix("GPU"))
