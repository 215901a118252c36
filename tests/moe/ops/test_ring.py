"""Ring attention against attention on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.ops.attention import attention
from moe.ops.attention.ring import from_zigzag, ring_attention, to_zigzag
from parallel.layout import Layout, LayoutConfig
from parallel.mesh import MeshConfig, make_mesh
from tests.closeness import assert_trees_equal_to_scale

P = 4
LAYOUT = Layout(make_mesh(MeshConfig(sequence=P)), LayoutConfig(sequence="ring"))


def on_ring(function, *axes: str, out: str):
    """`function` on each device's part of sequences."""
    specs = tuple(LAYOUT.activation_spec(each) for each in axes)
    return jax.jit(
        jax.shard_map(
            function, mesh=LAYOUT.mesh, in_specs=specs, out_specs=LAYOUT.activation_spec(out), check_vma=False
        )
    )


def inputs(length: int, heads: int = 4, kv_heads: int = 2):
    r = np.random.default_rng(0)
    shapes = (2, length, heads, 8), (2, length, kv_heads, 8), (2, length, kv_heads, 8)
    q, k, v = (r.normal(size=shape).astype(np.float32) for shape in shapes)
    ends_B3 = np.array([[0.1, 0.7, 1.0], [0.4, 0.5, 0.9]]) * length
    # Three documents in the first row; in the second, two, another one and padding.
    segments_BT = 1 + (np.arange(length)[None, :, None] >= ends_B3[:, None, :]).sum(-1)
    return q, k, v, np.where(segments_BT == 4, 0, segments_BT).astype(np.int32)


# The longer sequences have several blocks in a chunk, and end within one.
@pytest.mark.parametrize("length", [2 * P, 2 * P * 300])
def test_gives_what_one_device_gives(length):
    q, k, v, segments = inputs(length, *((4, 2) if length < 100 else (1, 1)))
    weights = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    ring = on_ring(functools.partial(ring_attention, axis="sequence"), "BTNH", "BTMH", "BTMH", "BT", out="BTNH")
    alone = functools.partial(attention, segments_BT=segments, segments_BS=segments, backend="dense")

    def told(attend, *arrays):
        y, pull = jax.vjp(attend, *arrays)
        return y, pull(weights)

    found = told(lambda q, k, v: ring(q, k, v, segments), q, k, v)
    assert_trees_equal_to_scale(found, told(lambda q, k, v: alone(q, k, v), q, k, v))
    assert np.abs(np.asarray(found[0])[segments == 0]).max(initial=0) == 0


def test_bf16_within_its_rounding():
    q, k, v, segments = inputs(4 * P)
    ring = on_ring(functools.partial(ring_attention, axis="sequence"), "BTNH", "BTMH", "BTMH", "BT", out="BTNH")
    y = ring(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), segments)
    assert y.dtype == jnp.bfloat16
    assert_trees_equal_to_scale(y, attention(q, k, v, segments_BT=segments, segments_BS=segments), tolerance=2e-2)


def test_each_device_computes_with_an_early_and_a_late_chunk():
    x_BT = np.arange(2 * P)[None]
    zigzag = on_ring(functools.partial(to_zigzag, axis="sequence"), "BT", out="BT")(x_BT)
    np.testing.assert_array_equal(np.asarray(zigzag).reshape(P, 2), [(p, 2 * P - 1 - p) for p in range(P)])
    back = on_ring(functools.partial(from_zigzag, axis="sequence"), "BT", out="BT")(zigzag)
    np.testing.assert_array_equal(back, x_BT)


def test_a_part_that_cannot_be_halved():
    q, k, v, segments = inputs(3 * P)
    ring = on_ring(functools.partial(ring_attention, axis="sequence"), "BTNH", "BTMH", "BTMH", "BT", out="BTNH")
    with pytest.raises(ValueError, match=r"over sequence=4: each device has 3 positions.*a multiple of 8"):
        ring(q, k, v, segments)
