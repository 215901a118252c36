"""The contract of an exchange, which every backend keeps: sums, gradients, and bytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from parallel.exchange import BACKENDS, make_exchange
from parallel.exchange.minimum import least_rows
from tests.closeness import assert_trees_equal_to_scale
from tests.oracle import exchange as oracle
from tests.oracle.blocks import on_the_wire
from tests.parallel.exchange.collectives import collective_bytes

A, K, D, E = 6, 3, 5, 8
SCALE_ED = np.random.default_rng(9).normal(size=(E, D)).astype(np.float32)
PLACES = [(1, 1), (2, 1), (2, 2), (4, 2), (8, 1), (8, 2), (8, 4), (8, 8)]
"""Devices, and how many of them share a node."""


@functools.cache
def program(
    name: str, num_devices: int, node_size: int, limit: int = A, axes=("expert",), wire="float32", before=False
):
    """Each arrived row times its bucket's vector: the sums, their gradients for x and the weights, and the bytes."""
    sizes = {"expert": num_devices} if len(axes) == 1 else {axes[0]: 2, axes[1]: num_devices // 2}
    axis = axes[0] if len(axes) == 1 else axes
    exchange = make_exchange(name, axis, num_devices, node_size, E, limit, wire, weighs_before=before)

    def exchanged(x_AD, weights_AK, buckets_AK):
        arrived = exchange.send(x_AD, buckets_AK, weights_AK)
        bucket_S = jnp.searchsorted(jnp.cumsum(arrived.counts_E), jnp.arange(arrived.rows_SD.shape[0]), side="right")
        own = E // num_devices
        scale_ED = jax.lax.dynamic_slice_in_dim(SCALE_ED, jax.lax.axis_index(axis) * own, own)
        scale_SD = scale_ED.at[bucket_S].get(mode="fill", fill_value=0)
        gates_S1 = arrived.gates_S[:, None] if before else 1
        y_AD = exchange.bring_back(arrived.rows_SD * scale_SD * gates_S1, arrived)
        return y_AD, (arrived.forward, arrived.backward)

    def on_device(x_1AD, weights_1AK, buckets_1AK, dy_1AD):
        y_AD, gradients, sent = jax.vjp(
            lambda x, weights: exchanged(x, weights, buckets_1AK[0]), x_1AD[0], weights_1AK[0], has_aux=True
        )
        return jax.tree.map(lambda x: x[None], (y_AD, gradients(dy_1AD[0]), sent))

    devices = np.reshape(jax.devices()[:num_devices], tuple(sizes.values()))
    spec, mesh = PartitionSpec(axes), Mesh(devices, tuple(sizes))
    return jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


def given_arrays(num_devices: int):
    r = np.random.default_rng(num_devices)
    shapes = ((num_devices, A, D), (num_devices, A, K), (num_devices, A, D))
    return tuple(r.normal(size=shape).astype(np.float32) for shape in shapes)


def check(name: str, buckets_PAK: np.ndarray, node_size: int, **settings):
    num_devices = len(buckets_PAK)
    x_PAD, weights_PAK, dy_PAD = given_arrays(num_devices)
    run = program(name, num_devices, node_size, **settings)
    y_PAD, (dx_PAD, dweights_PAK), sent = run(x_PAD, weights_PAK, buckets_PAK, dy_PAD)
    told = (y_PAD, dx_PAD, dweights_PAK)
    given = (x_PAD, weights_PAK, buckets_PAK, dy_PAD)
    wire = settings.get("wire", "float32")
    by_hand = expected(*given) if wire == "float32" else expected_rounded(name, wire, node_size, *given)
    assert_trees_equal_to_scale(told, by_hand, tolerance=1e-6)
    return sent


def expected_rounded(name, wire, node_size, x_PAD, weights_PAK, buckets_PAK, dy_PAD):
    """By the rules of parallel/exchange for 8 bits: what is copied is rounded once however many steps it takes, what is
    summed before each. Flat exchanges weigh at home, the others where the buckets are."""
    P = len(x_PAD)
    if P == 1:
        return expected(x_PAD, weights_PAK, buckets_PAK, dy_PAD)
    values, gradients = (
        functools.partial(on_the_wire, element=element)
        for element in (("int8", "int8") if wire == "int8" else ("float8_e4m3fn", "float8_e5m2"))
    )
    steps = [(P // node_size, E // (P // node_size)), (node_size, E // P)]
    own = [buckets for members, buckets in steps if members > 1]
    y_PAD, dx_PAD, dweights_PAK = (np.zeros(x.shape) for x in (x_PAD, x_PAD, weights_PAK))
    for p, a in np.ndindex(P, A):
        x_D, dy_D = x_PAD[p, a], dy_PAD[p, a]
        kept = [k for k in range(K) if buckets_PAK[p, a, k] < E]
        choices = [(buckets_PAK[p, a, k], weights_PAK[p, a, k]) for k in kept]
        if "hierarchical" in name:
            y_PAD[p, a] = oracle.rounded_sums(x_D, choices, SCALE_ED, own, values)
            dx_PAD[p, a] = oracle.rounded_sums(dy_D, choices, SCALE_ED, own, gradients)
        for k, (bucket, weight) in zip(kept, choices, strict=True):
            row_D = SCALE_ED[bucket] * values(x_D)
            if "hierarchical" in name:
                dweights_PAK[p, a, k] = (row_D * gradients(dy_D)).sum()
            else:
                dweights_PAK[p, a, k] = (values(row_D) * dy_D).sum()
                y_PAD[p, a] += weight * values(row_D)
                dx_PAD[p, a] += gradients(SCALE_ED[bucket] * gradients(weight * dy_D))
    return y_PAD, dx_PAD, dweights_PAK


def expected(x_PAD, weights_PAK, buckets_PAK, dy_PAD):
    y, dx, dweights = [], [], []
    for x_AD, weights_AK, buckets_AK, dy_AD in zip(x_PAD, weights_PAK, buckets_PAK, dy_PAD, strict=True):
        y.append(oracle.sums(x_AD, buckets_AK, weights_AK, SCALE_ED))
        dx.append(oracle.sums(dy_AD, buckets_AK, weights_AK, SCALE_ED))
        scale_AKD = np.concatenate([SCALE_ED, np.zeros((1, D))])[buckets_AK]
        dweights.append((scale_AKD * (x_AD * dy_AD)[:, None]).sum(-1))
    return np.stack(y), np.stack(dx), np.stack(dweights)


def spread(num_devices: int, seed: int = 0) -> np.ndarray:
    """Distinct random buckets for each token, some choices dropped."""
    r = np.random.default_rng(seed)
    buckets_PAK = r.permuted(np.broadcast_to(np.arange(E + 2), (num_devices, A, E + 2)), axis=2)[:, :, :K]
    return np.minimum(buckets_PAK, E).astype(np.int32)


def one_bucket(num_devices: int) -> np.ndarray:
    buckets_PAK = np.full((num_devices, A, K), E, np.int32)
    buckets_PAK[:, :, 1] = 5
    return buckets_PAK


def first_buckets(num_devices: int) -> np.ndarray:
    """All tokens for the same three buckets; most devices get nothing."""
    return np.broadcast_to(np.arange(K, dtype=np.int32), (num_devices, A, K))


def one_sender(num_devices: int) -> np.ndarray:
    buckets_PAK = np.full((num_devices, A, K), E, np.int32)
    buckets_PAK[-1] = spread(1)[0]
    return buckets_PAK


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("wire", ["float32", pytest.param("fp8", marks=pytest.mark.slow)])
class TestContract:
    @pytest.mark.parametrize(
        ("num_devices", "node_size"),
        [place if place in ((1, 1), (8, 2)) else pytest.param(*place, marks=pytest.mark.slow) for place in PLACES],
    )
    @pytest.mark.parametrize("routing", [spread, one_bucket, first_buckets, one_sender], ids=lambda f: f.__name__)
    def test_sums_and_gradients(self, name, wire, routing, num_devices, node_size):
        check(name, routing(num_devices), node_size, wire=wire)

    def test_no_choice_at_all(self, name, wire):
        check(name, np.full((8, A, K), E, np.int32), 2, wire=wire)

    @settings(max_examples=30, deadline=None)
    @given(data=st.data())
    def test_any_routing(self, name, wire, data):
        seed, favoured = data.draw(st.integers(0, 2**31)), data.draw(st.integers(0, 7))
        buckets_PAK = spread(8, seed)
        taken = (buckets_PAK == favoured).any(-1)
        crowded = np.random.default_rng(seed).random((8, A)) < data.draw(st.floats(0, 1))
        buckets_PAK[..., 0] = np.where(crowded & ~taken, favoured, buckets_PAK[..., 0])
        check(name, buckets_PAK, 2, wire=wire)

    def test_capacity_bounds_the_buffers(self, name, wire):
        """Two rows a bucket from each device: tokens 0 and 1 take buckets 0 to 2, and so on."""
        buckets_AK = np.arange(K)[None, :] + K * (np.arange(A)[:, None] // 2)
        buckets_PAK = np.broadcast_to(np.minimum(buckets_AK, E), (8, A, K)).astype(np.int32)
        check(name, buckets_PAK, 2, limit=2, wire=wire)

    @pytest.mark.slow
    def test_buckets_over_two_axes(self, name, wire):
        check(name, spread(8), 4, axes=("data", "expert"), wire=wire)


@pytest.mark.parametrize(
    "name", [name if name == "padded" else pytest.param(name, marks=pytest.mark.slow) for name in BACKENDS]
)
def test_rows_in_int8(name):
    check(name, spread(8), 2, wire="int8")


@pytest.mark.parametrize(
    "name", [name if name == "padded" else pytest.param(name, marks=pytest.mark.slow) for name in BACKENDS]
)
@pytest.mark.parametrize("num_devices", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_results_weighed_before_they_come_back(name, num_devices):
    check(name, spread(num_devices), min(2, num_devices), before=True)


def mean_bytes(sent) -> np.ndarray:
    """[forward or backward, inside or across], in the mean over devices."""
    return np.array([[float(part.inside.mean()), float(part.across.mean())] for part in sent])


@pytest.mark.parametrize("node_size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("wire", ["float32", pytest.param("fp8", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("padded", False),
        ("gathered", False),
        ("hierarchical", False),
        ("padded", True),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in ("gathered", "hierarchical")),
    ],
)
def test_bytes_told_are_those_compiled(name, before, wire, node_size):
    """Every collective of the compiled forward and backward pass, tables and all. The ragged exchanges' bytes depend
    on the routing and do not stand in the program; the next test has them."""
    run, (x, weights, dy) = program(name, 8, node_size, wire=wire, before=before), given_arrays(8)
    *_, sent = run(x, weights, spread(8), dy)
    told = mean_bytes(sent).sum(0)
    text = run.lower(x, weights, spread(8), dy).compile().as_text()
    np.testing.assert_array_equal(told, collective_bytes(text, 8, node_size))


@pytest.mark.parametrize(("wire", "row"), [("float32", 4 * D), pytest.param("int8", D + 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("routing", [spread, first_buckets, one_sender], ids=lambda f: f.__name__)
def test_ragged_bytes_are_those_of_the_rows_that_exist(routing, wire, row):
    buckets_PAK = routing(8)
    counts = 4 * E * np.array([1, 6])
    rows = np.array(oracle.flat_rows(buckets_PAK, E, 2))
    forward, backward = mean_bytes(check("ragged", buckets_PAK, 2, wire=wire))
    np.testing.assert_allclose(forward, 2 * row * rows + counts, rtol=1e-6)
    np.testing.assert_allclose(backward, 2 * row * rows, rtol=1e-6)

    rows = np.array(oracle.hierarchical_rows(buckets_PAK, E, 2))
    # Buckets and weights of each row that goes there. How many, for each of four nodes and two devices.
    notes = 2 * K * 4 * rows
    counts = 4 * np.array([2, 3 * 4])
    forward, backward = mean_bytes(check("ragged_hierarchical", buckets_PAK, 2, wire=wire))
    np.testing.assert_allclose(forward, 2 * row * rows + notes + counts, rtol=1e-6)
    np.testing.assert_allclose(backward, 2 * row * rows + notes, rtol=1e-6)


@pytest.mark.parametrize("node_size", [1, 2, 4, 8])
def test_nothing_sends_less_than_the_least(node_size):
    buckets_PAK = spread(8)
    least = np.array(least_rows(buckets_PAK, E, node_size))
    flat, hierarchical = (
        np.array(rows(buckets_PAK, E, node_size)) for rows in (oracle.flat_rows, oracle.hierarchical_rows)
    )
    assert (least <= hierarchical).all()
    # What crosses more often may have less to pass on inside.
    assert least[1] <= flat[1]
    assert least.sum() <= flat.sum()
    assert hierarchical[1] == least[1]
    if node_size in (2, 4):
        assert hierarchical[1] < flat[1]


def test_least_rows_by_hand():
    # Four devices, two nodes, two buckets each. A token of device 0 for both buckets of device 1 and three of node 1;
    # one of device 2 for its own buckets.
    buckets_PAK = np.full((4, 1, 5), 8)
    buckets_PAK[0, 0] = [2, 3, 4, 5, 6]
    buckets_PAK[2, 0, :2] = [4, 5]
    # Inside: to device 1, and from where it lands in node 1 to the other one. Across: once.
    assert least_rows(buckets_PAK, 8, 2) == (2 / 4, 1 / 4)


def test_rows_travel_in_the_format_of_the_wire():
    """bfloat16 on every way: sums come near, rows take half the bytes, and the weights stay in float32."""
    x, weights, dy = given_arrays(8)
    exact, short = (
        program("ragged_hierarchical", 8, 2, wire=wire)(x, weights, spread(8), dy) for wire in ("float32", "bfloat16")
    )
    assert short[0].dtype == jnp.float32
    assert_trees_equal_to_scale(short[:2], exact[:2], tolerance=0.02)
    assert np.abs(np.asarray(short[0] - exact[0])).max() > 1e-4
    saved = 2 * 2 * D * np.array(oracle.hierarchical_rows(spread(8), E, 2))
    np.testing.assert_allclose(mean_bytes(exact[2]) - mean_bytes(short[2]), [saved, saved], rtol=1e-5)


def test_unknown_backend():
    with pytest.raises(ValueError, match="padded"):
        make_exchange("carrier_pigeon", "expert", 2, 1, 4, 4, "float32")


def test_unknown_format():
    with pytest.raises(ValueError, match="bfloat16"):
        make_exchange("padded", "expert", 2, 1, 4, 4, "float16")
