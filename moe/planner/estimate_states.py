"""What stays on a device from step to step, exactly: the very trees of training and serving, in shapes, by the one
table of shardings (parallel/layout.py)."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from moe.model.adapter import LoraConfig
from moe.model.config import ModelConfig
from moe.model.execution import Execution
from moe.model.parameter import ParameterSpec, is_spec, specs_of, stored
from moe.model.precision import Precision
from moe.model.transformer import Transformer
from moe.planner.job import Job
from moe.train.optimizer import OptimizerConfig
from moe.train.optimizers.moments import format_of
from moe.train.state import Blueprint, TrainState, make_blueprint, optimizer_shardings
from parallel.layout import SINGLE_DEVICE, Layout


@dataclass(frozen=True)
class States:
    """Bytes of one device.

    specs: of the parameters that are trained. frozen: of those that are not, as their arrays are stored.
    parameters: both kinds, and the routers' biases.
    """

    specs: tuple[ParameterSpec, ...]
    frozen_specs: tuple[ParameterSpec, ...]
    parameters: int
    optimizer_states: int


def abstract_layout(job: Job) -> Layout:
    """The job's layout over a mesh without devices."""
    sizes = job.mesh.sizes_on
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    return Layout(mesh, job.layout)


def states_of(job: Job, layout: Layout) -> States:
    """
    Raises:
        LayoutError: a parameter does not divide over the mesh.
    """
    if job.kind != "train":
        specs, params = _served(job.model, job.precision)
        return States((), tuple(_leaves(specs)), _bytes(params, stored(params, specs, layout)), 0)
    blueprint, state = _trained(job.model, job.precision, job.optimizer, job.steps, job.lora)
    params = jax.tree.map(lambda spec: layout.stored(spec.axes, spec.shape), blueprint.specs, is_leaf=is_spec)
    opt_state = optimizer_shardings(state.opt_state, blueprint.specs, layout)
    frozen = stored(state.frozen, blueprint.frozen_specs, layout)
    balance = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.balance))
    return States(
        tuple(_leaves(blueprint.specs)),
        tuple(_leaves(blueprint.frozen_specs)),
        _bytes(state.params, params) + _bytes(state.frozen, frozen) + balance,
        _bytes(state.opt_state, opt_state),
    )


def moment_bytes(job: Job) -> float:
    """Bytes of one of Adam's two moments, scales included; the mean over the trained parameters."""
    if job.optimizer.states == "float32":
        return 4.0
    blueprint, _ = _trained(job.model, job.precision, job.optimizer, job.steps, job.lora)
    sizes = [(math.prod(spec.shape), format_of(spec, job.optimizer.states)) for spec in _leaves(blueprint.specs)]
    return sum(size * format.bytes for size, format in sizes) / sum(size for size, _ in sizes)


def numbers(sharding: Any, shape: tuple[int, ...]) -> int:
    """Of one device's part of an array."""
    return math.prod(sharding.shard_shape(shape))


def _leaves(specs: Any) -> list[ParameterSpec]:
    return jax.tree.leaves(specs, is_leaf=is_spec)


def _bytes(values: Any, shardings: Any) -> int:
    pairs = zip(jax.tree.leaves(values), jax.tree.leaves(shardings), strict=True)
    return sum(numbers(where, x.shape) * x.dtype.itemsize for x, where in pairs)


@lru_cache(maxsize=32)
def _trained(
    model: ModelConfig, precision: Precision, optimizer: OptimizerConfig, steps: int, lora: LoraConfig | None
) -> tuple[Blueprint, TrainState]:
    """The same for every layout: a search over layouts traces the model once."""
    blueprint = make_blueprint(model, precision, Execution(), optimizer, SINGLE_DEVICE, steps=steps, lora=lora)
    return blueprint, blueprint.abstract_state()


@lru_cache(maxsize=32)
def _served(model: ModelConfig, precision: Precision) -> tuple[Any, Any]:
    """Specs, and arrays in shapes."""
    whole = nnx.eval_shape(lambda: Transformer(model, precision, Execution(), rngs=nnx.Rngs(0)))
    return specs_of(whole), nnx.to_pure_dict(nnx.state(whole, nnx.Param))
