from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from experiments.run import load_experiment
from moe.model.count import count_parameters
from moe.train.data import Batch
from moe.train.step import make_train_step

ROOT = Path(__file__).parent.parent.parent
FILES = [file for file in sorted((ROOT / "experiments").glob("*.py")) if "\nexperiment = " in file.read_text("utf-8")]


def test_there_are_experiments():
    assert {"tiny", "speed_158m", "hunyuan_large"} <= {file.stem for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_one_step_has_the_shapes_of_the_state(file):
    """On a mesh without devices, so that 512 GPUs fit in."""
    experiment = load_experiment(file)
    assert experiment.name == file.stem
    sizes = experiment.mesh.sizes
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    blueprint = experiment.blueprint(mesh if experiment.mesh.num_devices > 1 else None)
    state = blueprint.abstract_state()
    shape = (experiment.data.batch_size, experiment.data.sequence_length)
    batch = Batch(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in [jnp.int32] * 4 + [jnp.float32]))
    training = experiment.training
    step = make_train_step(blueprint, seed=0, microbatches=training.microbatches, loss_chunk=training.loss_chunk)
    with jax.sharding.use_abstract_mesh(mesh):
        after, metrics = jax.eval_shape(step, state, batch)
    jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(f"{a} {b}"), after, state)
    assert metrics.loss.shape == ()
    assert metrics.layers.load_LE.shape == (experiment.model.num_layers, experiment.model.num_experts)


def test_hunyuan_large_is_the_published_one():
    experiment = load_experiment(ROOT / "experiments/hunyuan_large.py")
    sizes = experiment.mesh.sizes
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    count = count_parameters(experiment.model, experiment.blueprint(mesh).specs)
    assert (round(count.total / 1e9, 1), round(count.active / 1e9, 1)) == (388.7, 51.3)
