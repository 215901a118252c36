"""The emulation against the words of `jax.lax.ragged_all_to_all`'s documentation, with loops."""

import jax
import numpy as np
from jax.sharding import PartitionSpec

from parallel.exchange.group import whole
from parallel.exchange.ragged import Chunks, emulated
from parallel.mesh import MeshConfig, make_mesh


def test_chunks_land_where_the_sender_says_and_the_rest_is_kept():
    P, R, S, D = 4, 10, 13, 2
    r = np.random.default_rng(0)
    rows_PRD, before_PSD = r.normal(size=(P, R, D)).astype(np.float32), r.normal(size=(P, S, D)).astype(np.float32)
    sizes_PQ = np.array([[0, 3, 1, 2], [4, 0, 0, 0], [3, 3, 3, 1], [0, 0, 0, 5]], np.int32)
    # With gaps before each chunk, on both sides.
    from_PQ = (np.cumsum(sizes_PQ, 1) - sizes_PQ).astype(np.int32)
    to_PQ = (np.cumsum(sizes_PQ + 1, 0) - sizes_PQ).astype(np.int32)
    expected_PSD = before_PSD.copy()
    for p in range(P):
        for q in range(P):
            for i in range(sizes_PQ[p, q]):
                expected_PSD[q, to_PQ[p, q] + i] = rows_PRD[p, from_PQ[p, q] + i]

    def on_device(rows, before, *chunks):
        group = whole("expert", P, 1)
        return emulated(rows[0], before[0], Chunks(*(x[0] for x in chunks)), group)[None]

    spec, mesh = PartitionSpec("expert"), make_mesh(MeshConfig(expert=P))
    call = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    received_PSD = call(rows_PRD, before_PSD, from_PQ, sizes_PQ, to_PQ, sizes_PQ.T)
    np.testing.assert_array_equal(received_PSD, expected_PSD)
