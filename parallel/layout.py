"""The one table from array axes to mesh axes. No PartitionSpec literal stands anywhere else.

Axes are the letters of the alphabet in WORKSPACE.md. An activation such as x_BTD is split over its batch; a weight
such as w_DNH is split over its width D for storage (FSDP) and gathered for use; the experts' weights w_EDF live where
their experts do, and are split over D by what is left of the FSDP axes. So attention and experts use the same devices
differently: for attention `expert` is one more FSDP axis.
"""

import math
from dataclasses import dataclass

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BATCH_AXES = ("replica", "data", "expert")
FSDP_AXES = ("data", "expert")
EXPERT_AXIS = "expert"


class LayoutError(ValueError):
    """An array that does not divide over the mesh: names the axis, the sizes, and what would work."""


@dataclass(frozen=True)
class Layout:
    """Where arrays live on `mesh`; without a mesh everything is on one device and each method is the identity."""

    mesh: Mesh | None = None

    @property
    def expert_parallelism(self) -> int:
        """Devices over which the experts are shared out."""
        return self.mesh.shape[EXPERT_AXIS] if self.mesh else 1

    @property
    def batch_shards(self) -> int:
        """Parts into which the batch is split."""
        return math.prod(self.mesh.shape[axis] for axis in BATCH_AXES) if self.mesh else 1

    def activation_spec(self, axes: str) -> PartitionSpec:
        """x_BTD and its kin: split over the batch B (or flat tokens A), whole otherwise."""
        return PartitionSpec(*(BATCH_AXES if letter in "BA" else None for letter in axes))

    def stored_spec(self, axes: str) -> PartitionSpec:
        """A weight at rest. Vectors stay whole: splitting them saves nothing and costs a gather each."""
        matrix = axes.removeprefix("L")
        if len(matrix) < 2:
            return self.whole_spec
        by_expert = matrix.startswith("E")
        width = tuple(axis for axis in FSDP_AXES if not (by_expert and axis == EXPERT_AXIS))
        where = {"E": EXPERT_AXIS if by_expert else None, "D": width}
        return PartitionSpec(*(where.get(letter) for letter in axes))

    def used_spec(self, axes: str) -> PartitionSpec:
        """A weight in use: gathered, except that experts stay where they live.

        E leads in the experts' own weights; in the router's w_DE it is an output width like any other.
        """
        return PartitionSpec(EXPERT_AXIS) if axes.startswith("E") else PartitionSpec()

    def stored(self, axes: str, shape: tuple[int, ...]) -> NamedSharding | None:
        """The sharding of a weight at rest.

        Raises:
            LayoutError: a size does not divide over its mesh axes.
        """
        if self.mesh is None:
            return None
        spec = self.stored_spec(axes)
        self._check(axes, shape, spec)
        return NamedSharding(self.mesh, spec)

    def activation(self, axes: str) -> NamedSharding | None:
        return NamedSharding(self.mesh, self.activation_spec(axes)) if self.mesh else None

    def whole(self) -> NamedSharding | None:
        """On every device."""
        return NamedSharding(self.mesh, self.whole_spec) if self.mesh else None

    def each_device(self) -> NamedSharding | None:
        """One element a device, in the mesh's order."""
        return NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names)) if self.mesh else None

    def batch_share(self, batch_size: int) -> tuple[int, int]:
        """(index, count): this process's devices hold part `index` of a batch that is cut into `count` equal parts.

        Processes whose devices split something else than the batch hold the same part.
        """
        sharding = self.activation("B")
        if sharding is None:
            return 0, 1
        devices = sharding.addressable_devices_indices_map((batch_size,)).values()
        held = [part.indices(batch_size) for index in devices for part in index or ()]
        first, end = min(start for start, _, _ in held), max(stop for _, stop, _ in held)
        size = end - first
        if batch_size % size or first % size:
            raise LayoutError(
                f"rows {first} to {end - 1} of {batch_size} fall to one process, which is no equal part of the batch: "
                "give each process the same number of devices, and a mesh whose sizes divide over the processes"
            )
        return first // size, batch_size // size

    @property
    def whole_spec(self) -> PartitionSpec:
        return PartitionSpec()

    def constrain(self, x: jax.Array, axes: str) -> jax.Array:
        """States where an activation lives."""
        return jax.lax.with_sharding_constraint(x, self.activation(axes)) if self.mesh else x

    def gather(self, weight: jax.Array, axes: str) -> jax.Array:
        """A weight as it is used. Cast it first: the gather then moves bytes of the compute format."""
        if self.mesh is None:
            return weight
        return jax.lax.with_sharding_constraint(weight, NamedSharding(self.mesh, self.used_spec(axes)))

    def sum_over_batch(self, x: jax.Array) -> jax.Array:
        """Inside `jax.shard_map`: the sum over all parts of the batch, on every device."""
        return jax.lax.psum(x, BATCH_AXES) if self.mesh else x

    def sum_to_stored(self, gradient: jax.Array, axes: str) -> jax.Array:
        """Inside `jax.shard_map`: a weight's gradient summed over all parts of the batch, each device keeping the part
        that it stores. For weights that are used whole."""
        if self.mesh is None:
            return gradient
        gradient = jax.lax.psum(gradient, "replica")
        return jax.lax.psum_scatter(gradient, FSDP_AXES, scatter_dimension=axes.index("D"), tiled=True)

    def _check(self, axes: str, shape: tuple[int, ...], spec: PartitionSpec) -> None:
        assert self.mesh is not None
        for letter, size, mesh_axes in zip(axes, shape, spec, strict=False):
            names = () if mesh_axes is None else (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
            parts = math.prod(self.mesh.shape[name] for name in names)
            if size % parts:
                over = " x ".join(f"{name}={self.mesh.shape[name]}" for name in names)
                raise LayoutError(
                    f"axis {letter} of w_{axes} has size {size}, which does not divide over {over} = {parts}: "
                    f"make it a multiple of {parts}, or use a mesh of {_at_most(size, parts)} along these axes"
                )


def _at_most(size: int, limit: int) -> str:
    fitting = [n for n in range(1, limit) if size % n == 0]
    return " or ".join(str(n) for n in fitting)


SINGLE_DEVICE = Layout()
