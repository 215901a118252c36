"""Bytes of every exchange for one random routing, beside the least that any could send. On virtual CPU devices.

python -m parallel.exchange --devices 8 --per-node 2 --buckets 64 --top-k 8
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from parallel.exchange import BACKENDS, Backend, Traffic, make_exchange
from parallel.exchange.minimum import least_rows
from parallel.mesh import MeshConfig, make_mesh


def measure(name: Backend, x_PAD: jax.Array, buckets_PAK: np.ndarray, num_buckets: int, node_size: int) -> Traffic:
    """Bytes that a device sends in the mean to bring its tokens to their buckets and the results back."""
    num_devices, num_tokens, _ = x_PAD.shape
    exchange = make_exchange(name, "expert", num_devices, node_size, num_buckets, num_tokens, x_PAD.dtype)

    def on_device(x_1AD, buckets_1AK):
        arrived = exchange.send(x_1AD[0], buckets_1AK[0], jnp.ones(buckets_1AK.shape[1:], jnp.float32))
        return jax.tree.map(jnp.atleast_1d, arrived.forward)

    mesh, spec = make_mesh(MeshConfig(expert=num_devices)), PartitionSpec("expert")
    call = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    return jax.tree.map(jnp.mean, call(x_PAD, buckets_PAK))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m parallel.exchange", description=__doc__)
    for name, default, what in (
        ("devices", 8, "that share out the buckets"),
        ("per-node", 2, "devices of one node"),
        ("buckets", 64, "experts"),
        ("top-k", 8, "choices of a token, distinct and uniformly random"),
        ("tokens", 256, "of one device"),
        ("width", 512, "of a token's vector, in bfloat16"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default {default})")
    asked = parser.parse_args()

    draw = np.random.default_rng(0).random((asked.devices, asked.tokens, asked.buckets))
    buckets_PAK = np.argsort(draw, axis=2)[:, :, : asked.top_k].astype(np.int32)
    jax.config.update("jax_platforms", "cpu")
    mesh_first = make_mesh(MeshConfig(expert=asked.devices))
    x_PAD = jnp.zeros((asked.devices, asked.tokens, asked.width), jnp.bfloat16)
    row = 2 * asked.width * x_PAD.dtype.itemsize
    least = np.array(least_rows(buckets_PAK, asked.buckets, asked.per_node)) * row

    nodes = mesh_first.devices.size // asked.per_node
    print(
        f"top-{asked.top_k} of {asked.buckets} over {nodes} nodes x {asked.per_node} devices, {asked.tokens} tokens a "
        f"device, width {asked.width}, bfloat16, dropless; MB that a device sends there and back, tables and all"
    )
    print(f"{'':20} {'inside':>8} {'across':>8} {'across / least':>15}")
    rows = {"least": least} | {name: _figures(name, x_PAD, buckets_PAK, asked) for name in BACKENDS}
    for name, (inside, across) in rows.items():
        ratio = f"{across / least[1]:15.2f}" if least[1] else f"{'-':>15}"
        print(f"{name:20} {inside / 1e6:8.3f} {across / 1e6:8.3f} {ratio}")


def _figures(name: Backend, x_PAD: jax.Array, buckets_PAK: np.ndarray, asked: argparse.Namespace) -> np.ndarray:
    told = measure(name, x_PAD, buckets_PAK, asked.buckets, asked.per_node)
    return np.array([float(told.inside), float(told.across)])


if __name__ == "__main__":
    main()
