"""Bytes of every exchange for one random routing, beside the least that any could send. On virtual CPU devices.

python -m parallel.exchange --devices 8 --per-node 2 --buckets 64 --top-k 8
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from parallel.exchange import BACKENDS, Backend, Traffic, WireFormat, make_exchange
from parallel.exchange.minimum import least_rows
from parallel.mesh import MeshConfig, make_mesh


def measure(
    name: Backend, wire: WireFormat, mesh: Mesh, x_PAD: jax.Array, buckets_PAK: np.ndarray, asked: argparse.Namespace
) -> Traffic:
    """Bytes that a device sends, in the mean, to bring its tokens to their buckets and the results back."""
    exchange = make_exchange(
        name, "expert", asked.devices, asked.per_node, asked.buckets, limit=asked.tokens, wire=wire
    )

    def on_device(x_1AD, buckets_1AK):
        arrived = exchange.send(x_1AD[0], buckets_1AK[0], jnp.ones(buckets_1AK.shape[1:], jnp.float32))
        return jax.tree.map(jnp.atleast_1d, arrived.forward)

    spec = PartitionSpec("expert")
    call = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    return jax.tree.map(jnp.mean, call(x_PAD, buckets_PAK))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m parallel.exchange", description=__doc__)
    for name, default, what in (
        ("devices", 8, "that share out the buckets"),
        ("per-node", 2, "devices of one node"),
        ("buckets", 64, "experts, for example"),
        ("top-k", 8, "choices of a token, distinct and uniformly random"),
        ("tokens", 256, "of one device"),
        ("width", 512, "of a token's vector"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default {default})")
    asked = parser.parse_args(arguments)
    for name, divisor in (("devices", asked.per_node), ("buckets", asked.devices)):
        if getattr(asked, name) % divisor:
            parser.error(f"--{name} {getattr(asked, name)}: give a multiple of {divisor}")
    if asked.top_k > asked.buckets:
        parser.error(f"--top-k {asked.top_k}: a token chooses at most all {asked.buckets} buckets")
    return asked


def main(arguments: list[str] | None = None) -> None:
    asked = parse(arguments)
    jax.config.update("jax_platforms", "cpu")
    mesh = make_mesh(MeshConfig(expert=asked.devices))
    draw = np.random.default_rng(0).random((asked.devices, asked.tokens, asked.buckets))
    buckets_PAK = np.argsort(draw, axis=2)[:, :, : asked.top_k].astype(np.int32)
    x_PAD = jnp.zeros((asked.devices, asked.tokens, asked.width), jnp.bfloat16)

    there_and_back = 2 * asked.width * x_PAD.dtype.itemsize
    inside, across = least_rows(buckets_PAK, asked.buckets, asked.per_node)
    least = (inside * there_and_back, across * there_and_back)
    nodes = asked.devices // asked.per_node
    print(
        f"top-{asked.top_k} of {asked.buckets} over {nodes} nodes x {asked.per_node} devices, {asked.tokens} tokens a "
        f"device, width {asked.width}, dropless. The least is that of bfloat16; int8 takes the bytes of fp8.\n"
        "MB that a device sends there and back, in the mean, tables and all:\n\n"
        f"{'':29}{'inside':>10}{'across':>10}{'across / least':>16}"
    )
    print(_line("least bfloat16", *least, least[1]))
    for wire in ("bfloat16", "fp8"):
        for name in BACKENDS:
            told = measure(name, wire, mesh, x_PAD, buckets_PAK, asked)
            print(_line(f"{name} {wire}", float(told.inside), float(told.across), least[1]))


def _line(name: str, inside: float, across: float, least: float) -> str:
    ratio = f"{across / least:16.2f}" if least else f"{'-':>16}"
    return f"{name:29}{inside / 1e6:10.3f}{across / 1e6:10.3f}{ratio}"


if __name__ == "__main__":
    main()
