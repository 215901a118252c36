"""A job's program, lowered for a mesh in shapes only: no array is made."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from moe.model.cache import placed_cache
from moe.planner.job import Job
from moe.serve.engine import Served, Texts, Weights, decode, prefill
from moe.train.data import Batch
from moe.train.state import Blueprint, make_blueprint
from moe.train.step import make_train_step
from parallel.layout import Layout
from parallel.platform import compiling_for


def lower(job: Job, mesh: Mesh) -> jax.stages.Lowered:
    """The step that `job` describes, for the devices of `mesh`: the very function that runs.

    Of devices that are only described JAX knows no memory, and so drops what waits in their hosts'. All but the tokens
    are therefore laid over the mesh's shape alone, which may have any memory; the tokens then name the devices.

    Raises:
        LayoutError: a parameter does not divide over the mesh.
        ValueError: a backend that the chip does not have.
    """
    layout = Layout(mesh.abstract_mesh, job.layout)
    with compiling_for("gpu", mesh.devices.flat[0].compute_capability):
        return (_lower_training if job.kind == "train" else _lower_serving)(job, layout, mesh)


def training_step(job: Job, layout: Layout) -> tuple[Blueprint, Any]:
    """What a run of `job` plans, and its step: a jitted function of state and batch."""
    blueprint = make_blueprint(
        job.model, job.precision, job.execution, job.optimizer, layout, steps=job.steps, lora=job.lora
    )
    step = make_train_step(
        blueprint,
        seed=0,
        microbatches=job.microbatches,
        virtual_stages=job.virtual_stages,
        loss_chunk=job.loss_chunk,
    )
    return blueprint, step


def _lower_training(job: Job, layout: Layout, mesh: Mesh) -> jax.stages.Lowered:
    blueprint, step = training_step(job, layout)
    sharding = NamedSharding(mesh, layout.activation_spec("BT"))
    ints, floats = (
        jax.ShapeDtypeStruct((job.batch_size, job.sequence_length), dtype, sharding=sharding)
        for dtype in (jnp.int32, jnp.float32)
    )
    return step.lower(blueprint.abstract_state(), Batch(ints, ints, ints, ints, floats))


def _lower_serving(job: Job, layout: Layout, mesh: Mesh) -> jax.stages.Lowered:
    layout.refuse_stages("serving")
    served = Served(job.model, job.precision, layout, job.execution, unrolled=True)
    cache = placed_cache(
        jax.eval_shape(partial(served.empty_cache, job.batch_size, job.sequence_length)),
        lambda x, axes: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.activation(axes)),
    )

    def numbers(*shape: int, dtype: DTypeLike = jnp.int32, spec: PartitionSpec = layout.whole_spec) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    given = (*Weights.abstract(served), cache)
    if job.kind == "prefill":
        rows = numbers(job.batch_size)
        return prefill.lower(*given, numbers(job.batch_size, job.sequence_length), rows, rows, None)
    rows = partial(numbers, job.batch_size, spec=layout.activation_spec("B"))
    return decode.lower(*given, Texts(rows(), rows(), rows(dtype=bool), None))
