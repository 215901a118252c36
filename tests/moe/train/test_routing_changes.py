import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.model.precision import FULL, Precision
from moe.train.routing_changes import changed_choices, changed_share
from tests.moe.train.test_scaled import MODEL, batch_of, blueprint_of


def test_share_of_changed_choices():
    """Three tokens of two choices each, of four experts; the third is padding."""
    one = jnp.array([[[0, 1], [2, 3], [4, 4]]])
    assert float(changed_share(one, jnp.array([[[1, 0], [3, 2], [4, 4]]]), 4)) == 0
    assert float(changed_share(one, jnp.array([[[1, 2], [0, 1], [4, 4]]]), 4)) == pytest.approx(3 / 4)


@pytest.fixture(scope="module")
def changed():
    state = blueprint_of(FULL).create_state(seed=0)

    @jax.jit
    def by(params):
        return [
            changed_choices(MODEL, params, state.balance, batch_of(), FULL, after)
            for after in (FULL, Precision(), Precision(matmuls="fp8"))
        ]

    return [np.asarray(share) for share in by(state.params)]


@pytest.mark.slow
def test_a_coarser_format_changes_more(changed):
    none, by_bf16, by_fp8 = changed
    # Of the two layers one has experts.
    assert none.shape == (1,)
    assert none[0] == 0
    assert by_bf16[0] < by_fp8[0] < 0.5
