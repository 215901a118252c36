import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.model.remat import rematerialise
from moe.ops.grouped_matmul import grouped_swiglu
from moe.ops.grouped_matmul.in_stack import InStack
from tests.closeness import assert_trees_equal_to_scale

D, F = 16, 48


def in_stack(w, *, trained=True):
    stack = jnp.stack([w + 1, w, w - 1])
    return InStack(jax.lax.stop_gradient(stack), jnp.int32(1), stack.astype(jnp.float32) if trained else None)


WAYS = {"alone": lambda w: w, "in a stack": in_stack}
"""How matrices are given."""


def arrays(num_rows, num_groups, dtype=np.float32):
    """x_RD, the matrices, gates_R and dy_RD."""
    r = np.random.default_rng(0)
    shapes = [(num_rows, D), *[(num_groups, D, F)] * 2, (num_groups, F, D), (num_rows, D)]
    x_RD, *matrices, dy_RD = (jnp.asarray(r.normal(size=shape) / 2, dtype) for shape in shapes)
    return x_RD, matrices, jnp.asarray(r.uniform(size=num_rows), jnp.float32), dy_RD


def both(way, x_RD, matrices, sizes, gates_R, dy_RD):
    """y_RD, and the gradients of x_RD, the matrices and gates_R."""

    @jax.jit
    def run(x_RD, matrices, gates_R):
        sizes_E = jnp.array(sizes, jnp.int32)

        def networks(x_RD, matrices, gates_R):
            return grouped_swiglu(x_RD, [WAYS[way](w) for w in matrices], sizes_E, gates_R, backend="blocked")[0]

        y_RD, pull = jax.vjp(networks, x_RD, matrices, gates_R)
        return y_RD, pull(dy_RD)

    return run(x_RD, matrices, gates_R)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def oracle(x_RD, matrices, sizes, gates_R, dy_RD):
    """What `both` gives, row by row in float64."""
    x_RD, dy_RD, gates_R = (np.asarray(x, np.float64) for x in (x_RD, dy_RD, gates_R))
    matrices = [np.asarray(w, np.float64) for w in matrices]
    y_RD, dx_RD, dgates_R = np.zeros_like(x_RD), np.zeros_like(x_RD), np.zeros_like(gates_R)
    gradients = [np.zeros_like(w) for w in matrices]
    row = 0
    for e, size in enumerate(sizes):
        w_gate, w_up, w_down = (w[e] for w in matrices)
        for _ in range(size):
            x, dy, weight = x_RD[row], dy_RD[row], gates_R[row]
            gate, up = x @ w_gate, x @ w_up
            activation = gate * sigmoid(gate) * up
            y_RD[row] = weight * activation @ w_down
            dhidden = w_down @ dy
            dgates_R[row] = dhidden @ activation
            dgate = weight * dhidden * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))
            dup = weight * dhidden * gate * sigmoid(gate)
            dx_RD[row] = w_gate @ dgate + w_up @ dup
            for dw, left, right in zip(gradients, (x, x, weight * activation), (dgate, dup, dy), strict=True):
                dw[e] += np.outer(left, right)
            row += 1
    return y_RD, (dx_RD, gradients, dgates_R)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "sizes",
    [
        [300, 0, 7, 100], [0, 0, 0, 0], [407, 0, 0, 0], [0, 0, 0, 407], [128, 128, 128, 23], [1, 1, 1, 1],
        [0, 600, 1, 5], [256, 256, 512, 32],
    ],
    ids=str,
)  # fmt: skip
def test_values_and_gradients(way, sizes):
    x_RD, matrices, gates_R, dy_RD = arrays(max(407, sum(sizes)), 4)
    found = both(way, x_RD, matrices, sizes, gates_R, dy_RD)
    assert_trees_equal_to_scale(found, oracle(x_RD, matrices, sizes, gates_R, dy_RD))


@settings(max_examples=8, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=5, max_size=5))
def test_any_sizes(sizes):
    x_RD, matrices, gates_R, dy_RD = arrays(200, 5)
    found = both("alone", x_RD, matrices, sizes, gates_R, dy_RD)
    assert_trees_equal_to_scale(found, oracle(x_RD, matrices, sizes, gates_R, dy_RD))


@pytest.mark.parametrize("sizes", [[0, 2, 0, 1, 0, 0, 1, 0], [0] * 7 + [5]], ids=str)
def test_fewer_rows_than_groups(sizes):
    x_RD, matrices, gates_R, dy_RD = arrays(5, 8)
    found = both("in a stack", x_RD, matrices, sizes, gates_R, dy_RD)
    assert_trees_equal_to_scale(found, oracle(x_RD, matrices, sizes, gates_R, dy_RD))


def test_gates_of_one_are_none():
    x_RD, matrices, _, dy_RD = arrays(90, 2)
    y_RD, (dx_RD, gradients, nothing) = both("alone", x_RD, matrices, [40, 50], None, dy_RD)
    expected = oracle(x_RD, matrices, [40, 50], np.ones(90), dy_RD)
    assert nothing is None
    assert_trees_equal_to_scale((y_RD, (dx_RD, gradients)), (expected[0], expected[1][:2]))


def test_padding_may_hold_anything():
    x_RD, matrices, gates_R, dy_RD = arrays(200, 3)
    sizes = [50, 0, 60]
    clean = both("alone", x_RD.at[110:].set(0), matrices, sizes, gates_R, dy_RD.at[110:].set(0))
    dirty = both("alone", x_RD.at[110:].set(jnp.nan), matrices, sizes, gates_R, dy_RD.at[110:].set(jnp.inf))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    y_RD, (dx_RD, gradients, dgates_R) = dirty
    assert all((np.asarray(x)[110:] == 0).all() for x in (y_RD, dx_RD, dgates_R))
    assert all((np.asarray(dw)[1] == 0).all() for dw in gradients)


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16(way):
    x_RD, matrices, gates_R, dy_RD = arrays(600, 2, jnp.bfloat16)
    sizes = [520, 70]
    found = both(way, x_RD, matrices, sizes, gates_R, dy_RD)
    assert [x.dtype for x in jax.tree.leaves(found)] == [jnp.bfloat16] * 5 + [jnp.float32]
    assert_trees_equal_to_scale(
        jax.tree.map(lambda x: x.astype(jnp.float32), found), oracle(x_RD, matrices, sizes, gates_R, dy_RD), 0.02
    )


def test_frozen_matrices_pass_a_gradient_on():
    x_RD, matrices, gates_R, dy_RD = arrays(90, 2)
    sizes_E = jnp.array([40, 50], jnp.int32)

    def networks(x_RD):
        stacks = [in_stack(w, trained=False) for w in matrices]
        return grouped_swiglu(x_RD, stacks, sizes_E, gates_R, backend="blocked")[0]

    y_RD, pull = jax.vjp(networks, x_RD)
    expected = oracle(x_RD, matrices, [40, 50], gates_R, dy_RD)
    assert_trees_equal_to_scale((y_RD, pull(dy_RD)[0]), (expected[0], expected[1][0]))


def test_a_gradient_nobody_asks_for_is_not_made():
    x_RD, matrices, gates_R, _ = arrays(8, 2)

    def loss(x_RD):
        return grouped_swiglu(x_RD, matrices, jnp.array([3, 5], jnp.int32), gates_R, backend="blocked")[0].sum()

    # Three products forward and three back, none for the matrices.
    assert str(jax.make_jaxpr(jax.grad(loss))(x_RD)).count("dot_general") == 6


@pytest.mark.parametrize(
    ("policy", "products", "kept"), [("none", 9, ["[8,16]", "[8,48]", "[8,48]", "[8]"]), ("full", 12, ["[8]"])]
)
def test_a_checkpoint_keeps_what_it_is_told_to(policy, products, kept, capsys):
    x_RD, matrices, gates_R, _ = arrays(8, 2)
    sizes_E = jnp.array([3, 5], jnp.int32)

    def layer(x_RD, matrices):
        return jnp.sin(grouped_swiglu(x_RD, matrices, sizes_E, gates_R, backend="blocked")[0]), None

    layer = rematerialise(layer, policy, barrier=False)

    def loss(x_RD, matrices):
        return layer(x_RD, matrices)[0].sum()

    # With eight rows there is one height of a block. Three products forward, and two for each of them backward. No
    # matrix is kept but as an argument, and the gates are a constant.
    assert str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x_RD, matrices)).count("dot_general") == products
    jax.ad_checkpoint.print_saved_residuals(loss, x_RD, matrices)
    found = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "from the argument" not in line]
    assert sorted(line for line in found if line.startswith("f32[")) == [f"f32{shape}" for shape in kept]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "ragged"}, "'ragged' is one by itself: use `grouped_matmul` thrice"),
        ({"sizes_E": jnp.zeros(3, jnp.int32)}, "must agree in D, E and F"),
        ({"matrices": [jnp.zeros((2, D, F))] * 3}, "must agree in D, E and F"),
        ({"x_RD": jnp.zeros((8, D), jnp.bfloat16)}, "x_RD is bfloat16 and the matrices float32"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    x_RD, matrices, _, _ = arrays(8, 2)
    arguments = {"x_RD": x_RD, "matrices": matrices, "sizes_E": jnp.zeros(2, jnp.int32), "backend": "blocked"}
    with pytest.raises(ValueError, match=message):
        grouped_swiglu(**(arguments | changes))


def test_no_rows():
    x_RD, matrices, gates_R, dy_RD = arrays(0, 3)
    y_RD, (dx_RD, gradients, _) = both("alone", x_RD, matrices, [0, 0, 0], gates_R, dy_RD)
    assert y_RD.shape == dx_RD.shape == (0, D)
    assert all((np.asarray(dw) == 0).all() for dw in gradients)
