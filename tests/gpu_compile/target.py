"""Described H20s to compile for, and what skips a test where that cannot be done."""

import jax
import pytest

from moe.planner.chips import H20
from moe.planner.target import can_compile, described_mesh
from parallel.mesh import MeshConfig

needs_plugin = pytest.mark.skipif(
    not can_compile(), reason="the CUDA plugin is not installed: make plan-setup, and test there"
)


def h20_mesh(config: MeshConfig) -> jax.sharding.Mesh:
    """A mesh of described H20s on one node."""
    return described_mesh(H20, config, config.num_devices)
