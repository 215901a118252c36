import dataclasses
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from moe.model import cache as cache_module
from moe.model.cache import cache_axes, empty_cache
from moe.model.config import ModelConfig, RopeConfig, RouterConfig
from moe.model.execution import Execution
from moe.model.precision import FULL
from moe.model.presets import HUNYUAN_LARGE
from moe.model.transformer import Transformer

SMALL = ModelConfig(
    vocab_size=50, d_model=16, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=4, d_expert=12,
    cla_factor=2, init_std=0.3, rope=RopeConfig(ntk_alpha=1000.0), router=RouterConfig(top_k=2),
)  # fmt: skip


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"cla_factor": 4}, marks=pytest.mark.slow),
        {"cla_factor": 3, "num_layers": 5},
        {"num_dense_layers": 1, "d_dense": 20},
        pytest.param({"qk_norm": "none"}, marks=pytest.mark.slow),
        {"cla_factor": 1, "qk_norm": "before_rope"},
    ],
    ids=str,
)
def test_ragged_prompts_then_single_tokens_give_the_recomputed_hidden_states(changes, unrolled):
    config = dataclasses.replace(SMALL, **changes)
    model = Transformer(config, FULL, Execution(), rngs=nnx.Rngs(0))
    if unrolled:
        model.unroll()
    tokens_BT = jax.random.randint(jax.random.key(1), (3, 12), 0, config.vocab_size)
    expected_BTD = model(tokens_BT).hidden_BTD
    lengths_B = jnp.array([5, 1, 7])

    prompt_BT = jnp.arange(7)[None] < lengths_B[:, None]
    cache = empty_cache(config, 3, 7, jnp.float32, unrolled=unrolled)
    output = model(tokens_BT[:, :7], None, prompt_BT.astype(jnp.int32), cache=cache)
    for b, length in enumerate(lengths_B):
        np.testing.assert_allclose(output.hidden_BTD[b, :length], expected_BTD[b, :length], atol=1e-5)

    more_slots = [(0, 5 if axis == "S" else 0) for axis in cache_axes()]
    cache = jax.tree.map(lambda x: jnp.pad(x, more_slots), output.cache)
    step = jax.jit(lambda tokens_B1, slots_B1, cache: model(tokens_B1, slots_B1, cache=cache))
    for taken in range(5):
        slots_B1 = (lengths_B + taken)[:, None]
        output = step(jnp.take_along_axis(tokens_BT, slots_B1, 1), slots_B1, cache)
        cache = output.cache
        for b, slot in enumerate(slots_B1[:, 0]):
            np.testing.assert_allclose(output.hidden_BTD[b, 0], expected_BTD[b, slot], atol=1e-5)


@pytest.mark.parametrize("num_heads", [2, 4], ids=["MHA", "GQA"])
@pytest.mark.parametrize("rows", [1, 3])
def test_no_text_is_turned_around_or_copied_for_its_next_token(rows, num_heads, monkeypatch):
    config = dataclasses.replace(SMALL, num_heads=num_heads, num_layers=2)
    model = Transformer(config, FULL, Execution(), rngs=nnx.Rngs(0))
    model.unroll()
    token_B1, slot_B1 = jnp.zeros((rows, 1), jnp.int32), jnp.full((rows, 1), 40)

    def moved() -> bool:
        cache = empty_cache(config, rows, 97, jnp.float32, unrolled=True)
        step = jax.jit(lambda *given, cache: model(*given, cache=cache), donate_argnames="cache")
        text = step.lower(token_B1, slot_B1, cache=cache).compile().as_text()
        shapes = re.findall(r"= f32\[([\d,]*)\]\S* (?:transpose|copy)\(", text)
        return any({"97", str(config.head_dim)} <= set(shape.split(",")) for shape in shapes)

    assert not moved()
    monkeypatch.setattr(cache_module, "cache_axes", lambda: "BGSMH")
    assert moved()


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


@pytest.mark.parametrize(("format", "dtype"), [("int8", jnp.int8), ("fp8", jnp.float8_e4m3fn)])
def test_each_token_and_head_keeps_the_nearest_values_to_a_scale_of_its_own(format, dtype):
    config = dataclasses.replace(SMALL, cla_factor=4)
    rng = np.random.default_rng(0)
    k_BTMH, v_BTMH = (rng.normal(size=(2, 3, 2, 8)).astype(np.float32) * 10.0 ** rng.integers(-3, 3) for _ in "kv")
    k_BTMH[0, 1, 0] = 0
    (cache,) = empty_cache(config, 2, 5, jnp.float32, format=format).stacks
    start_B = jnp.array([0, 2])
    k_BSMH, v_BSMH, (cache, _) = cache.group(jnp.int32(0)).append(jnp.asarray(k_BTMH), jnp.asarray(v_BTMH), start_B)
    assert cache.keys.dtype == cache.values.dtype == dtype
    for found_BSMH, given_BTMH in ((k_BSMH, k_BTMH), (v_BSMH, v_BTMH)):
        for b, t, m in np.ndindex(2, 3, 2):
            expected_H = _nearest(given_BTMH[b, t, m], format)
            np.testing.assert_array_equal(found_BSMH[b, start_B[b] + t, m], expected_H)


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_seen_and_stays_with_its_token_and_head(format, value):
    k_BTMH = jnp.ones((1, 2, 2, 8)).at[0, 0, 1, 3].set(value)
    (cache,) = empty_cache(dataclasses.replace(SMALL, cla_factor=4), 1, 2, jnp.float32, format=format).stacks
    k_BSMH, _, _ = cache.group(jnp.int32(0)).append(k_BTMH, k_BTMH, jnp.array([0]))
    assert not jnp.isfinite(k_BSMH[0, 0, 1, 3])
    assert jnp.isfinite(k_BSMH).all((2, 3)).sum() == 1
    assert jnp.isfinite(k_BSMH[0, 0, 0]).all()


def _nearest(x_H, format):
    """By hand: the largest magnitude over the format's largest value, in bfloat16, and multiples of it."""
    scale = np.float32(ml_dtypes.bfloat16(np.abs(x_H).max() / np.float32(127 if format == "int8" else 448)))
    if scale == 0:
        return np.zeros_like(x_H)
    if format == "int8":
        return np.array([min(127, max(-127, np.round(x / scale))) * scale for x in x_H], np.float32)
    return np.array([np.float32(ml_dtypes.float8_e4m3fn(min(448, max(-448, x / scale)))) * scale for x in x_H])


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_a_cache_in_8_bits_counts_its_scales(format):
    cache = empty_cache(HUNYUAN_LARGE, 1, 2, jnp.bfloat16, format=format)
    # Keys and values of 32 groups of 8 heads of 80 values, and two bytes of scale for each head.
    assert cache.bytes_per_token == 2 * 32 * 8 * (80 + 2)
