"""A described GPU to compile for, on a machine that has none (XLA's ahead-of-time compiler)."""

import jax
from jax.experimental import topologies

H20 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 78 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 4000000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 102005473280
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H20"
"""
"""stream_executor.GpuTargetConfigProto of NVIDIA's H20: 78 multiprocessors, 96 GB at 4.0 TB/s."""


def h20_mesh(axes: dict[str, int]) -> jax.sharding.Mesh:
    """A mesh of described H20s on one host.

    Raises whatever JAX raises where its CUDA plugin is not installed.
    """
    count = 1
    for size in axes.values():
        count *= size
    topology = topologies.get_topology_desc("", "cuda", target_config=H20, topology=f"1x1x{count}")
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=topology.devices)
