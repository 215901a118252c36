"""The one table from array axes to mesh axes. No PartitionSpec literal stands anywhere else.

Axes are the letters of the alphabet in WORKSPACE.md. What is split over which mesh axes:

| array | split |
|---|---|
| tokens_BT | batch B over replica x data x expert, positions T over sequence |
| x_BTD, logits_BTE, weights_BTK | the same, but T over sequence x tensor (arXiv 2205.05198) |
| q_BTNH, h_BTF, logits_BTV | as tokens; heads N and M, width F, vocabulary V over tensor (arXiv 1909.08053) |
| q_BSNH, k_BSMH, logits_BSE | whole sequences S; N and M over tensor, and where heads are exchanged over sequence too |
| w_DNH, w_DF, w_VD, … | N, M, F, V over tensor; for storage, D over data x expert x sequence (FSDP), gathered for use |
| stacked layers w_L… | L over stage, which else is one more FSDP axis |
| experts w_EDF | E over `experts`; F over tensor where `experts` leaves it; for storage, D over the FSDP axes left |

So attention and experts use the same devices differently: for attention `expert` is one more FSDP axis. Key-value heads
are never copied: there must be as many as devices that share them out.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from parallel.blocks import EightBit
from parallel.gather import in_8_bits, join, with_gradient
from parallel.mesh import MeshConfig

BATCH_AXES = ("replica", "data", "expert")
FSDP_AXES = ("data", "expert", "sequence", "stage")
STAGE_AXIS = "stage"
SEQUENCE_AXIS = "sequence"
TENSOR_AXIS = "tensor"
TENSOR_LETTERS = "NMFV"
"""Axes of a product that `tensor` splits."""

HOST_MEMORY = "pinned_host"
"""JAX's name for the memory of a device's host that the device copies from and to by itself."""


class LayoutError(ValueError):
    """An array that does not divide over the mesh: names the axis, the sizes, and what would work."""


@dataclass(frozen=True)
class LayoutConfig:
    """How a mesh's axes are used.

    experts: mesh axes over whose product the routed experts are shared out, outermost first. With "tensor" among them
        an expert is whole on one device; otherwise its width is split over `tensor`.
    zero: what `data`, `expert` and `sequence` share out of the parameters that they hold in common (ZeRO, arXiv
        1910.02054): 1 the optimizer's states, 2 the gradients as well, 3 the parameters as well (FSDP). `replica` holds
        copies.
    sequence: how attention sees the sequences that `sequence` splits. "heads": an all-to-all gives each device whole
        sequences of some heads (Ulysses, arXiv 2309.14509). "ring": keys and values travel from device to device, and
        heads need not divide (moe/ops/attention/ring.py).
    optimizer_states, gradients: where these wait for the update: in the devices' memory, or in their hosts', whence it
        fetches one layer after the other (with mesh.stage above 1: all at once). Only the layers' gradients go there.
    """

    experts: tuple[str, ...] = ("expert",)
    zero: Literal[1, 2, 3] = 3
    sequence: Literal["heads", "ring"] = "heads"
    optimizer_states: Literal["device", "host"] = "device"
    gradients: Literal["device", "host"] = "device"

    def __post_init__(self) -> None:
        known = tuple(MeshConfig().sizes)
        unknown = [axis for axis in self.experts if axis not in known]
        if unknown or len(set(self.experts)) < len(self.experts):
            raise LayoutError(f"layout.experts={','.join(self.experts)}: give each once, of {', '.join(known)}")
        if STAGE_AXIS in self.experts:
            raise LayoutError(
                f"layout.experts={','.join(self.experts)}: a stage has layers of its own, and all of their experts; "
                "give other axes"
            )
        if self.zero not in (1, 2, 3):
            raise LayoutError(
                f"layout.zero={self.zero!r}: give 1 (optimizer states), 2 (and gradients) or 3 (and parameters); "
                "for copies of everything move devices from mesh.data to mesh.replica"
            )

    @property
    def on_host(self) -> tuple[str, ...]:
        """The settings that have something wait in the hosts' memory."""
        return tuple(name for name in ("optimizer_states", "gradients") if getattr(self, name) == "host")

    @property
    def splits_width(self) -> bool:
        """Whether `tensor` splits the experts' width F instead of sharing out whole experts."""
        return TENSOR_AXIS not in self.experts


@dataclass(frozen=True)
class Layout:
    """Where arrays live on `mesh`; without a mesh everything is on one device and each method is the identity.

    An axis that the mesh lacks counts as 1. splits: the mesh axes that split sequences; see `for_length`.
    """

    mesh: Mesh | AbstractMesh | None = None
    config: LayoutConfig = LayoutConfig()
    splits: tuple[str, ...] = (SEQUENCE_AXIS, TENSOR_AXIS)

    def __post_init__(self) -> None:
        # A mesh without devices may be lowered for.
        if self.config.on_host and isinstance(self.mesh, Mesh):
            device = self.mesh.devices.flat[0]
            memories = [memory.kind for memory in device.addressable_memories()]
            # Of a GPU that is only described, to compile for, JAX knows no memory at all.
            if memories and HOST_MEMORY not in memories:
                known = ", ".join(memories)
                raise LayoutError(
                    f"layout.{self.config.on_host[0]}='host' needs {HOST_MEMORY} memory, and the memories of these "
                    f"{device.platform} devices are {known}; set 'device'"
                )

    @property
    def expert_axes(self) -> tuple[str, ...]:
        """Mesh axes over whose product the experts are shared out."""
        return self._present(self.config.experts)

    @property
    def expert_parallelism(self) -> int:
        """Devices over which the experts are shared out."""
        return self._size(self.config.experts)

    @property
    def rings(self) -> bool:
        """Whether attention goes round the devices of `sequence`."""
        return self.config.sequence == "ring" and SEQUENCE_AXIS in self.splits and self._size([SEQUENCE_AXIS]) > 1

    @property
    def stages(self) -> int:
        """Devices that share out the layers."""
        return self._size([STAGE_AXIS])

    @property
    def length_shards(self) -> int:
        """Parts into which sequences are split between products."""
        return self._size(self.splits)

    @property
    def batch_shards(self) -> int:
        """Parts into which the batch is split."""
        return self._size(BATCH_AXES)

    def for_length(self, length: int) -> "Layout":
        """For sequences of `length`: those that do not divide over sequence x tensor, such as a decoding step's one
        token, stay whole on each device of these axes, which then repeat the work between the products."""
        whole = (SEQUENCE_AXIS, TENSOR_AXIS)
        return replace(self, splits=next((axes for axes in (whole, whole[:1]) if length % self._size(axes) == 0), ()))

    def refuse_stages(self, work: str) -> None:
        """
        Raises:
            LayoutError: the layers are shared out, and `work` would have every stage do all of it.
        """
        if self.stages > 1:
            raise LayoutError(
                f"{work} over mesh.stage={self.stages}: only training goes through stages; "
                "use these devices along mesh.tensor, mesh.expert or mesh.data"
            )

    def on_each_stage(self) -> "Layout":
        """Inside `jax.shard_map` over `stage` alone: the layout over the other axes."""
        return replace(self, mesh=jax.sharding.get_abstract_mesh())

    def shard_map(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """`jax.shard_map` over all axes, or inside another one over those that it leaves."""
        assert self.mesh is not None, "one device needs no shard_map"
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(self._present(self.mesh.shape)),
            # The checker cannot follow what a device does with its rows; the equality tests stand in for it.
            check_vma=False,
        )

    def activation_spec(self, axes: str) -> PartitionSpec:
        """By the table above."""
        splits = dict.fromkeys(TENSOR_LETTERS, self._tensor) | dict.fromkeys("BA", self._present(BATCH_AXES))
        between_products = not set("DEK").isdisjoint(axes)
        splits["T"] = self._present(self.splits if between_products else self.splits[:1])
        if "S" in axes and self.config.sequence == "heads":
            splits |= dict.fromkeys("NM", self._present([TENSOR_AXIS, SEQUENCE_AXIS]))
        return PartitionSpec(*(splits.get(letter) or None for letter in axes))

    def used_spec(self, axes: str) -> PartitionSpec:
        """A weight in use: gathered over the FSDP axes, except that experts stay where they live."""
        return self._weight_spec(axes, 0, fsdp=False)

    def sharded_spec(self, axes: str, layers: int = 0) -> PartitionSpec:
        """A weight shared out as finely as it is. layers: the size of L, where axes begin with it."""
        return self._weight_spec(axes, layers, fsdp=True)

    def stored_spec(self, axes: str, layers: int = 0) -> PartitionSpec:
        """A weight at rest."""
        return self._weight_spec(axes, layers, fsdp=self.config.zero == 3)

    def gradient_spec(self, axes: str, layers: int = 0) -> PartitionSpec:
        """A weight's gradient once it is summed."""
        return self._weight_spec(axes, layers, fsdp=self.config.zero >= 2)

    def stored(self, axes: str, shape: tuple[int, ...]) -> NamedSharding | None:
        """The sharding of a weight at rest.

        Raises:
            LayoutError: a size does not divide over its mesh axes.
        """
        return self._checked(axes, shape, self.stored_spec(axes, shape[0]))

    def divided(self, axes: str, shape: tuple[int, ...]) -> str:
        """`axes` for an array of another shape, with "_", which stays whole, where that does not divide."""
        parts = [self._size(split or ()) for split in self.sharded_spec(axes, shape[0])]
        return "".join("_" if size % n else letter for letter, size, n in zip(axes, shape, parts, strict=True))

    def optimizer_state(self, axes: str, shape: tuple[int, ...]) -> NamedSharding | None:
        """The sharding of what the optimizer keeps for a weight. Raises as `stored`."""
        sharding = self._checked(axes, shape, self.sharded_spec(axes, shape[0]))
        if sharding is None or self.config.optimizer_states == "device":
            return sharding
        return sharding.with_memory_kind(HOST_MEMORY)

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
        return self._constrain(x, self.activation_spec(axes))

    def gather(self, weight: jax.Array, axes: str, format: EightBit | None = None) -> jax.Array:
        """A weight as it is used. Cast it first: the gather then moves bytes of the compute format, or those of
        `format`, to which it rounds."""
        if (mesh := self.mesh) is None:
            return weight
        stored, used, place = self.stored_spec(axes), self.used_spec(axes), axes.find("D")
        gathered = partial(join, place=place, sizes=mesh.shape, stored=stored, used=used, constrain=self._constrain)
        if format and (parts := self._size(stored[place] or ())) > 1:
            gathered = partial(in_8_bits, place=place, parts=parts, format=format, join=gathered)
        return with_gradient(gathered, lambda g: self.constrain_gradient(self._constrain(g, used), axes))(weight)

    def constrain_gradient(self, gradient: jax.Array, axes: str) -> jax.Array:
        """States where a weight's gradient lives."""
        return self._constrain(gradient, self.gradient_spec(axes, gradient.shape[0]))

    def shard(self, weight: jax.Array, axes: str) -> jax.Array:
        """A weight, or its gradient, shared out as the optimizer's states are."""
        return self._constrain(weight, self.sharded_spec(axes, weight.shape[0]))

    def sum_over_batch(self, x: jax.Array) -> jax.Array:
        """Inside `jax.shard_map`: the sum over all parts of the batch and its sequences, on every device."""
        return jax.lax.psum(x, self._token_axes) if self.mesh else x

    def mean_over_devices(self, x: Any) -> Any:
        """Inside `shard_map`: the mean over its devices of each array of a tree, on every one of them."""
        return jax.lax.pmean(x, self._present(self.mesh.shape)) if self.mesh else x

    def sum_to_gradient(self, gradient: jax.Array, axes: str) -> jax.Array:
        """Inside `jax.shard_map`: a weight's gradient summed as by `sum_over_batch`, each device keeping the part that
        `gradient_spec` gives it. For weights that are used whole."""
        if self.config.zero < 2:
            return self.sum_over_batch(gradient)
        fsdp = self._present(FSDP_AXES)
        if fsdp:
            gradient = jax.lax.psum_scatter(gradient, fsdp, scatter_dimension=axes.index("D"), tiled=True)
        # The copies then sum their own parts alone.
        copies = tuple(axis for axis in self._token_axes if axis not in fsdp)
        return jax.lax.psum(gradient, copies) if copies else gradient

    def sum_over_tensor(self, x: jax.Array) -> jax.Array:
        """Inside `jax.shard_map`: the sum over `tensor`, on each of its devices."""
        return jax.lax.psum(x, self._tensor) if self._tensor else x

    def max_over_tensor(self, x: jax.Array) -> jax.Array:
        """Inside `jax.shard_map`: the largest over `tensor`, on each of its devices."""
        return jax.lax.pmax(x, self._tensor) if self._tensor else x

    def first_over(self, axes: Iterable[str], size: int) -> jax.Array | int:
        """Inside `jax.shard_map`: where this device's `size` entries of what is split over mesh axes begin."""
        present = self._present(axes)
        return size * jax.lax.axis_index(present) if present else 0

    def gather_sequence(self, x_BTD: jax.Array) -> jax.Array:
        """Inside `jax.shard_map`: the residual stream of all devices of `tensor`."""
        if not (self._tensor and TENSOR_AXIS in self.splits):
            return x_BTD
        return jax.lax.all_gather(x_BTD, self._tensor, axis=1, tiled=True)

    def sum_to_sequence(self, x_BTD: jax.Array) -> jax.Array:
        """Inside `jax.shard_map`: the sum over `tensor`, each device keeping its part of the residual stream."""
        if not (self._tensor and TENSOR_AXIS in self.splits):
            return self.sum_over_tensor(x_BTD)
        return jax.lax.psum_scatter(x_BTD, self._tensor, scatter_dimension=1, tiled=True)

    def tokens_length(self, length: int, *, gathered: bool) -> int:
        """Of one device's part of sequences of `length`, after `gather_sequence` or before."""
        return length // self._size(self.splits[:1] if gathered else self.splits)

    @property
    def _token_axes(self) -> tuple[str, ...]:
        """Axes whose devices have tokens of their own."""
        if SEQUENCE_AXIS not in self.splits:
            parts = self._size([SEQUENCE_AXIS])
            raise LayoutError(
                f"sequences do not divide over {SEQUENCE_AXIS}={parts}: pad them to a multiple of {parts}"
            )
        return self._present([*BATCH_AXES, SEQUENCE_AXIS])

    @property
    def _tensor(self) -> tuple[str, ...]:
        return self._present([TENSOR_AXIS])

    def _weight_spec(self, axes: str, layers: int, *, fsdp: bool) -> PartitionSpec:
        """Layers go to stages where they divide. Vectors stay whole otherwise: splitting them saves nothing and costs a
        gather each. E leads in the experts' own weights; in the router's w_DE it is an output width like any other."""
        matrix = axes.removeprefix("L")
        staged = self._present([STAGE_AXIS]) if layers and matrix != axes and layers % self.stages == 0 else ()
        if len(matrix) < 2:
            return PartitionSpec(staged) if staged else self.whole_spec
        splits = dict.fromkeys(TENSOR_LETTERS, self._tensor) | {"L": staged}
        width = tuple(axis for axis in self._present(FSDP_AXES) if axis not in staged) if fsdp else ()
        if matrix.startswith("E"):
            splits["E"] = self.expert_axes
            width = tuple(axis for axis in width if axis not in self.expert_axes)
            if not self.config.splits_width:
                del splits["F"]
        splits["D"] = width
        return PartitionSpec(*(splits.get(letter) or None for letter in axes))

    def _present(self, axes: Iterable[str]) -> tuple[str, ...]:
        if self.mesh is None:
            return ()
        # Of an outer shard_map's axes this device has one part, and nothing further is split over them.
        outer = self.mesh.abstract_mesh.manual_axes
        return tuple(axis for axis in axes if axis in self.mesh.shape and axis not in outer)

    def _size(self, axes: Iterable[str]) -> int:
        axes = (axes,) if isinstance(axes, str) else axes
        return math.prod(self.mesh.shape[axis] for axis in self._present(axes)) if self.mesh else 1

    def _constrain(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec)) if self.mesh else x

    def _checked(self, axes: str, shape: tuple[int, ...], spec: PartitionSpec) -> NamedSharding | None:
        if self.mesh is None:
            return None
        for letter, size, names in zip(axes, shape, spec, strict=False):
            names = (names,) if isinstance(names, str) else names or ()
            if size % (parts := self._size(names)):
                over = " x ".join(f"{name}={self.mesh.shape[name]}" for name in names)
                raise LayoutError(
                    f"axis {letter} of w_{axes} has size {size}, which does not divide over {over} = {parts}: "
                    f"make it a multiple of {parts}, or use a mesh of {_at_most(size, parts)} along these axes"
                )
        return NamedSharding(self.mesh, spec)


def _at_most(size: int, limit: int) -> str:
    return " or ".join(str(n) for n in range(1, limit) if size % n == 0)


SINGLE_DEVICE = Layout()
