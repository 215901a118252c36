"""What the backward pass is saved, and in which format: read from the traced program, which nothing has optimized."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import moe.model.block
import moe.ops.matmul
from moe.model.config import ConfigError, ModelConfig, RouterConfig
from moe.model.execution import Execution
from moe.model.precision import FULL, Precision
from moe.model.transformer import Transformer

B, T, D = 3, 80, 32
BF16 = Precision()
MODEL = ModelConfig(
    vocab_size=64, d_model=D, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=4, d_expert=48,
    cla_factor=2, router=RouterConfig(top_k=2),
)  # fmt: skip
TOKENS = jax.ShapeDtypeStruct((B, T), jnp.int32)


def saved(precision: Precision = BF16, **execution) -> list[jax.ShapeDtypeStruct]:
    """What a forward pass leaves for the backward one, but for the parameters."""
    execution = Execution(**({"attention": "chunked"} | execution))
    model = nnx.eval_shape(lambda: Transformer(MODEL, precision, execution, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def pullback(params, tokens_BT, rest):
        def loss(params):
            output = nnx.merge(graph, params, rest)(tokens_BT)
            return output.hidden_BTD.astype(jnp.float32).sum() + output.stats.penalty(MODEL.router)

        return jax.vjp(loss, params)[1]

    return jax.tree.leaves(jax.eval_shape(pullback, params, TOKENS, rest).opaque_residuals)


def wide_activations(found: list[jax.ShapeDtypeStruct]) -> list[jax.ShapeDtypeStruct]:
    """float32 of at least a number for each of a token's D channels. No weight has so many."""
    return [x for x in found if x.dtype == jnp.float32 and x.size >= B * T * D]


def size(found: list[jax.ShapeDtypeStruct]) -> int:
    return sum(x.size * x.dtype.itemsize for x in found)


@pytest.mark.parametrize("remat", ["none", "matmuls", "matmuls_fp8", "full"])
@pytest.mark.parametrize("gate", ["after", "before"])
@pytest.mark.parametrize("processor", [True, False], ids=["with products of bfloat16", "without"])
def test_no_wide_activation_is_saved_where_compute_is_bfloat16(remat, gate, processor, monkeypatch):
    monkeypatch.setattr(moe.ops.matmul, "multiplies_bfloat16", lambda: processor)
    monkeypatch.setattr(moe.ops.matmul, "_MANY_ROWS", 1)
    assert not wide_activations(saved(remat=remat, gate=gate))


def test_a_norm_that_saves_a_float32_copy_would_be_found(monkeypatch):
    def plain(x, weight, eps):
        x_f32 = x.astype(jnp.float32)
        normalised = x_f32 * jax.lax.rsqrt(jnp.square(x_f32).mean(-1, keepdims=True) + eps)
        return normalised.astype(x.dtype) if weight is None else weight * normalised.astype(x.dtype)

    monkeypatch.setattr(moe.model.block, "rms_norm", plain)
    assert len(wide_activations(saved())) >= 2 * MODEL.num_layers


def test_scores_have_the_softmaxs_format():
    def of_scores(precision):
        found = [x for x in saved(precision, attention="dense") if x.shape[-2:] == (T, T) and x.dtype != jnp.bool]
        return {str(x.dtype) for x in found}

    assert "float32" in of_scores(Precision())
    # As bits (moe/ops/bits.py).
    assert of_scores(Precision(softmax="bfloat16")) == {"uint16"}


def test_weighing_before_the_down_projection_saves_the_output_rows():
    rows = B * T * MODEL.router.top_k
    outputs = 2 * rows * D * MODEL.num_layers
    # What is saved instead: a number a row.
    assert size(saved()) - size(saved(gate="before")) >= outputs - 4 * 2 * rows * MODEL.num_layers


def test_products_are_kept_in_a_byte_a_number():
    """Those of attention and the shared experts, but for the last, which nothing reads; and four bytes a vector."""
    wide, narrow = saved(remat="matmuls"), saved(remat="matmuls_fp8")
    queries, keys, hidden = 4 * 8, 2 * 8, 48
    numbers = B * T * (MODEL.num_layers * (queries + D + 2 * hidden + D) - D + 2 * keys)
    assert sum(x.size for x in narrow if x.dtype == jnp.float8_e4m3fn) == numbers
    assert size(wide) - size(narrow) > 0.7 * numbers


@pytest.mark.parametrize(
    ("precision", "execution", "told"),
    [
        (FULL, {"remat": "matmuls_fp8"}, "precision.compute='float32'"),
        (Precision(softmax="bfloat16"), {"attention": "auto"}, "execution.attention='dense'"),
        (Precision(softmax="bfloat16"), {"attention": "chunked"}, "precision.softmax='bfloat16'"),
    ],
)
def test_refusals_name_the_remedy(precision, execution, told):
    with pytest.raises(ConfigError, match=told):
        saved(precision, **execution)
