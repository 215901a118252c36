import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.model.parameter import ParameterSpec
from moe.train.optimizers import moments
from moe.train.optimizers.moments import (
    MomentFormat,
    all_decoded,
    all_zero,
    block_of,
    dynamic_map,
    format_of,
)
from tests.oracle import moments as oracle

# One compilation instead of one for each operation.
encoded = jax.jit(moments.encoded, static_argnums=1, static_argnames="signed")
decoded = jax.jit(moments.decoded, static_argnames="signed")


def values(signed: bool, shape=(2, 4, 6, 8)) -> np.ndarray:
    """Four decades in each block."""
    r = np.random.default_rng(0)
    x = r.normal(size=shape) * 10 ** r.uniform(-4, 0, shape)
    return (x if signed else x**2).astype(np.float32)


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map_is_that_of_the_paper(signed):
    np.testing.assert_allclose(dynamic_map(signed), oracle.dynamic_map(signed), rtol=1e-6)
    assert len(set(dynamic_map(signed).tolist())) == 256


@pytest.mark.parametrize("signed", [True, False])
def test_every_number_of_the_map_is_found_and_comes_back(signed):
    numbers = dynamic_map(signed)
    kept = encoded(jnp.asarray(numbers if signed else numbers**2), MomentFormat("int8", (256,)), signed=signed)
    np.testing.assert_array_equal(kept.values, np.arange(256))
    np.testing.assert_allclose(decoded(kept, signed=signed), numbers if signed else numbers**2, rtol=1e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_the_nearest_number_of_the_map_is_taken(signed):
    r = np.random.default_rng(0)
    x = (10 ** r.uniform(-7.5, 0, 20_000) * (r.choice([-1, 1], 20_000) if signed else 1)).astype(np.float32)
    x[0] = 1.0
    numbers = dynamic_map(signed)
    kept = encoded(jnp.asarray(x if signed else x**2), MomentFormat("int8", (20_000,)), signed=signed)
    nearest = np.abs(x[:, None] - numbers).min(1)
    found = np.abs(x - numbers[np.asarray(kept.values)])
    # Of second moments none above zero becomes zero.
    counted = np.abs(x) > numbers[numbers > 0][0]
    np.testing.assert_allclose(found[counted], nearest[counted], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_blocks_are_what_a_loop_over_them_gives(name, signed):
    x = values(signed)
    kept = encoded(jnp.asarray(x), MomentFormat(name, (1, 3, 4)), signed=signed)
    assert kept.values.shape == x.shape
    assert kept.values.dtype.itemsize == 1
    assert kept.scales.shape == (2, 4, 2, 2)
    found = np.asarray(decoded(kept, signed=signed))
    for i, j, k, n in np.ndindex(2, 4, 2, 2):
        block = np.s_[i, j, 3 * k : 3 * k + 3, 4 * n : 4 * n + 4]
        np.testing.assert_allclose(found[block], oracle.in_eight_bits(x[block], name, signed), rtol=1e-5)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_no_second_moment_above_zero_becomes_zero(name):
    x = jnp.array([[1.0, 1e-30, 0.0, 1e-12]])
    found = np.asarray(decoded(encoded(x, MomentFormat(name, (4,)), signed=False), signed=False))[0]
    assert found[1] > 0
    assert found[3] > 0
    assert found[2] == 0


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("format", [MomentFormat("int8", (4,)), MomentFormat("fp8", (4,)), MomentFormat("bfloat16")])
def test_a_run_begins_with_moments_of_zero(format, signed):
    zeros = all_zero({"w": format}, {"w": jnp.ones((2, 3, 8), jnp.bfloat16)}, signed)
    expected = {"w": encoded(jnp.zeros((2, 3, 8)), format, signed=signed)}
    jax.tree.map(np.testing.assert_array_equal, zeros, expected)
    assert not np.asarray(all_decoded(zeros, signed)["w"]).any()


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_plain_formats_only_round(name):
    x = jnp.asarray(values(True))
    kept = encoded(x, MomentFormat(name), signed=True)
    assert kept.dtype == name
    np.testing.assert_array_equal(decoded(kept, signed=True), x.astype(name).astype(jnp.float32))


@pytest.mark.parametrize(
    ("axes", "sizes", "block"),
    [
        # Hunyuan-Large: an eighth of F is 2288 = 16 x 11 x 13, of N 10.
        ("EDF", (16, 6400, 18_304), (1, 1, 208)),
        ("EFD", (16, 18_304, 6400), (1, 208, 1)),
        ("DNH", (6400, 80, 80), (1, 2, 80)),
        ("NHD", (80, 80, 6400), (2, 80, 1)),
        ("DF", (64, 1024), (1, 128)),
    ],
)
def test_blocks_divide_over_what_shares_out_parameters(axes, sizes, block):
    assert block_of(axes, sizes) == block
    for letter, size, length in zip(axes, sizes, block, strict=True):
        assert size % length == 0
        if letter in "NF":
            assert (size // 8) % length == 0


@pytest.mark.parametrize(
    ("axes", "shape", "kind", "states", "name"),
    [
        ("LEDF", (2, 4, 32, 32), "expert", "int8", "int8"),
        ("LEDF", (2, 2, 32, 32), "expert", "int8", "float32"),  # 2048 values a layer
        ("LDNH", (2, 64, 8, 8), "attention", "fp8", "fp8"),
        ("LDE", (2, 1024, 8), "router", "int8", "float32"),
        ("VD", (512, 64), "embedding", "int8", "float32"),
        ("VD", (512, 64), "embedding", "bfloat16", "bfloat16"),
        ("LD", (2, 8192), "norm", "int8", "float32"),
        ("LD", (2, 8192), "norm", "bfloat16", "float32"),
        ("LEDF", (2, 4, 32, 32), "expert", "float32", "float32"),
    ],
)
def test_small_and_sparse_parameters_keep_their_moments_wide(axes, shape, kind, states, name):
    assert format_of(ParameterSpec(shape, jnp.dtype("float32"), axes, kind), states).name == name


def test_eight_bits_need_blocks():
    with pytest.raises(ValueError, match="moments in int8 with block="):
        MomentFormat("int8")


def test_one_format_serves_a_whole_tree():
    assert jax.tree.leaves(MomentFormat("float32")) == [MomentFormat("float32")]
