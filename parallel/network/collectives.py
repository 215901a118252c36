"""The collectives that are measured, and how many bytes each sends.

The message of S bytes is the larger of a collective's input and output on one device. With P devices, each sends

| collective     | message                       | bytes sent by a device |
|---|---|---|
| all_to_all     | what it holds before and after | S · (P-1)/P           |
| all_gather     | what it holds after            | S · (P-1)/P           |
| reduce_scatter | what it holds before           | S · (P-1)/P           |
| all_reduce     | what it holds before and after | S · 2(P-1)/P          |

which is what a ring sends (Thakur et al. 2005) and the convention of nccl-tests' bus bandwidth (doc/PERFORMANCE.md).
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Collective:
    """A collective as a step that can be repeated: from S bytes on each device to S bytes that depend on all of them.

    step: on one device's part inside `jax.shard_map`, (x, axis) → x, x of P·n elements in one dimension. It asks for
        no copy of more than a P-th of x besides the collective.
    factor: bytes sent by a device, in units of S · (P-1)/P.
    """

    name: str
    step: Callable[[jax.Array, str], jax.Array]
    factor: int

    def bytes_sent(self, message_bytes: int, devices: int) -> float:
        """Bytes that one of `devices` sends to others for a message of `message_bytes`."""
        return self.factor * message_bytes * (devices - 1) / devices


def _all_to_all(x: jax.Array, axis: str) -> jax.Array:
    return jax.lax.all_to_all(x, axis, 0, 0, tiled=True)


def _all_gather(x: jax.Array, axis: str) -> jax.Array:
    # The neighbour's part: the own one, gathered again, XLA could see through.
    devices = jax.lax.axis_size(axis)
    size = x.shape[0] // devices
    neighbour = (jax.lax.axis_index(axis) + 1) % devices
    return jax.lax.all_gather(jax.lax.dynamic_slice(x, (neighbour * size,), (size,)), axis, tiled=True)


def _reduce_scatter(x: jax.Array, axis: str) -> jax.Array:
    return jax.lax.dynamic_update_slice(x, jax.lax.psum_scatter(x, axis, tiled=True), (0,))


def _all_reduce(x: jax.Array, axis: str) -> jax.Array:
    return jax.lax.psum(x, axis)


COLLECTIVES = {
    collective.name: collective
    for collective in (
        Collective("all_to_all", _all_to_all, 1),
        Collective("all_gather", _all_gather, 1),
        Collective("reduce_scatter", _reduce_scatter, 1),
        Collective("all_reduce", _all_reduce, 2),
    )
}
