"""The mesh: how many devices along each named axis, and which ones."""

import math
from dataclasses import dataclass, fields

import jax
from jax.sharding import AxisType, Mesh


class MeshError(ValueError):
    """A mesh that cannot be laid over the devices: names the axes, the sizes, and what would work."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; an axis of 1 is off. The order is outermost first: `tensor` varies fastest.

    stage: devices that share out the layers (pipeline parallelism, parallel/pipeline.py).
    replica: copies of the parameters; each takes its share of the batch.
    data: shares of the batch over which parameters, gradients and optimizer states are sharded (FSDP, ZeRO-3).
    expert: devices that share out the experts; they take their share of the batch as well.
    sequence: devices that share out the sequences of one part of the batch (context parallelism).
    tensor: devices that share out heads, hidden widths and the vocabulary of one part of the batch, and between these
        products its sequence.

    LayoutConfig (parallel/layout.py) says how else the axes are used.
    """

    stage: int = 1
    replica: int = 1
    data: int = 1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis in fields(self):
            size = getattr(self, axis.name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise MeshError(f"mesh.{axis.name}={size!r}: give a whole number of devices, at least 1")

    @property
    def sizes(self) -> dict[str, int]:
        """Devices by axis name, outermost first."""
        return {axis.name: getattr(self, axis.name) for axis in fields(self)}

    @property
    def sizes_on(self) -> dict[str, int]:
        """The same of the axes that are on; of one device "data" stays."""
        return {name: size for name, size in self.sizes.items() if size > 1} or {"data": 1}

    @property
    def num_devices(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def text(self) -> str:
        """ "data=2 x expert=4": the axes that are on, or "1 device"."""
        return " x ".join(f"{name}={size}" for name, size in self.sizes.items() if size > 1) or "1 device"


def parse_mesh(text: str) -> MeshConfig:
    """ "data=2,expert=4" as a mesh.

    Raises:
        MeshError: an unknown axis, or a size that is no whole number.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in MeshConfig().sizes:
            raise MeshError(f"mesh {text!r}: no axis is called {axis!r}; give {', '.join(MeshConfig().sizes)}")
        if not size.isdecimal():
            raise MeshError(f"mesh {text!r}: {axis}={size!r} is no whole number; give {axis}=2, for example")
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def make_mesh(config: MeshConfig) -> Mesh:
    """Lays `config` over the first devices of this machine, or of all processes. The mesh has the axes that are on:
    along one of size 1 XLA for CPU would still have each device exchange with itself.

    Where the platform is CPU and JAX has not started yet, as many virtual devices are made as the mesh needs. Several
    processes (parallel/distributed.py) use all devices of each: the devices of a process follow each other, so the
    innermost axes stay within it as far as its devices reach.

    The axes are of type Auto: shardings are stated at the boundaries and at a few constraints, and XLA fills in the
    rest; what must be exact is written in `jax.shard_map`. Explicit axes would have every op of the model name its
    output's sharding.

    Raises:
        MeshError: there are fewer devices than the mesh needs, or, with several processes, more.
    """
    _request_virtual_devices(config.num_devices)
    devices = jax.devices()
    if len(devices) < config.num_devices:
        raise MeshError(
            f"the mesh {config.text} needs {config.num_devices} devices, and {len(devices)} {devices[0].platform} "
            f"{'device is' if len(devices) == 1 else 'devices are'} present: lower one of the axes"
            + (
                f", or set XLA_FLAGS=--xla_force_host_platform_device_count={config.num_devices} before Python starts"
                if devices[0].platform == "cpu" and jax.process_count() == 1
                else ""
            )
        )
    if len(devices) > config.num_devices and jax.process_count() > 1:
        raise MeshError(
            f"the mesh {config.text} has {config.num_devices} devices, and the {jax.process_count()} processes have "
            f"{len(devices)}: a mesh over several processes uses all of them, so raise one of the axes, or start fewer"
        )
    sizes = config.sizes_on
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices[: config.num_devices],
    )


def _request_virtual_devices(count: int) -> None:
    if jax.distributed.is_initialized():
        # Each process has asked for its share of them when it met the others.
        return
    try:
        if jax.config.jax_num_cpu_devices < count:  # type: ignore[attr-defined]
            jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        # JAX has started, and its devices are what they are; make_mesh counts them.
        return
