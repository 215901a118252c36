"""Times collectives over the axes of a mesh, alone on the machine, against the size of the message.

Each is run several times in a loop inside one compiled program, as a train step would run it, so that Python's part
does not count. All groups along an axis run at once and share the node's network, as they do in training.
"""

import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from parallel.mesh import MeshConfig, make_mesh
from parallel.network.collectives import COLLECTIVES, Collective
from parallel.network.links import LinkClass, Links, Measurement, fit_links

_BYTES_OF_A_LOOP = 16 << 20
_MOST_ROUNDS = 32
_HOST_NAME_BYTES = 256

Report = Callable[[Measurement], None]


def measure_links(
    config: MeshConfig, axes: Sequence[str], sizes: Sequence[int], repeats: int, report: Report
) -> tuple[list[Measurement], int]:
    """Times every collective over every axis with messages of each size in bytes.

    Args:
        report: called with each measurement as it is made.

    Returns:
        The measurements, and how many hosts took part. Every process gets both; the times are its own.

    Raises:
        MeshError: too few devices.
    """
    mesh = make_mesh(config)
    hosts = hosts_of_processes()
    measured = []
    for axis in axes:
        link = link_class(mesh, axis, hosts)
        for collective in COLLECTIVES.values():
            for size in sizes:
                measured.append(measure(mesh, axis, link, collective, size, repeats))
                report(measured[-1])
    return measured, len(set(hosts.values()))


def summarize(config: MeshConfig, measured: Sequence[Measurement], hosts: int) -> tuple[Links, tuple[str, ...]]:
    """The fits, with what they were measured on; and sentences on those that failed."""
    device = jax.devices()[0]
    links, failures = fit_links(measured)
    summary = Links(
        platform=device.platform,
        device=device.device_kind,
        jax=jax.__version__,
        mesh=config.sizes,
        processes=jax.process_count(),
        hosts=hosts,
        links=links,
        measurements=tuple(measured),
    )
    return summary, failures


def measure(
    mesh: Mesh, axis: str, link: LinkClass, collective: Collective, message_bytes: int, repeats: int
) -> Measurement:
    """Times one collective with messages of about `message_bytes` (a multiple of the devices along the axis)."""
    devices = mesh.shape[axis]
    elements = max(1, message_bytes // (4 * devices)) * devices
    # Zeros: a sum repeated stays what it is.
    zeros = jax.jit(lambda: jnp.zeros(mesh.size * elements, jnp.float32), out_shardings=_everywhere(mesh))
    x, run = zeros(), repeated(mesh, axis, collective)
    rounds = max(1, min(_MOST_ROUNDS, _BYTES_OF_A_LOOP // (4 * elements)))
    jax.block_until_ready(run(x, 1))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(x, rounds))
        times.append((time.perf_counter() - start) / (2 * rounds))
    sent = collective.bytes_sent(4 * elements, devices)
    median = statistics.median(times)
    return Measurement(collective.name, axis, devices, link, 4 * elements, sent, median, min(times), max(times))


def repeated(mesh: Mesh, axis: str, collective: Collective) -> Any:
    """The compiled function (x, rounds) → x: `rounds` times two collectives, each on the result of the one before.

    Two, since a loop over one would copy its result into the buffer that it came from.
    x: f32, split over all devices of the mesh.
    """
    everywhere = _everywhere(mesh).spec

    def on_device(x: jax.Array, rounds: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, rounds, lambda _, x: collective.step(collective.step(x, axis), axis), x)

    return jax.jit(
        jax.shard_map(
            on_device, mesh=mesh, in_specs=(everywhere, PartitionSpec()), out_specs=everywhere, check_vma=False
        )
    )


def link_class(mesh: Any, axis: str, hosts: Mapping[int, str]) -> LinkClass:
    """Whether the devices along an axis share a node, in every one of its groups.

    Args:
        hosts: the node of each process.
    """
    groups = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), -1).reshape(-1, mesh.shape[axis])
    inside = all(len({hosts[device.process_index] for device in group}) == 1 for group in groups)
    return "inside_node" if inside else "across_nodes"


def hosts_of_processes() -> dict[int, str]:
    """The host name of each process, by its index."""
    if jax.process_count() == 1:
        return {0: socket.gethostname()}
    name = socket.gethostname().encode()[:_HOST_NAME_BYTES].ljust(_HOST_NAME_BYTES, b"\0")
    names = np.asarray(multihost_utils.process_allgather(np.frombuffer(name, np.uint8)))
    return {index: row.tobytes().rstrip(b"\0").decode() for index, row in enumerate(names)}


def _everywhere(mesh: Mesh) -> NamedSharding:
    # Not an array's layout, which would stand in parallel/layout.py: one part for each device, whatever the axes.
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))
