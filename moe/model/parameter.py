"""One declaration of a parameter: shape, axes, kind and initial value, from which sharding, weight decay, planning
and checkpoint names follow without any array."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from moe.model.precision import Precision
from moe.ops.grouped_matmul.in_stack import InStack
from moe.ops.quantize import Quantized, QuantizedWeight, dequantize, quantize
from parallel.layout import Layout
from parallel.made_again import made_again

Kind = Literal["embedding", "head", "norm", "attention", "router", "expert", "shared_expert", "dense", "adapter"]

QUANTIZED_KINDS: tuple[Kind, ...] = ("attention", "expert", "shared_expert", "dense")
"""What the quantized formats of `Precision.frozen` are for, and `Precision.gathered`."""


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
    if precision.quantized and kind in QUANTIZED_KINDS:
        return nnx.Param(quantized(values, axes, precision.quantized), axes=axes, kind=kind)
    gathered = precision.gathered if kind in QUANTIZED_KINDS else None
    return nnx.Param(values.astype(precision.stored_dtype), axes=axes, kind=kind, gathered=gathered)


def norm_scale(axis: str, size: int, precision: Precision) -> nnx.Param:
    """The weight of an RMSNorm: ones."""
    return nnx.Param(jnp.ones(size, precision.stored_dtype), axes=axis, kind="norm")


def quantized(values: jax.Array, axes: str, format: Quantized) -> QuantizedWeight:
    """A matrix in a quantized format; `axes` are its own, without L."""
    return quantize(values, format, summed_of(axes))


def summed_of(axes: str) -> tuple[int, ...]:
    """The places of `summed_axes`, counted from the end."""
    summed = summed_axes(axes)
    return tuple(i - len(axes) for i, letter in enumerate(axes) if letter in summed)


def summed_axes(axes: str) -> str:
    """What a product with a weight sums over: D, and where D is its output, all other axes but E."""
    return "D" if axes[-1] != "D" else axes[:-1].removeprefix("E")


def used(param: nnx.Param, dtype: DTypeLike, layout: Layout) -> Any:
    """A weight as products use it: in the compute format, and gathered; or left in its stack. What moves has the
    compute format, or that of `Precision.gathered`, or the quantized one."""
    weight, axes = param.get_value(), param.get_metadata("axes")
    if isinstance(weight, InStack):
        return weight
    if isinstance(weight, QuantizedWeight):
        return made_again(partial(dequantize, dtype=dtype))(as_kept(param, layout))
    cast = made_again(lambda weight: weight.astype(dtype))(weight)
    return layout.gather(cast, axes, param.get_metadata("gathered", None))


def as_kept(param: nnx.Param, layout: Layout) -> Any:
    """A weight gathered in the format in which it is stored."""
    return placed(param.get_value(), param.get_metadata("axes"), layout, layout.gather)


def placed(weight: Any, axes: str, layout: Layout, place: Callable[[Any, str], Any]) -> Any:
    """`place` of each array of a weight, with the letters of its axes: scales lie as their values do, but whole along
    an axis on which there are too few of them to be shared out."""
    if not isinstance(weight, QuantizedWeight):
        return place(weight, axes)
    scales = place(weight.scales, layout.divided(axes, weight.scales.shape))
    return replace(weight, values=place(weight.values, axes), scales=scales)


def stored(values: dict[str, Any], specs: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """Where parameters live at rest, like `values`, which may be abstract. On a mesh.

    Raises:
        LayoutError: a parameter does not divide over the mesh.
    """

    def where(spec: ParameterSpec, weight: Any) -> Any:
        return placed(weight, spec.axes, layout, lambda x, axes: layout.stored(axes, x.shape))

    return jax.tree.map(where, specs, values, is_leaf=lambda x: isinstance(x, ParameterSpec))


def specs_of(model: nnx.Module, which: Any = nnx.Param) -> dict[str, Any]:
    """The specs of a model's parameters (abstract or real), as nested dicts with the model's own names.

    which: of them, as `nnx.state` takes it.
    """

    def spec(param: nnx.Param) -> ParameterSpec:
        value = param.get_value()
        axes = param.get_metadata("axes")
        stacked = value.ndim > len(axes)
        return ParameterSpec(value.shape, value.dtype, "L" + axes if stacked else axes, param.get_metadata("kind"))

    state = nnx.state(model, which)
    return nnx.to_pure_dict(jax.tree.map(spec, state, is_leaf=lambda x: isinstance(x, nnx.Param)))
