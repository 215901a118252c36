"""Which devices exchange rows with one another in one step, which of them share a node, and bytes by that border."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

Axis = str | tuple[str, ...]
"""One mesh axis, or several as one, the last varying fastest."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Traffic:
    """What one device sends to others: to those of its own node (NVLink, PCIe) and to those of other nodes (NICs).

    Rows or bytes, f32. What a device keeps for itself is not counted.
    """

    inside: jax.Array
    across: jax.Array

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.inside + other.inside, self.across + other.across)

    def __mul__(self, factor: int) -> "Traffic":
        return Traffic(self.inside * factor, self.across * factor)


@dataclass(frozen=True)
class Group:
    """Devices that exchange rows in one step. Many groups of one size do so at the same time.

    axis: the mesh axis along which they lie.
    size: members.
    near: members of one node; they are consecutive.
    index_groups: the groups as indices along `axis`; None where all devices of the axis are one group.
    """

    axis: Axis
    size: int
    near: int
    index_groups: tuple[tuple[int, ...], ...] | None = None

    def position(self) -> jax.Array:
        """Inside `jax.shard_map`: this device's place in its group. i32[]."""
        index = jax.lax.axis_index(self.axis)
        if self.index_groups is None:
            return index
        places = {index: place for group in self.index_groups for place, index in enumerate(group)}
        return jnp.array([places[i] for i in range(len(places))], jnp.int32)[index]

    def told(self, counts_E: jax.Array) -> jax.Array:
        """Inside `jax.shard_map`: counts_PE of all members, by an all-to-all. An all-gather XLA takes a turn ahead of a
        loop, where it does so with weights, and computes a second time what the counts come from, attention with it."""
        return self.all_to_all(jnp.broadcast_to(counts_E, (self.size, counts_E.size)))

    def all_to_all(self, x_P: jax.Array) -> jax.Array:
        """Inside `jax.shard_map`: of each member, what it has at this device's place along the first axis."""
        return jax.lax.all_to_all(x_P, self.axis, 0, 0, axis_index_groups=self.index_groups)

    def traffic(self, amounts_P: jax.Array) -> Traffic:
        """What this device sends, given the amount for each member of its group."""
        members_P, me = jnp.arange(self.size), self.position()
        near_P = members_P // self.near == me // self.near
        amounts_P = jnp.asarray(amounts_P, jnp.float32)
        inside = jnp.where(near_P & (members_P != me), amounts_P, 0).sum()
        return Traffic(inside, jnp.where(near_P, 0, amounts_P).sum())

    def evenly(self, amount: int) -> Traffic:
        """What this device sends, where each other member gets `amount`."""
        near = self.near - 1
        return Traffic(jnp.float32(near * amount), jnp.float32((self.size - 1 - near) * amount))


def whole(axis: Axis, num_devices: int, node_size: int) -> Group:
    """All devices of the axis; each `node_size` consecutive ones share a node."""
    return Group(axis, num_devices, node_size)


def inside_node(axis: Axis, num_devices: int, node_size: int) -> Group:
    """The devices of one node."""
    nodes = range(0, num_devices, node_size)
    return Group(axis, node_size, node_size, tuple(tuple(range(n, n + node_size)) for n in nodes))


def along_rail(axis: Axis, num_devices: int, node_size: int) -> Group:
    """The devices that hold the same place in each node."""
    rails = tuple(tuple(range(place, num_devices, node_size)) for place in range(node_size))
    return Group(axis, num_devices // node_size, 1, rails)


def node_size(mesh: Mesh | AbstractMesh, axis: Axis, devices_per_node: int) -> int:
    """How many consecutive devices along `axis` share a node: the most for which it holds all over the mesh.

    Args:
        devices_per_node: the mesh's devices, in its order, fill the nodes one after the other.
    """
    axes = (axis,) if isinstance(axis, str) else axis
    nodes = np.arange(mesh.size).reshape(mesh.axis_sizes) // devices_per_node
    last = range(nodes.ndim - len(axes), nodes.ndim)
    size = math.prod(mesh.shape[name] for name in axes)
    lines_P = np.moveaxis(nodes, [mesh.axis_names.index(name) for name in axes], last).reshape(-1, size)
    fitting = [n for n in range(1, size + 1) if size % n == 0 and _same(lines_P.reshape(-1, n))]
    return max(fitting)


def _same(rows: np.ndarray) -> bool:
    return bool((rows == rows[:, :1]).all())
