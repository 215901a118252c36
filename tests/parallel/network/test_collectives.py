"""Each collective against loops, and that what is timed is really run."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from parallel.mesh import MeshConfig, make_mesh
from parallel.network.bench import repeated
from parallel.network.collectives import COLLECTIVES

DEVICES, PART = 4, 3


def expected(name: str, x_PPN: np.ndarray) -> np.ndarray:
    """What each device holds after one step; x[p, q] is part q of what device p holds before."""
    y_PPN = x_PPN.copy()
    for p in range(DEVICES):
        for q in range(DEVICES):
            if name == "all_to_all":
                y_PPN[p, q] = x_PPN[q, p]
            elif name == "all_gather":
                y_PPN[p, q] = x_PPN[q, (q + 1) % DEVICES]
            elif name == "all_reduce":
                y_PPN[p, q] = sum(x_PPN[other, q] for other in range(DEVICES))
            elif q == 0:
                y_PPN[p, 0] = sum(x_PPN[other, p] for other in range(DEVICES))
    return y_PPN


@pytest.mark.parametrize("name", COLLECTIVES)
@pytest.mark.parametrize("rounds", [1, 3])
def test_step(name, rounds):
    mesh = make_mesh(MeshConfig(expert=DEVICES))
    x_PPN = np.random.default_rng(0).integers(-9, 9, (DEVICES, DEVICES, PART)).astype(np.float32)
    x = jax.device_put(x_PPN.reshape(-1), jax.NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
    got = np.asarray(repeated(mesh, "expert", COLLECTIVES[name])(x, rounds)).reshape(x_PPN.shape)
    for _ in range(2 * rounds):
        x_PPN = expected(name, x_PPN)
    np.testing.assert_array_equal(got, x_PPN)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_groups_along_an_axis(name):
    """Over `expert` of a mesh data=2, expert=4, the two halves do not mix."""
    mesh = make_mesh(MeshConfig(data=2, expert=DEVICES))
    x = np.random.default_rng(1).integers(-9, 9, (2, DEVICES, DEVICES, PART)).astype(np.float32)
    placed = jax.device_put(x.reshape(-1), jax.NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
    got = np.asarray(repeated(mesh, "expert", COLLECTIVES[name])(placed, 1)).reshape(x.shape)
    for half in range(2):
        np.testing.assert_array_equal(got[half], expected(name, expected(name, x[half])))


@pytest.mark.parametrize("name", COLLECTIVES)
def test_the_compiled_loop_holds_it(name):
    mesh = make_mesh(MeshConfig(expert=DEVICES))
    x = jax.ShapeDtypeStruct((DEVICES * 64,), np.float32)
    text = repeated(mesh, "expert", COLLECTIVES[name]).lower(x, 5).compile().as_text()
    assert name.replace("_", "-") in text
    assert "while(" in text


@pytest.mark.parametrize("name", COLLECTIVES)
def test_bytes_sent_are_those_of_a_ring(name):
    """A device of P passes on P-1 parts of S/P bytes; all-reduce is reduce-scatter, then all-gather."""
    message, devices = 1200, 6
    sent = sum(message / devices for _ in range(devices - 1)) * (2 if name == "all_reduce" else 1)
    assert COLLECTIVES[name].bytes_sent(message, devices) == pytest.approx(sent)
    assert COLLECTIVES[name].bytes_sent(message, 1) == 0
