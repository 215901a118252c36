"""The contract of parallel/exchange, which every backend keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from parallel.exchange import backend
from parallel.mesh import MeshConfig, make_mesh
from tests.oracle.exchange import arrivals

BACKENDS = ("padded", "gathered")


def run(name: str, rows_PRD: np.ndarray, counts_PE: np.ndarray, limit: int):
    """Sends, scales each arrived row by its bucket's number, brings back. Everything the contract speaks of."""
    num_devices, num_buckets = counts_PE.shape
    mesh = make_mesh(MeshConfig(expert=num_devices))
    exchange, own = backend(name), num_buckets // num_devices

    def on_device(rows_1RD, counts_1E):
        arrived = exchange.send(rows_1RD[0], counts_1E[0], "expert", limit)
        bucket_S = jnp.searchsorted(jnp.cumsum(arrived.counts_E), jnp.arange(arrived.rows_SD.shape[0]), side="right")
        scale_S = 1.0 + jax.lax.axis_index("expert") * own + bucket_S
        back_RD = exchange.bring_back(arrived.rows_SD * scale_S[:, None], arrived, "expert")
        return arrived.rows_SD[None], arrived.counts_E[None], back_RD[None]

    spec = PartitionSpec("expert")
    call = jax.shard_map(on_device, mesh=mesh, in_specs=(spec, spec), out_specs=(spec, spec, spec), check_vma=False)
    return jax.jit(call)(jnp.asarray(rows_PRD), jnp.asarray(counts_PE))


def check(name: str, counts_PE: np.ndarray, num_rows: int, limit: int) -> None:
    counts_PE = counts_PE.astype(np.int32)
    num_devices = counts_PE.shape[0]
    rows_PRD = np.random.default_rng(0).normal(size=(num_devices, num_rows, 3)).astype(np.float32)
    arrived_PSD, counts, back_PRD = run(name, rows_PRD, counts_PE, limit)
    for device, (rows, bucket_counts) in enumerate(arrivals(rows_PRD, counts_PE)):
        np.testing.assert_array_equal(counts[device], bucket_counts)
        np.testing.assert_array_equal(arrived_PSD[device][: len(rows)], rows)
        np.testing.assert_array_equal(arrived_PSD[device][len(rows) :], 0)
        buckets = np.repeat(np.arange(counts_PE.shape[1]), counts_PE[device])
        expected = np.zeros_like(rows_PRD[device])
        expected[: len(buckets)] = rows_PRD[device][: len(buckets)] * (1.0 + buckets)[:, None]
        np.testing.assert_array_equal(back_PRD[device], expected)


@pytest.mark.parametrize("name", BACKENDS)
class TestContract:
    def test_even(self, name):
        check(name, np.full((4, 8), 2), num_rows=16, limit=16)

    def test_all_rows_for_one_bucket(self, name):
        counts = np.zeros((4, 8), int)
        counts[:, 5] = 6
        check(name, counts, num_rows=6, limit=6)

    def test_no_row_at_all(self, name):
        check(name, np.zeros((2, 4), int), num_rows=5, limit=5)

    def test_nothing_for_one_device_and_one_sender_idle(self, name):
        counts = np.array([[0, 0, 3, 1], [0, 0, 0, 0]])
        check(name, counts, num_rows=7, limit=7)

    def test_capacity_bounds_the_blocks(self, name):
        check(name, np.array([[2, 1, 0, 2], [2, 2, 2, 2]]), num_rows=9, limit=2)

    @settings(max_examples=12, deadline=None)
    @given(data=st.data())
    def test_any_counts(self, name, data):
        num_rows = 9
        counts = [np.bincount(data.draw(st.lists(st.integers(0, 7), max_size=num_rows)), minlength=8) for _ in range(4)]
        check(name, np.array(counts), num_rows=num_rows, limit=num_rows)

    def test_gradient_comes_home(self, name):
        """d/d rows of Σ weight · returned is bucket scale · weight, and zero for rows that were never sent."""
        counts_PE = np.array([[3, 0, 1, 2], [0, 4, 0, 0]], np.int32)
        rows = np.random.default_rng(1).normal(size=(2, 8, 3)).astype(np.float32)
        weights = np.random.default_rng(2).normal(size=rows.shape).astype(np.float32)
        gradient = jax.grad(lambda rows: (run(name, rows, counts_PE, 8)[2] * weights).sum())(rows)
        for device in range(2):
            buckets = np.repeat(np.arange(4), counts_PE[device])
            expected = np.zeros_like(rows[device])
            expected[: len(buckets)] = weights[device][: len(buckets)] * (1.0 + buckets)[:, None]
            np.testing.assert_allclose(gradient[device], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "limit", "bytes_expected"),
    [("padded", 2, 3 * (2 * 2) * 10 * 4), ("padded", 100, 3 * 16 * 10 * 4), ("gathered", 2, 3 * 16 * 10 * 4)],
)
def test_bytes_sent(name, limit, bytes_expected):
    assert backend(name).bytes_sent(16, 10, 4, num_buckets=8, num_devices=4, limit=limit) == bytes_expected


@pytest.mark.parametrize(("name", "opcode"), [("padded", "all-to-all"), ("gathered", "all-gather")])
def test_compiled_bytes_are_those_reported(name, opcode):
    """The rows' collective in the compiled program has the size that `bytes_sent` reports."""
    mesh = make_mesh(MeshConfig(expert=4))
    exchange, spec = backend(name), PartitionSpec("expert")

    def on_device(rows_RD, counts_E):
        return exchange.send(rows_RD, counts_E, "expert", 4).rows_SD

    call = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False))
    text = call.lower(jnp.zeros((4 * 16, 10)), jnp.zeros(4 * 8, jnp.int32)).compile().as_text()
    sent = exchange.bytes_sent(16, 10, 4, num_buckets=8, num_devices=4, limit=4)
    block = sent // (3 * 10 * 4)
    shapes = [f"f32[4,{block},10]", f"f32[{4 * block},10]", f"f32[1,{block},10]"]
    lines = [line for line in text.splitlines() if f" {opcode}(" in line and "f32[" in line]
    assert lines, text
    assert any(shape in line for line in lines for shape in shapes), lines


def test_unknown_backend():
    with pytest.raises(ValueError, match="padded"):
        backend("carrier_pigeon")
