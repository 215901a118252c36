import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from moe.model.tensor_files import NewTensor, TensorFolder, WeightsError, new_folder, write_tensors

ARRAYS = {
    "a": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "b": np.arange(6).astype(ml_dtypes.bfloat16).reshape(3, 2).T,
    "c": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float16),
}


def write(folder, arrays=ARRAYS, **options):
    new = [NewTensor(name, x.dtype, x.shape) for name, x in arrays.items()]
    write_tensors(folder, new, [x for x in arrays.values() if x.size], **options)


@pytest.mark.parametrize("shard_bytes", [10_000, 100, 1])
def test_what_is_written_is_read_here_and_by_the_library(tmp_path, shard_bytes):
    write(tmp_path, shard_bytes=shard_bytes)
    folder = TensorFolder(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == {10_000: 1, 100: 2, 1: 4}[shard_bytes]
    theirs = {name: x for file in files for name, x in safetensors.numpy.load_file(file).items()}
    for name, expected in ARRAYS.items():
        for found in (folder.read(name), theirs[name]):
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)


def test_a_part_is_read_alone(tmp_path):
    write(tmp_path)
    np.testing.assert_array_equal(TensorFolder(tmp_path).read("a", (1,)), ARRAYS["a"][1])
    np.testing.assert_array_equal(TensorFolder(tmp_path).read("a", (1, 2)), ARRAYS["a"][1, 2])


def test_a_large_transposed_array_is_written_in_blocks(tmp_path):
    wide = {"w": np.random.default_rng(0).standard_normal((3000, 2500), np.float32).T}
    write(tmp_path, wide)
    np.testing.assert_array_equal(TensorFolder(tmp_path).read("w"), wide["w"])


def damage_index(folder, change):
    file = folder / "model.safetensors.index.json"
    told = json.loads(file.read_text())
    change(told)
    file.write_text(json.dumps(told))


def header_says(folder, **changes):
    """Rewrites the header of a file with a single tensor."""
    file = next(folder.glob("*.safetensors"))
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["a"] |= changes
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: next(d.glob("*.safetensors")).write_bytes(b""), "is no whole safetensors file: 0 bytes"),
        (lambda d: next(d.glob("*.safetensors")).write_bytes(b"\xff" * 20), "is no whole safetensors file"),
        (lambda d: next(d.glob("*.safetensors")).write_bytes(b"\2" + b"\0" * 7 + b"[]"), "has a header that is no"),
        (lambda d: header_says(d, shape=[5]), r"a of shape \(5,\) in F32 needs 20 bytes, found 96"),
        (lambda d: header_says(d, data_offsets=[8, 104]), "is truncated within a: expected at least"),
        (lambda d: header_says(d, dtype="F4"), "a is stored as F4; F64, F32"),
        (lambda d: header_says(d, data_offsets=None), "has a header that is no safetensors header"),
        (lambda d: next(d.glob("*.safetensors")).unlink(), "holds neither model.safetensors nor"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage, message):
    write(tmp_path, {"a": ARRAYS["a"]})
    damage(tmp_path)
    with pytest.raises(WeightsError, match=message):
        TensorFolder(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: next(d.glob("*00001-of*")).unlink(), "is missing; the index expects 1 tensors in it, first a"),
        (lambda d: damage_index(d, lambda x: x["weight_map"].pop("b")), "holds b, which the index places in None"),
        (lambda d: damage_index(d, lambda x: x["weight_map"].update(z=x["weight_map"]["a"])), "lacks z, which"),
        (lambda d: damage_index(d, lambda x: x["weight_map"].update(z="../x")), "lies outside the folder"),
        (lambda d: damage_index(d, lambda x: x.pop("weight_map")), "is no index"),
    ],
)
def test_a_contradicted_index_is_named(tmp_path, damage, message):
    write(tmp_path, shard_bytes=100)
    damage(tmp_path)
    with pytest.raises(WeightsError, match=message):
        TensorFolder(tmp_path)


def test_a_file_cut_short_after_it_was_opened(tmp_path):
    write(tmp_path, {"a": ARRAYS["a"]})
    folder = TensorFolder(tmp_path)
    file = tmp_path / "model.safetensors"
    with open(file, "r+b") as opened:
        opened.truncate(file.stat().st_size - 4)
    with pytest.raises(WeightsError, match="ends within a: expected 96 bytes, found 92"):
        folder.read("a")


def test_a_new_folder_has_its_name_only_when_it_is_whole(tmp_path):
    def fail() -> None:
        with new_folder(tmp_path / "new") as folder:
            (folder / "half").write_text("…")
            assert not (tmp_path / "new").exists()
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "new") as folder:
        (folder / "whole").write_text("…")
    assert (tmp_path / "new/whole").exists()
    with pytest.raises(WeightsError, match="is there already"), new_folder(tmp_path / "new"):
        pass
