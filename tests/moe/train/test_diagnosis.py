"""The first tensor that goes wrong, where one is made to."""

import jax.numpy as jnp
import pytest

from moe.model.precision import Precision
from moe.train.diagnosis import first_wrong
from tests.moe.train.test_scaled import batch_of, blueprint_of


def told(precision, change, microbatches=1):
    blueprint = blueprint_of(precision)
    state = blueprint.create_state(seed=0)
    change(state.params, state.histories)
    return first_wrong(blueprint, state, batch_of(), seed=0, microbatches=microbatches, loss_chunk=16)


def block_of(tree, layer):
    return tree["stacks"][layer]["blocks"][0]


@pytest.mark.slow
def test_nothing_is_wrong():
    assert told(Precision(matmuls="fp8"), lambda params, histories: None) is None


@pytest.mark.slow
def test_a_weight_by_layer():
    def change(params, histories):
        w = block_of(params, 1)["attention"]["w_q_DNH"]
        block_of(params, 1)["attention"]["w_q_DNH"] = w.at[0, 3, 2].set(jnp.nan)

    assert told(Precision(), change) == (
        "the first tensor that is not finite is the weight attention.w_q_DNH of layer 1: its largest magnitude is "
        "infinite, or no number"
    )


def test_an_activation_by_layer_and_product_and_its_scale():
    """The norm before the dense layer's network makes what goes into it infinite."""

    def change(params, histories):
        block = block_of(params, 0)
        block["feed_forward_norm_D"] = block["feed_forward_norm_D"] * 1e38
        block["feed_forward"]["w_gate_DF"] = block["feed_forward"]["w_gate_DF"] * 1e3

    sentence = told(Precision(matmuls="int8"), change, microbatches=2)
    assert sentence.startswith(
        "the first tensor that is not finite is the activation that goes into feed_forward's product 'down' of layer 0"
    )
    assert sentence.endswith("scale nan (int8, tensor)")


@pytest.mark.slow
def test_an_overflow_under_delayed_scaling():
    def change(params, histories):
        known = block_of(histories, 1)["feed_forward"]["experts"]["products"]["histories"]
        known["up"] = known["up"].at[:, 1].set(1e-3)

    sentence = told(Precision(matmuls="fp8", scaling="delayed"), change)
    assert sentence.startswith(
        "the first tensor that is over its format's range more than 16 times is the weight in feed_forward.experts's "
        "product 'up' of layer 1: its largest magnitude is "
    )
    assert sentence.endswith("its scale 3.8147e-06 (float8_e4m3fn, delayed)")
