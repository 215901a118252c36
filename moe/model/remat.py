"""What the backward pass recomputes instead of keeping: named policies over one group of layers."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe.model.config import ConfigError
from moe.ops.bits import as_bits, from_bits
from moe.ops.matmul import PRODUCT
from moe.ops.quantize import dequantize_rows, quantize_rows
from parallel.layout import HOST_MEMORY
from parallel.made_again import MADE_AGAIN
from parallel.platform import platform


def rematerialise(layers: Callable, policy: str, *, barrier: bool) -> Callable:
    """Wraps the function of one scanned group.

    "none": the result of every computation is kept; most memory. Not so the weights as products take them: they are
        cast, gathered or widened again, as each device would keep those of all layers whole.
    "matmuls": outputs of the matrix products with weights are kept, the rest is computed again.
    "matmuls_on_host": as "matmuls", and what is kept waits in the host's memory.
    "matmuls_fp8": as "matmuls", and what is kept in bfloat16 is kept as e4m3 with a scale for each vector: half the
        bytes. The forward pass is exact; the backward pass computes with rounded values (COAT, arXiv 2410.19313, §5).
    "full": only the group's input is kept, its forward pass runs twice.

    Args:
        barrier: between forward and backward pass, so that XLA does not compute once what both compute. Before one a
            device's part of the weights waits as a float32 copy to be cast behind it.
    """
    checkpoint = partial(jax.checkpoint, prevent_cse=barrier)
    if policy == "none":
        return _kept_as_bits(checkpoint(layers, policy=_computes))
    if policy == "full":
        return _kept_as_bits(checkpoint(layers))
    policies = jax.checkpoint_policies
    if policy in ("matmuls", "matmuls_fp8"):
        saved = _with_rounded(policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(PRODUCT))
        layers = checkpoint(layers, policy=saved)
        return _kept_as_bits(layers) if policy == "matmuls" else _kept(layers, _to_fp8, _from_fp8)
    if policy == "matmuls_on_host":
        offload = _with_rounded(
            policies.offload_dot_with_no_batch_dims("device", HOST_MEMORY),
            policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[PRODUCT],
                offload_src="device",
                offload_dst=HOST_MEMORY,
            ),
        )
        return checkpoint(layers, policy=offload)
    raise ConfigError(f"execution.remat={policy!r}: give 'none', 'matmuls', 'matmuls_fp8', 'matmuls_on_host' or 'full'")


def _computes(primitive, *operands, **parameters) -> bool:
    """A checkpoint's policy: whether an operation's result is kept, and not rather made again of what is.

    What only moves numbers is not kept, nor a cast to a wider format. Nor is fp8, but its bits are (`rounded` of
    moe/ops/scaled/quantize.py): JAX rounds what a checkpoint keeps to the format it has (`_insert_reduce_precision` of
    jax/_src/ad_checkpoint.py), and takes e4m3fn to have infinities, so that 256 to 448, its last binade, would come
    back as nan.
    """
    if primitive.name == "convert_element_type":
        if parameters["new_dtype"] in (jnp.float8_e4m3fn, jnp.float8_e5m2):
            return False
        return jnp.dtype(parameters["new_dtype"]).itemsize <= operands[0].dtype.itemsize
    if primitive.name == "bitcast_convert_type":
        return parameters["new_dtype"] == jnp.uint8
    return primitive.name not in (MADE_AGAIN, "sharding_constraint", "reshape", "transpose")


def _with_rounded(of_dots: Callable, of_names: Callable) -> Callable:
    """Of a product with a wider sum the result is kept, which has the compute format, and not the sum before it."""

    def policy(primitive, *operands, **parameters):
        if primitive.name == "name":
            return of_names(primitive, *operands, **parameters)
        if primitive.name == "dot_general":
            summed = parameters["preferred_element_type"] or operands[0].dtype
            if all(x.dtype.itemsize < jnp.dtype(summed).itemsize for x in operands):
                return False
        return of_dots(primitive, *operands, **parameters)

    return policy


def _kept(layers: Callable, pack: Callable[[jax.Array], Any], unpack: Callable[[Any], jax.Array]) -> Callable:
    """The function of a scanned group, of two arguments, which keeps `pack` of what it would keep.

    Arguments, the weights among them, are kept as they are.
    """

    def change(pullback: Any, how: Callable[[Any], Any]) -> Any:
        return replace(pullback, opaque_residuals=[how(x) for x in pullback.opaque_residuals])

    def forward(carry: Any, of_group: Any):
        made, pullback = jax.vjp(layers, carry, of_group)
        return made, change(pullback, pack)

    kept = jax.custom_vjp(layers)
    kept.defvjp(forward, lambda pullback, gradient: change(pullback, unpack)(gradient))
    return kept


def _kept_as_bits(layers: Callable) -> Callable:
    """On CPU, where a loop would widen all layers' values to write one layer's (moe/ops/bits.py)."""
    if platform() != "cpu":
        return layers
    return _kept(layers, as_bits, lambda x: from_bits(x, jnp.bfloat16))


class _InFp8(NamedTuple):
    """values: e4m3. scales: f32, one for each vector along the last axis."""

    values: jax.Array
    scales: jax.Array


def _to_fp8(x: jax.Array) -> Any:
    """bfloat16 scaled so that the largest of each vector becomes e4m3's largest; anything else as it is. What is
    float32, such as the router's logits, is not rounded: the backward pass would go through other experts."""
    return _InFp8(*quantize_rows(x, "fp8")) if x.dtype == jnp.bfloat16 and x.ndim else x


def _from_fp8(kept: Any) -> jax.Array:
    return dequantize_rows(*kept, jnp.bfloat16) if isinstance(kept, _InFp8) else kept
