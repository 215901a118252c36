"""States of every optimizer come back from a checkpoint bit by bit, and the next step with them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe.train.checkpoint import CheckpointStore
from moe.train.optimizer import OptimizerConfig, make_optimizer
from moe.train.state import TrainState
from tests.moe.train.optimizers.shapes import SPECS, values


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        pytest.param({"states": "int8"}, "float32", marks=pytest.mark.slow),
        ({"states": "fp8", "rounding": "kahan"}, "bfloat16"),
        pytest.param({"kind": "adafactor"}, "float32", marks=pytest.mark.slow),
        pytest.param({"kind": "muon", "states": "fp8"}, "float32", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_resumed_run_takes_the_same_step(tmp_path, settings, dtype):
    optimizer, _ = make_optimizer(OptimizerConfig(warmup_steps=0, **settings), SPECS, 100)

    @jax.jit
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = values(0, dtype)
    after = step(params, optimizer.init(params), values(1))
    state = TrainState(jnp.int32(1), after[0], {}, after[1], {}, {})
    store = CheckpointStore(tmp_path, fingerprint="f", keep=1)
    store.save(1, state, {})
    store.wait()
    restored = store.restore_latest(jax.eval_shape(lambda: state), print).state
    store.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for found, expected in (
        (restored, state),
        (step(restored.params, restored.opt_state, values(2)), step(state.params, state.opt_state, values(2))),
    ):
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(expected)]
