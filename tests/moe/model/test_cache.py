import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.model.cache import empty_cache
from moe.model.config import ModelConfig, RopeConfig, RouterConfig
from moe.model.execution import Execution
from moe.model.precision import FULL
from moe.model.presets import HUNYUAN_LARGE
from moe.model.transformer import Transformer

SMALL = ModelConfig(
    vocab_size=50, d_model=16, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=4, d_expert=12,
    cla_factor=2, init_std=0.3, rope=RopeConfig(ntk_alpha=1000.0), router=RouterConfig(top_k=2),
)  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cla_factor": 1},
        {"cla_factor": 4},
        {"cla_factor": 3, "num_layers": 5},
        {"num_dense_layers": 1, "d_dense": 20},
        {"qk_norm": "none"},
        {"cla_factor": 1, "qk_norm": "before_rope"},
    ],
    ids=str,
)
def test_ragged_prompts_then_single_tokens_give_the_recomputed_hidden_states(changes):
    config = dataclasses.replace(SMALL, **changes)
    model = Transformer(config, FULL, Execution(), rngs=nnx.Rngs(0))
    tokens_BT = jax.random.randint(jax.random.key(1), (3, 12), 0, config.vocab_size)
    expected_BTD = model(tokens_BT).hidden_BTD
    lengths_B = jnp.array([5, 1, 7])

    prompt_BT = jnp.arange(7)[None] < lengths_B[:, None]
    output = model(tokens_BT[:, :7], None, prompt_BT.astype(jnp.int32), cache=empty_cache(config, 3, 7, jnp.float32))
    for b, length in enumerate(lengths_B):
        np.testing.assert_allclose(output.hidden_BTD[b, :length], expected_BTD[b, :length], atol=1e-5)

    cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 5), (0, 0), (0, 0))), output.cache)
    step = jax.jit(lambda tokens_B1, slots_B1, cache: model(tokens_B1, slots_B1, cache=cache))
    for taken in range(5):
        slots_B1 = (lengths_B + taken)[:, None]
        output = step(jnp.take_along_axis(tokens_BT, slots_B1, 1), slots_B1, cache)
        cache = output.cache
        for b, slot in enumerate(slots_B1[:, 0]):
            np.testing.assert_allclose(output.hidden_BTD[b, 0], expected_BTD[b, slot], atol=1e-5)


@pytest.mark.parametrize(
    ("kv_heads", "cla_factor", "kib"),
    [(80, 1, 1600), (8, 1, 160), (1, 1, 20), (80, 2, 800), (8, 2, 80)],
    ids=["MHA", "GQA", "MQA", "CLA", "GQA+CLA"],
)
def test_bytes_per_token_are_the_reports(kv_heads, cla_factor, kib):
    config = dataclasses.replace(HUNYUAN_LARGE, num_kv_heads=kv_heads, cla_factor=cla_factor)
    assert empty_cache(config, 1, 2, jnp.bfloat16).bytes_per_token == kib * 1024


def test_layer_inputs_begin_with_the_embedding():
    model = Transformer(SMALL, FULL, Execution(), rngs=nnx.Rngs(0))
    tokens_BT = jnp.arange(6).reshape(1, 6)
    inputs_LBTD = model(tokens_BT, keep_layer_inputs=True).layer_inputs_LBTD
    assert inputs_LBTD.shape == (4, 1, 6, 16)
    np.testing.assert_array_equal(inputs_LBTD[0], model.embedding_VD[...][tokens_BT])
    assert model(tokens_BT).layer_inputs_LBTD is None
