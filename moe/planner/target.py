"""Described GPUs, to compile for on a machine that has none (XLA's ahead-of-time compiler)."""

import importlib.util

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from moe.planner.chips import Chip
from parallel.mesh import MeshConfig

SETUP = "make plan-setup"


class TargetError(RuntimeError):
    """This environment cannot compile for GPUs: says what installs it."""


def can_compile() -> bool:
    """Whether JAX's CUDA plugin is installed here."""
    return importlib.util.find_spec("jax_cuda13_plugin") is not None


def described_mesh(chip: Chip, config: MeshConfig, devices_per_node: int) -> Mesh:
    """`config` laid over described devices, nodes filled one after the other, as `parallel.mesh.make_mesh` lays it over
    real ones.

    Raises:
        TargetError: the CUDA plugin is not installed.
    """
    if not can_compile():
        raise TargetError(f"compiling for {chip.device} needs JAX's CUDA plugin: `{SETUP}` installs it")
    count = config.num_devices
    per_node = devices_per_node if count % devices_per_node == 0 else count
    topology = topologies.get_topology_desc(
        "", "cuda", target_config=chip.target_config, topology=f"1x{count // per_node}x{per_node}"
    )
    sizes = config.sizes_on
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=topology.devices
    )
