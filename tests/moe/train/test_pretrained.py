"""From checkpoint to model folder to run to checkpoint, and every mistake on the way."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments.run import first_state
from moe.model.config import ConfigError
from moe.model.hf.__main__ import main
from moe.model.tensor_files import WeightsError
from moe.train.checkpoint import CheckpointError
from moe.train.pretrained import open_pretrained
from parallel.layout import SINGLE_DEVICE
from tests.moe.train.small_run import small_experiment, small_run

PLAIN = ("model.router.capacity_factor=None", "model.router.overflow=drop")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of a few steps."""
    folder = tmp_path_factory.mktemp("trained")
    small_run(folder / "run", folder / "corpus", *PLAIN, "training.steps=4")
    return folder / "run"


@pytest.fixture
def exported(trained, tmp_path) -> Path:
    assert main(["export", str(trained), str(tmp_path / "hf")]) == 0
    return tmp_path / "hf"


def everything(folder: Path) -> dict:
    return {name: (x.dtype, x.shape, x.tobytes()) for name, x in load_file(folder / "model.safetensors").items()}


def test_a_round_trip_keeps_every_byte(exported, trained, tmp_path):
    assert main(["import", str(exported), str(tmp_path / "folder")]) == 0
    assert main(["export", str(tmp_path / "folder"), str(tmp_path / "again")]) == 0
    assert everything(tmp_path / "again") == everything(exported)
    assert json.loads((tmp_path / "again/config.json").read_text()) == json.loads(
        (exported / "config.json").read_text()
    )
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()

    forms = [open_pretrained(path) for path in (trained, exported, tmp_path / "folder")]
    loaded = [form.load(SINGLE_DEVICE, None, None)[0] for form in forms]
    for other in loaded[1:]:
        jax.tree.map(np.testing.assert_array_equal, loaded[0], other)


def test_a_run_begins_with_the_weights_it_was_given(exported, tmp_path):
    experiment = small_experiment(tmp_path / "corpus").vary({"init_from": str(exported), "mesh.data": 2})
    blueprint = experiment.blueprint()
    state = first_state(experiment, blueprint)
    expected, _ = open_pretrained(exported).load(SINGLE_DEVICE, None, None)
    jax.tree.map(np.testing.assert_array_equal, state.params, expected)
    assert jax.tree.map(lambda x: x.sharding, state.params) == blueprint.shardings().params
    outcome = small_run(tmp_path / "run", tmp_path / "corpus", f"init_from={exported}", "training.steps=4")
    assert outcome.finished


@pytest.mark.slow
def test_a_run_begins_with_the_selection_biases_it_was_given(tmp_path):
    small_run(tmp_path / "first", tmp_path / "corpus", "model.router.balance=bias", "training.steps=3")
    begins = f"init_from={tmp_path / 'first'}"
    for mesh in ({"mesh.data": 2}, {"mesh.expert": 1}):
        changes = {"init_from": str(tmp_path / "first"), "model.router.balance": "bias"} | mesh
        experiment = small_experiment(tmp_path / "corpus").vary(changes)
        blueprint = experiment.blueprint()
        found = first_state(experiment, blueprint).balance
        expected = open_pretrained(tmp_path / "first").balance(SINGLE_DEVICE)
        assert any(np.any(x) for x in jax.tree.leaves(expected))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    with pytest.raises(ConfigError, match="selection biases, which model.router.balance='aux_loss' has no place for"):
        small_run(tmp_path / "second", tmp_path / "corpus", begins, "model.router.balance=aux_loss")


def test_another_model_is_refused_by_its_fields(exported, tmp_path):
    with pytest.raises(ConfigError, match=r"holds another model: model.norm_eps=0.1 instead of 1e-05"):
        small_run(tmp_path / "run", tmp_path / "corpus", f"init_from={exported}", "model.norm_eps=0.1")


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("model.norm.weight"), r"lacks the tensor model.norm.weight, expected of shape \(16,\)"),
        (lambda x: x.update(extra=np.zeros(2)), r"does not ask for, first extra of shape \(2,\)"),
        (
            lambda x: x.update({"model.norm.weight": np.zeros(3, np.float32)}),
            r"model.norm.weight has shape \(3,\); config.json asks for \(16,\)",
        ),
        (lambda x: x.update({"model.norm.weight": np.zeros(16, np.int8)}), "is stored as int8"),
        (
            lambda x: x.update({"model.layers.1.input_layernorm.weight": np.zeros(16, np.float16)}),
            "model.layers.1.input_layernorm.weight is stored as float16 and .*layers.0.* as float32",
        ),
        (lambda x: x.update({"lm_head.weight": np.zeros((300, 16), np.float32)}), "ties lm_head.weight to"),
    ],
    ids=["missing", "surplus", "misshapen", "format", "formats", "untied"],
)
def test_wrong_tensors_are_named_and_nothing_is_written(exported, tmp_path, change, message, capsys):
    rewrite(exported, change)
    with pytest.raises(WeightsError, match=message):
        open_pretrained(exported)
    before = set(tmp_path.iterdir())
    assert main(["import", str(exported), str(tmp_path / "folder")]) == 2
    assert set(tmp_path.iterdir()) == before
    assert "error: " in capsys.readouterr().err


def test_a_tied_head_that_stands_in_the_file_stands_there_again(exported, tmp_path):
    rewrite(exported, lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"].copy()}))
    assert main(["import", str(exported), str(tmp_path / "folder")]) == 0
    assert main(["export", str(tmp_path / "folder"), str(tmp_path / "again")]) == 0
    assert everything(tmp_path / "again") == everything(exported)


def test_a_truncated_file_is_refused_by_its_tensor(exported):
    file = exported / "model.safetensors"
    with open(file, "r+b") as opened:
        opened.truncate(file.stat().st_size - 10)
    with pytest.raises(WeightsError, match=r"model.safetensors: is truncated within \S+: expected at least \d+ bytes"):
        open_pretrained(exported)


def test_an_output_that_exists_is_left_alone(exported, trained, capsys):
    before = everything(exported)
    assert main(["export", str(trained), str(exported)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert everything(exported) == before


def test_folders_of_something_else_are_refused(tmp_path, trained):
    with pytest.raises(ConfigError, match="no such folder"):
        open_pretrained(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config.json: cannot be read"):
        open_pretrained(tmp_path)
    shutil.copytree(trained, tmp_path / "copy")
    for manifest in (tmp_path / "copy/checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        open_pretrained(tmp_path / "copy")
