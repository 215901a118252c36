import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from rich.console import Console

from experiments import quality
from experiments.quality_table import final_loss, markdown, row_of
from moe.model.config import ConfigError
from moe.train.data import Batch
from moe.train.step import make_train_step

QUIET = Console(quiet=True)


def test_every_mode_is_a_run_of_its_own_that_the_settings_allow():
    tasks = quality.plan_tasks(list(quality.MODES), 2, {}, QUIET)
    assert [task.mode for task in tasks[::2]] == list(quality.MODES)
    assert len({task.folder for task in tasks}) == 2 * len(quality.MODES)


def test_modes_are_named_whole_or_by_how_they_begin_and_float32_comes_first():
    assert quality.asked_modes("Muon,bfloat16") == ["float32", "Muon", "bfloat16"]
    assert quality.asked_modes("AdamW states")[1:] == [f"AdamW states {each}" for each in ("bfloat16", "fp8", "int8")]
    assert quality.asked_modes(None) == list(quality.MODES)
    with pytest.raises(ConfigError, match="--modes has 'fp9': give names"):
        quality.asked_modes("fp9")


def test_a_command_gives_every_change():
    common = quality.common_changes(quality.parser().parse_args(["--steps=30", "--init-from=runs/base"]))
    (_, task) = quality.plan_tasks(["float32", "fp8 exchange"], 1, common, QUIET)
    assert {"--set=mesh.expert=4", "--set=precision.exchange=fp8", "--set=training.steps=30"} <= set(task.command)
    assert "--set=init_from=runs/base" in task.command
    assert task.experiment.training.steps == 30
    assert task.experiment.optimizer.learning_rate < quality.experiment.optimizer.learning_rate


def test_a_mode_that_the_settings_do_not_allow_is_left_out(monkeypatch, capsys):
    monkeypatch.setitem(quality.MODES, "impossible", {"precision.compute": "float9"})
    tasks = quality.plan_tasks(["float32", "impossible"], 1, {}, Console())
    assert [task.mode for task in tasks] == ["float32"]
    assert "impossible is left out: precision.compute" in capsys.readouterr().out


def finished(path, seed: int, loss: float, changed: float | None = None):
    """A run's folder with what the table reads."""
    folder = path / f"{seed}-{loss}"
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"validation_loss": loss}))
    measured = {"count": 10, "parameters": 20, "optimizer": 80, "changed": changed}
    (folder / "measured.json").write_text(json.dumps(measured))
    records = [{"step": 1, "loss": 7.0}, {"step": 2, "loss": loss}, {"step": 2, "validation_loss": loss}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_a_row_compares_runs_of_the_same_seed(tmp_path):
    reference = {0: finished(tmp_path, 0, 4.0), 1: finished(tmp_path, 1, 5.0), 2: finished(tmp_path, 2, 4.5)}
    row = row_of("int8", {0: finished(tmp_path, 0, 4.04, 0.02), 1: finished(tmp_path, 1, 5.15)}, reference, None)
    assert final_loss(reference[1]) == 5.0
    assert row.difference == pytest.approx(0.02)
    # Of 1% and 3%.
    assert row.noise == pytest.approx(0.02**0.5 / 10)
    assert (row.parameters, row.optimizer, row.changed) == (2, 8, 0.02)
    assert row.curves[1].tolist() == [7.0, 5.15]


def test_the_lab_book_has_a_line_a_mode_and_why_nothing_was_compiled(tmp_path):
    folders = {0: finished(tmp_path, 0, 4.0)}
    others = {0: finished(tmp_path, 0, 4.02)}
    rows = [row_of("float32", folders, folders, "no plugin"), row_of("Muon", others, folders, 3 * 2**20)]
    lines = markdown(rows).splitlines()
    assert lines[2] == "| float32 | 4.0000 | – | 1 | 2.00 + 8.00 | – | – |"
    assert lines[3] == "| Muon | 4.0200 | +0.50 | 1 | 2.00 + 8.00 | – | 3.0 |"
    assert lines[-1] == "no plugin"


def test_pictures_have_a_band_over_the_seeds_and_a_bar_a_mode(tmp_path):
    reference = {seed: finished(tmp_path, seed, 4.0 + seed) for seed in (0, 1)}
    others = {seed: finished(tmp_path, seed, 4.1 + seed) for seed in (0, 1)}
    rows = [row_of(mode, folders, reference, None) for mode, folders in (("float32", reference), ("bfloat16", others))]
    drawn = quality.pictures(rows)
    assert set(drawn) == {"quality.png", "quality_bfloat16.png"}
    curves, bars = drawn["quality.png"].axes
    assert [text.get_text() for text in curves.get_legend().get_texts()] == ["float32", "bfloat16"]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["bfloat16"]
    assert bars.patches[0].get_width() == pytest.approx(100 * rows[1].difference)


@pytest.mark.slow
@pytest.mark.parametrize("mode", quality.MODES)
def test_a_step_of_every_mode_gives_the_state_that_it_took(mode):
    """Traced, on a mesh without devices."""
    (*_, task) = quality.plan_tasks(["float32", mode], 1, {}, QUIET)
    sizes = task.experiment.mesh.sizes
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    blueprint = task.experiment.blueprint(mesh if task.experiment.mesh.num_devices > 1 else None)
    state = blueprint.abstract_state()
    shape = (task.experiment.data.batch_size, task.experiment.data.sequence_length)
    batch = Batch(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in [jnp.int32] * 4 + [jnp.float32]))
    with jax.sharding.use_abstract_mesh(mesh):
        after, _ = jax.eval_shape(make_train_step(blueprint, seed=0), state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
