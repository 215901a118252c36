"""A small all-reduce over this node's GPUs, for NCCL's log: python -m parallel.network.all_reduce

The doctor runs it with NCCL_DEBUG=INFO. It was never run on hardware: no machine with two GPUs was at hand. What the
doctor makes of its output is tested on recorded logs.
"""

import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

_BYTES = 16 << 20
"""More than XLA's own kernels for small messages take on, so that NCCL is called."""


def main() -> int:
    """Sums ones over all local GPUs; 0 if the sum is right."""
    if jax.default_backend() != "gpu":
        print(f"jax sees no GPU but {jax.devices()[0].platform}: install jax[cuda13]", file=sys.stderr)
        return 3
    count = jax.local_device_count()
    mesh = jax.make_mesh((count,), ("gpu",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("gpu")
    total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "gpu"), mesh=mesh, in_specs=spec, out_specs=spec))
    x = jax.device_put(jnp.ones((count, _BYTES // 4)), jax.NamedSharding(mesh, spec))
    return int(float(total(x)[0, 0]) != count)


if __name__ == "__main__":
    sys.exit(main())
