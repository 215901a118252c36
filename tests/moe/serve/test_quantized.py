"""A model whose matrices are quantized as they are read."""

import re

import jax
import numpy as np
import pytest

from moe import HunyuanMoE
from moe.model.config import ConfigError
from moe.ops.quantize import QuantizedWeight
from moe.serve.generate import main
from parallel.mesh import MeshConfig
from tests.moe.train.small_run import small_run

TOKENS = np.random.default_rng(0).integers(0, 300, (8, 24))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    small_run(folder / "run", folder / "corpus", "training.steps=60", "training.evaluate_every=60")
    return folder / "run"


@pytest.fixture(scope="module")
def expected(run):
    return HunyuanMoE.from_hf(run)(TOKENS)


def difference(found, expected):
    """Root mean square, relative to the spread of the expected logits."""
    return float(np.sqrt(((found - expected) ** 2).mean()) / expected.std())


# Three bits of mantissa round a weight by 2.6% (root mean square), so fp8 may not be held to less.
@pytest.mark.parametrize(("weights", "limit"), [("int8", 0.01), ("fp8", 0.03), ("int4", 0.1), ("nf4", 0.1)])
def test_a_trained_models_logits_stay_close(run, expected, weights, limit):
    found = difference(HunyuanMoE.from_hf(run, weights=weights)(TOKENS), expected)
    assert limit / 50 < found < limit


@pytest.mark.parametrize(
    ("weights", "mesh"),
    [
        pytest.param("int4", MeshConfig(data=2, expert=4), marks=pytest.mark.slow),
        pytest.param("int8", MeshConfig(data=2, expert=2, tensor=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_mesh_gives_the_same_tokens_and_logits(checkpoint, weights, mesh):
    alone = HunyuanMoE.from_hf(checkpoint, weights=weights)
    spread = HunyuanMoE.from_hf(checkpoint, weights=weights, mesh=mesh)
    np.testing.assert_allclose(spread(TOKENS), alone(TOKENS), atol=1e-5 * np.abs(alone(TOKENS)).max())
    prompts = [[5, 6, 7], [9]]
    assert spread.generate(prompts, max_tokens=6) == alone.generate(prompts, max_tokens=6)


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8), ("fp8", 8), ("int4", 4)])
def test_matrices_take_the_bits_of_their_format(checkpoint, weights, bits):
    params = HunyuanMoE.from_hf(checkpoint, weights=weights).weights.params
    found = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, QuantizedWeight))
    matrices = [x for x in found if isinstance(x, QuantizedWeight)]
    # Of each two layers that share k and v: q, o, three of the routed experts and of the shared; k and v of the first.
    assert len(matrices) == 2 * (2 * (2 + 3 + 3) + 2)
    assert all(8 * x.values.nbytes == bits * np.prod(x.shape) for x in matrices)
    others = {x.shape for x in found if not isinstance(x, QuantizedWeight)}
    assert others == {(300, 32), (32,), (1, 32), (1, 8), (1, 32, 4)}


@pytest.mark.parametrize("cache", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_neighbours_change_nothing_in_a_cache_in_8_bits(checkpoint, cache):
    model = HunyuanMoE.from_hf(checkpoint, cache=cache)
    together = model.generate([[5, 6, 7, 8], [9], [40, 41]], max_tokens=6)
    assert together[1:2] == model.generate([[9]], max_tokens=6)


@pytest.mark.slow
def test_a_mesh_keeps_the_same_cache(checkpoint):
    alone = HunyuanMoE.from_hf(checkpoint, cache="int8")
    spread = HunyuanMoE.from_hf(checkpoint, cache="int8", mesh=MeshConfig(data=2, expert=2, tensor=2))
    prompts = [[5, 6, 7], [9]]
    assert spread.generate(prompts, max_tokens=6) == alone.generate(prompts, max_tokens=6)


def test_the_command_takes_the_format(checkpoint, capsys):
    arguments = [str(checkpoint), "--prompt", "In the", "--max-tokens", "4", "--weights"]
    assert main([*arguments, "int4", "--cache", "fp8"]) == 0
    assert capsys.readouterr().out.startswith("In the")
    with pytest.raises(SystemExit):
        main([*arguments, "int3"])


def test_a_format_that_is_none(checkpoint):
    with pytest.raises(ConfigError, match="precision.frozen='int3': give one of float32, bfloat16, int8, fp8, int4"):
        HunyuanMoE.from_hf(checkpoint, weights="int3")
    with pytest.raises(ConfigError, match="precision.cache='int4': give one of fp8, int8, or none"):
        HunyuanMoE.from_hf(checkpoint, cache="int4")


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_prompts_are_multiplied_in_8_bits_and_single_tokens_are_not(checkpoint, format):
    model = HunyuanMoE.from_hf(checkpoint, weights=format, activations=format)
    dtype = "i8" if format == "int8" else "f8_e4m3fn"

    def quantized_rows(*shape):
        weights = model.weights
        forward = jax.make_jaxpr(lambda params, tokens: weights.served.model(params, weights.balance)(tokens))
        program = str(forward(weights.params, np.zeros(shape, np.int32)))
        return len(re.findall(rf":{dtype}\[[\d,]+\] = convert_element_type", program))

    # In each of a group's two layers: q, o, three of the shared expert and three of the routed ones; k and v in one.
    assert quantized_rows(1, 4) == 2 * 8 + 2
    assert quantized_rows(4, 1) == 0


@pytest.mark.parametrize("format", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_products_in_8_bits_stay_close(checkpoint, format):
    expected = HunyuanMoE.from_hf(checkpoint, weights=format)(TOKENS)
    found = HunyuanMoE.from_hf(checkpoint, weights=format, activations=format)(TOKENS)
    # Of most tokens: those whose experts change are far off.
    assert 1e-3 < float(np.median(np.abs(found - expected)) / expected.std()) < 0.1


@pytest.mark.slow
def test_a_mesh_multiplies_in_8_bits_too(checkpoint):
    alone = HunyuanMoE.from_hf(checkpoint, weights="int8", activations="int8")(TOKENS)
    model = HunyuanMoE.from_hf(checkpoint, weights="int8", activations="int8", mesh=MeshConfig(data=2, expert=4))
    # A value in the middle between two may be rounded to either.
    assert difference(np.asarray(model(TOKENS)), np.asarray(alone)) < 2e-3


def test_activations_are_quantized_as_the_weights_are(checkpoint):
    for weights in ("int4", None, "fp8"):
        with pytest.raises(ConfigError, match=f"precision.activations='int8' with precision.frozen={weights!r}: give"):
            HunyuanMoE.from_hf(checkpoint, weights=weights, activations="int8")
