"""One declaration of a parameter: shape, axes, kind and initial value, from which sharding, weight decay, planning
and checkpoint names follow without any array."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe.model.precision import Precision

Kind = Literal["embedding", "head", "norm", "attention", "router", "expert", "shared_expert", "dense"]


class ParameterSpec(NamedTuple):
    """What is known of a parameter before it has values. `axes` has a letter per axis, L first where layers stack."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: str
    kind: Kind


def is_spec(x: Any) -> bool:
    """For `is_leaf`: whether x is one parameter's spec."""
    return isinstance(x, ParameterSpec)


class SelectionBias(nnx.Variable):
    """b_E f32: added to the router's scores when experts are chosen, and moved by balancing instead of gradients."""


def matrix(
    axes: str, sizes: tuple[int, ...], kind: Kind, std: float, precision: Precision, rngs: nnx.Rngs
) -> nnx.Param:
    """A weight drawn from a normal distribution of mean 0 (released code, HunYuanPreTrainedModel._init_weights)."""
    assert len(axes) == len(sizes)
    values = std * jax.random.normal(rngs.params(), sizes, jnp.float32)
    return nnx.Param(values.astype(precision.parameters), axes=axes, kind=kind)


def norm_scale(axis: str, size: int, precision: Precision) -> nnx.Param:
    """The weight of an RMSNorm: ones."""
    return nnx.Param(jnp.ones(size, precision.parameters), axes=axis, kind="norm")


def specs_of(model: nnx.Module) -> dict[str, Any]:
    """The specs of a model's parameters (abstract or real), as nested dicts with the model's own names."""

    def spec(param: nnx.Param) -> ParameterSpec:
        value = param.get_value()
        axes = param.get_metadata("axes")
        stacked = value.ndim > len(axes)
        return ParameterSpec(value.shape, value.dtype, "L" + axes if stacked else axes, param.get_metadata("kind"))

    state = nnx.state(model, nnx.Param)
    return nnx.to_pure_dict(jax.tree.map(spec, state, is_leaf=lambda x: isinstance(x, nnx.Param)))
