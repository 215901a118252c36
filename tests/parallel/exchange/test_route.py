"""The contract of a route, which every transport keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from parallel.exchange import gathered, padded, ragged
from parallel.exchange.group import along_rail, inside_node, whole
from parallel.exchange.route import bring_back, send
from tests.oracle.exchange import arrivals

TRANSPORTS = {"padded": padded.lay_route, "gathered": gathered.lay_route, "ragged": ragged.lay_route}
R = 9


@functools.cache
def program(name: str, group, limit: int):
    """Sends, scales each arrived row by its bucket's number, brings back; and the gradient of a weighted sum of that.
    Everything the contract speaks of, on `expert`; groups beside the first do the same with the same rows."""
    mesh = Mesh(jax.devices()[: group.size if group.index_groups is None else 8], ("expert",))

    def there_and_back(rows_RD, counts_E):
        route = TRANSPORTS[name](counts_E, rows_RD.shape[0], group, limit)
        rows_SD = send(rows_RD, route)
        own = route.counts_E.size
        bucket_S = jnp.searchsorted(jnp.cumsum(route.counts_E), jnp.arange(rows_SD.shape[0]), side="right")
        scale_S = 1.0 + group.position() * own + bucket_S
        return bring_back(rows_SD * scale_S[:, None], route), (rows_SD, route.counts_E)

    def on_device(rows_1RD, counts_1E, weights_1RD):
        back_RD, gradient, (rows_SD, counts_E) = jax.vjp(
            lambda rows_RD: there_and_back(rows_RD, counts_1E[0]), rows_1RD[0], has_aux=True
        )
        return jax.tree.map(lambda x: x[None], (rows_SD, counts_E, back_RD, *gradient(weights_1RD[0])))

    spec = PartitionSpec("expert")
    return jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


def check(name: str, counts_PE, limit: int = R, group=None) -> None:
    counts_PE = np.array(counts_PE, np.int32)
    num_devices = counts_PE.shape[0]
    group = group or whole("expert", num_devices, 1)
    shape = (num_devices, R, 3)
    rows_PRD, weights_PRD = (np.random.default_rng(s).normal(size=shape).astype(np.float32) for s in (0, 1))
    given = (rows_PRD, counts_PE, weights_PRD)
    for members in group.index_groups or (range(num_devices),):
        order = np.zeros((8 if group.index_groups else num_devices,), int)
        order[list(members)] = range(num_devices)
        told = program(name, group, limit)(*(x[order] for x in given))
        arrived, counts, back, gradient = (np.asarray(x)[list(members)] for x in told)
        compare(arrived, counts, back, gradient, *given)


def compare(arrived, counts, back, gradient, rows_PRD, counts_PE, weights_PRD) -> None:
    for device, (rows, bucket_counts) in enumerate(arrivals(rows_PRD, counts_PE)):
        np.testing.assert_array_equal(counts[device], bucket_counts)
        np.testing.assert_array_equal(arrived[device][: len(rows)], rows)
        np.testing.assert_array_equal(arrived[device][len(rows) :], 0)
        buckets = np.repeat(np.arange(counts_PE.shape[1]), counts_PE[device])
        sent = np.arange(R)[:, None] < len(buckets)
        scale = np.float32(1.0 + np.pad(buckets, (0, R - len(buckets)))[:, None])
        np.testing.assert_array_equal(back[device], np.where(sent, rows_PRD[device] * scale, 0))
        np.testing.assert_array_equal(gradient[device], np.where(sent, weights_PRD[device] * scale, 0))


@pytest.mark.parametrize("name", TRANSPORTS)
class TestContract:
    def test_even(self, name):
        check(name, np.ones((4, 8)))

    def test_all_rows_for_one_bucket(self, name):
        counts = np.zeros((4, 8))
        counts[:, 5] = R
        check(name, counts)

    def test_no_row_at_all(self, name):
        check(name, np.zeros((4, 8)))

    def test_nothing_for_two_devices_and_one_sender_idle(self, name):
        check(name, [[0, 0, 3, 1, 0, 0, 0, 5], [0] * 8, [0, 0, 0, 9, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 1, 0]])

    def test_capacity_bounds_the_blocks(self, name):
        check(name, [[2, 1, 0, 2], [2, 2, 2, 2]], limit=2)

    @settings(max_examples=30, deadline=None)
    @given(data=st.data())
    def test_any_counts(self, name, data):
        chosen = st.lists(st.integers(0, 7), max_size=R)
        check(name, [np.bincount(np.array(data.draw(chosen), int), minlength=8) for _ in range(4)])

    @pytest.mark.parametrize("group", [along_rail("expert", 8, 2), inside_node("expert", 8, 4)], ids=["rail", "node"])
    def test_groups_within_an_axis(self, name, group):
        check(name, [[0, 0, 3, 1], [0, 0, 0, 0], [4, 0, 0, 5], [1, 1, 1, 1]], group=group)
