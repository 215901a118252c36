import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import HunyuanMoE
from moe.model.config import ConfigError
from moe.serve.engine import ContextError
from moe.serve.sampling import SamplingError
from moe.train.pretrained import open_pretrained
from moe.train.trained import TrainedModel
from parallel.layout import SINGLE_DEVICE
from parallel.mesh import MeshConfig
from tests.moe.train.small_run import small_run

PROMPTS = [[5, 6, 7], [9], [20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120, 130, 140, 150, 160, 170, 180, 190]]

LONGEST = 32
"""Tokens of the longest text of these and what is generated, so that one shape is compiled."""


def recomputed(model, prompt, count):
    """Greedy tokens from the whole text each time, without a cache. What follows the text does not count."""
    tokens, length = list(prompt), len(prompt)
    for last in range(length - 1, length - 1 + count):
        rest = [0] * (LONGEST - len(tokens))
        tokens.append(int(model([tokens + rest])[0, last].argmax()))
        if tokens[-1] in model.vocabulary.eos:
            return tokens[len(prompt) : -1]
    return tokens[len(prompt) :]


def test_ragged_prompts_together_give_what_recomputing_each_alone_gives(model):
    together = model.generate(PROMPTS, max_tokens=12)
    assert together == [recomputed(model, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=2, expert=4),
        pytest.param(MeshConfig(replica=2, expert=2), marks=pytest.mark.slow),
        pytest.param(MeshConfig(expert=2, tensor=2), marks=pytest.mark.slow),
    ],
)
def test_a_mesh_gives_the_same_tokens_and_logits(model, checkpoint, mesh):
    sharded = HunyuanMoE.from_hf(checkpoint, mesh=mesh)
    assert sharded.generate(PROMPTS, max_tokens=12) == model.generate(PROMPTS, max_tokens=12)
    logits, expected = sharded(PROMPTS[2:]), model(PROMPTS[2:])
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


def test_draws_follow_the_seed_alone(model):
    one = model.generate(PROMPTS, max_tokens=20, temperature=1.5, top_p=0.9, seed=1)
    assert one == [model.generate([prompt], max_tokens=20, temperature=1.5, top_p=0.9, seed=1)[0] for prompt in PROMPTS]
    assert one != model.generate(PROMPTS, max_tokens=20, temperature=1.5, top_p=0.9, seed=2)


def test_text_streams_to_what_is_generated_at_once(model):
    options = {"max_tokens": 30, "temperature": 1.0, "seed": 4}
    whole = model.generate("In the beginning", **options)
    parts = list(model.stream("In the beginning", **options))
    assert "".join(parts) == whole
    assert len(parts) > 5
    assert model.generate(["In the beginning"] * 2, **options) == [whole, whole]


def test_a_stop_text_ends_the_answer_and_is_left_out(model):
    options = {"max_tokens": 30, "temperature": 1.0, "seed": 4}
    whole = model.generate("In the beginning", **options)
    stop = whole[7:10]
    assert model.generate("In the beginning", stop=(stop,), **options) == whole[: whole.index(stop)]
    assert "".join(model.stream("In the beginning", stop=(stop,), **options)) == whole[: whole.index(stop)]


def test_chat_is_the_answer_to_its_tokens(model):
    special, encode = model.vocabulary.special, model.vocabulary.encode
    prompt = [special("<|startoftext|>"), *encode("be brief"), special("<|extra_4|>"), *encode("hi")]
    prompt.append(special("<|extra_0|>"))
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert model.chat(messages, max_tokens=8) == model.vocabulary.decode(model.generate([prompt], max_tokens=8)[0])


def test_a_model_that_trained_with_capacity_drops_nothing_when_it_serves(model):
    served = model.weights.served
    router = dataclasses.replace(served.config.router, capacity_factor=0.25)
    served = dataclasses.replace(served, config=dataclasses.replace(served.config, router=router))
    tight = HunyuanMoE(model.weights._replace(served=served), model.vocabulary, 2048, "tight")
    assert tight.generate(PROMPTS, max_tokens=5) == model.generate(PROMPTS, max_tokens=5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": ""}, ContextError, "no tokens"),
        ({"prompts": [[300]]}, ContextError, "go from 300 to 300: give 0 to 299"),
        ({"prompts": "a", "max_tokens": 5000}, ContextError, "together they may be at most 2048"),
        ({"prompts": "a", "max_tokens": 0}, SamplingError, "max_tokens=0: give a whole number from 1"),
        ({"prompts": "a", "temperature": -1}, SamplingError, "temperature=-1"),
        ({"prompts": "a", "top_p": 0}, SamplingError, "top_p=0"),
        ({"prompts": "a", "stop": ("",)}, SamplingError, "not empty"),
    ],
)
def test_what_cannot_be_generated(model, arguments, error, message):
    with pytest.raises(error, match=message):
        model.generate(**arguments)


def test_no_prompts_no_answers(model):
    assert model.generate([]) == []


def test_without_a_tokenizer_ids_work_and_texts_are_refused(checkpoint, tmp_path, model):
    for file in checkpoint.iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).symlink_to(file)
    bare = HunyuanMoE.from_hf(tmp_path)
    assert bare.generate(PROMPTS[:1], max_tokens=4) == model.generate(PROMPTS[:1], max_tokens=4)
    with pytest.raises(ConfigError, match=r"no tokenizer.json and no hy.tiktoken"):
        bare.generate("text")


def test_bf16_runs_and_keeps_its_cache_in_bf16(checkpoint):
    rough = HunyuanMoE.from_hf(checkpoint, compute="bfloat16")
    assert rough.weights.served.precision.compute_dtype == jnp.bfloat16
    assert len(rough.generate(PROMPTS[:1], max_tokens=4)[0]) <= 4


def test_matrices_in_the_compute_format_give_what_wider_ones_give(checkpoint):
    rough = HunyuanMoE.from_hf(checkpoint, compute="bfloat16")
    block = rough.weights.params["stacks"][0]["blocks"][0]
    matrices = jax.tree.leaves(block["feed_forward"]["experts"])
    # On CPU as bits.
    assert {x.dtype for x in matrices} == {jnp.dtype(jnp.uint16)}
    assert block["feed_forward"]["router"]["w_DE"].dtype == jnp.float32

    loaded = open_pretrained(checkpoint).load_unrolled(SINGLE_DEVICE, None)
    wide = HunyuanMoE(rough.weights._replace(params=loaded[0]), None, 64, "wide")
    assert {x.dtype for x in jax.tree.leaves(wide.weights.params)} == {jnp.dtype(jnp.float32)}
    tokens_BT = np.arange(24).reshape(2, 12)
    np.testing.assert_array_equal(rough(tokens_BT), wide(tokens_BT))


def test_a_run_is_a_model_too(tmp_path):
    small_run(tmp_path / "run", tmp_path / "corpus", "training.steps=3", "optimizer.warmup_steps=1")
    model = HunyuanMoE.from_hf(tmp_path / "run")
    params, _ = TrainedModel(tmp_path / "run").restore(model.weights.served.layout)
    np.testing.assert_array_equal(params["embedding_VD"], model.weights.params["embedding_VD"])
    assert isinstance(model.generate("Line 3 says", max_tokens=5), str)
