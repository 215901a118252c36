"""safetensors files, read and written piece by piece.

The `safetensors` library maps whole files into memory and writes only files that it holds whole; a checkpoint here may
be a hundred times the host's memory. The format is 8 bytes of header length, a JSON header, and the arrays' bytes
(https://github.com/huggingface/safetensors, format).
"""

import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
"""A file is closed before it grows beyond this, unless it holds a single array. The usual size on model hubs."""

BLOCK_BYTES = 16_000_000
"""Written at once of an array that must be transposed on the way."""

FORMATS: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in FORMATS.items()}


class WeightsError(ValueError):
    """Weights that cannot be read or written: names the file and tensor, what was expected and what was found."""


class Stored(NamedTuple):
    """Where one tensor lies. offset: of its first byte in the file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


class TensorFolder:
    """The tensors of a folder's model.safetensors, or of the files that its model.safetensors.index.json names."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            WeightsError: no such files, a damaged or truncated one, or an index that they contradict.
        """
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        index = folder / INDEX
        if index.is_file():
            self._read_index(index)
        elif (folder / SINGLE).is_file():
            self.tensors = read_header(folder / SINGLE)
        else:
            raise WeightsError(f"{folder}: holds neither {SINGLE} nor {INDEX}; give a folder with safetensors files")

    def _read_index(self, index: Path) -> None:
        try:
            files: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
            names = sorted(set(files.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{index}: is no index of safetensors files ({error!r})") from error
        for name in names:
            if Path(name).name != name:
                raise WeightsError(f"{index}: names the file {name!r}, which lies outside the folder")
            if not (self.folder / name).is_file():
                held = [tensor for tensor, file in files.items() if file == name]
                raise WeightsError(
                    f"{self.folder / name}: is missing; the index expects {len(held)} tensors in it, first {held[0]}"
                )
            for tensor, stored in read_header(self.folder / name).items():
                if files.get(tensor) != name:
                    raise WeightsError(
                        f"{self.folder / name}: holds {tensor}, which the index places in {files.get(tensor)}"
                    )
                self.tensors[tensor] = stored
        for tensor, file in files.items():
            if tensor not in self.tensors:
                raise WeightsError(f"{self.folder / file}: lacks {tensor}, which the index places there")

    def read(self, name: str, index: tuple[int, ...] = ()) -> np.ndarray:
        """The tensor `name`, or its part at `index` of the leading axes; only that part is read.

        Raises:
            WeightsError: no such tensor, or the file has become shorter.
        """
        if name not in self.tensors:
            raise WeightsError(f"{self.folder}: has no tensor {name}")
        stored = self.tensors[name]
        shape = stored.shape[len(index) :]
        place = int(np.ravel_multi_index(index, stored.shape[: len(index)])) if index else 0
        values = np.empty(math.prod(shape), stored.dtype)
        with open(stored.file, "rb") as file:
            file.seek(stored.offset + place * values.nbytes)
            got = file.readinto(values.view(np.uint8).data)
        if got != values.nbytes:
            raise WeightsError(f"{stored.file}: ends within {name}: expected {values.nbytes} bytes, found {got}")
        return values.reshape(shape)


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, by name.

    Raises:
        WeightsError: the file is damaged or truncated.
    """
    size = file.stat().st_size
    with open(file, "rb") as opened:
        first = opened.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 0 < length <= size - 8:
            raise WeightsError(f"{file}: is no whole safetensors file: {size} bytes, a header of {length} expected")
        text = opened.read(length)
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        return {name: _stored(file, name, entry, 8 + length, size) for name, entry in header.items()}
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{file}: has a header that is no safetensors header ({error!r})") from error


def _stored(file: Path, name: str, entry: dict[str, Any], start: int, size: int) -> Stored:
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in FORMATS:
        raise WeightsError(f"{file}: {name} is stored as {dtype}; {', '.join(FORMATS)} can be read")
    expected = math.prod(shape) * FORMATS[dtype].itemsize
    if end - begin != expected or begin < 0:
        raise WeightsError(f"{file}: {name} of shape {shape} in {dtype} needs {expected} bytes, found {end - begin}")
    if start + end > size:
        raise WeightsError(f"{file}: is truncated within {name}: expected at least {start + end} bytes, found {size}")
    return Stored(file, FORMATS[dtype], shape, start + begin)


class NewTensor(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    folder: Path, tensors: list[NewTensor], values: Iterable[np.ndarray], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes model.safetensors, or several files and an index, holding one array of `values` at a time.

    Args:
        values: the tensors' contents in their order; a tensor may come in several arrays, one after the other.
    """
    pieces = iter(values)
    shards = _shards(tensors, shard_bytes)
    total = sum(tensor.nbytes for tensor in tensors)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {tensor.name: name for tensor in shard}
        write_file(folder / name, shard, pieces)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2), "utf-8")


def write_file(file: Path, tensors: list[NewTensor], pieces: Iterator[np.ndarray]) -> None:
    """Writes one safetensors file from the next arrays of `pieces`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            missing = tensor.nbytes
            while missing > 0:
                piece = next(pieces)
                assert piece.dtype == tensor.dtype, f"a piece of {piece.dtype} in {tensor}"
                assert piece.nbytes <= missing, f"a piece of {piece.nbytes} bytes in {missing} of {tensor}"
                for block in _blocks(piece):
                    opened.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
                missing -= piece.nbytes
        opened.flush()
        os.fsync(opened.fileno())


def _blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    """An array in parts of its first axis, so that one that lies transposed in memory is not copied whole."""
    if values.flags.c_contiguous or values.ndim < 2:
        yield values
        return
    rows = max(1, BLOCK_BYTES * len(values) // max(1, values.nbytes))
    for first in range(0, len(values), rows):
        yield values[first : first + rows]


def _shards(tensors: list[NewTensor], limit: int) -> list[list[NewTensor]]:
    shards: list[list[NewTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name `path` only when all is written; nothing is left of a failure.

    Raises:
        WeightsError: `path` is there already.
    """
    if path.exists():
        raise WeightsError(f"{path}: is there already; give a folder that does not exist, or remove it first")
    aside = path.with_name(path.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        os.rename(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
