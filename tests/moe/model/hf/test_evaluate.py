"""Parity with Tencent's released PyTorch code (tests/golden/README.md)."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe.model.hf.__main__ import main

GOLDEN = Path(__file__).parents[3] / "golden"
FIXTURES = ("hunyuan_large_tiny", "top2_no_cla")


@cache
def evaluated(fixture: str, mesh: str, folder: Path) -> dict[str, np.ndarray]:
    output = folder / f"{fixture}.safetensors"
    inputs = str(GOLDEN / fixture / "reference.safetensors")
    mesh_arguments = ["--mesh", mesh] if mesh else []
    arguments = ["evaluate", str(GOLDEN / fixture), "--inputs", inputs, "--output", str(output), *mesh_arguments]
    assert main(arguments) == 0
    return load_file(output)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("evaluated")


def worst(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the largest expected value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("fixture", [FIXTURES[0], pytest.param(FIXTURES[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("mesh", ["", "data=2,expert=4"], ids=["one device", "mesh"])
def test_all_is_what_the_released_code_computes(fixture, mesh, folder):
    expected, found = load_file(GOLDEN / fixture / "reference.safetensors"), evaluated(fixture, mesh, folder)
    states = sorted(name for name in expected if name.startswith("hidden_states."))
    assert states == sorted(name for name in found if name.startswith("hidden_states."))
    for name in states:
        assert worst(found[name], expected[name]) < 1e-5, name
    assert worst(found["logits"], expected["logits"]) < 1e-5
    assert worst(found["loss"], expected["loss"]) < 1e-6
    for name in expected:
        if name.startswith("grad."):
            assert worst(found[name], expected[name]) < 1e-4, name
        elif name.startswith("grad_norm."):
            norm = np.linalg.norm(found["grad." + name.removeprefix("grad_norm.")])
            assert norm == pytest.approx(expected[name].item(), rel=1e-4), name
    np.testing.assert_array_equal(found["greedy_ids"], expected["greedy_ids"])
    assert {name for name in found if name.startswith("grad.")} == {
        f"grad.{name}" for name in load_file(GOLDEN / fixture / "model.safetensors")
    }


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"tokens": np.zeros((1, 4), np.int64)}, "has no input_ids, but tokens"),
        ({"input_ids": np.zeros((1, 4), np.float32)}, "give whole numbers"),
        ({"input_ids": np.zeros(4, np.int64)}, "give whole numbers"),
        ({"input_ids": np.full((1, 4), 256)}, "go from 256 to 256; give 0 to 255"),
    ],
)
def test_bad_inputs_are_named(tensors, message, tmp_path, capsys):
    save_file(tensors, tmp_path / "in.safetensors")
    fixture = str(GOLDEN / FIXTURES[0])
    output = tmp_path / "out.safetensors"
    assert main(["evaluate", fixture, "--inputs", str(tmp_path / "in.safetensors"), "--output", str(output)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "in.safetensors"]


@pytest.mark.parametrize(
    ("mesh", "message"),
    [("wing=2", "no axis is called 'wing'"), ("data=x", "'x' is no whole number"), ("expert=3", "does not divide")],
)
def test_bad_meshes_are_named(mesh, message, tmp_path, capsys):
    inputs = str(GOLDEN / FIXTURES[0] / "reference.safetensors")
    arguments = ["evaluate", str(GOLDEN / FIXTURES[0]), "--inputs", inputs, "--output", str(tmp_path / "out")]
    assert main([*arguments, "--mesh", mesh]) == 2
    assert message in capsys.readouterr().err
