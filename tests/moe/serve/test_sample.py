import dataclasses

import numpy as np
import pytest
from flax import nnx

from moe.model.execution import Execution
from moe.model.precision import FULL
from moe.model.presets import TINY
from moe.model.transformer import Transformer
from moe.serve.sample import sample_text
from moe.train.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["a small text to learn from " * 20], 270)
MODEL = Transformer(
    dataclasses.replace(TINY, vocab_size=TOKENIZER.size, d_model=32, num_layers=2, d_expert=16, init_std=0.2),
    FULL,
    Execution(),
    rngs=nnx.Rngs(0),
)


def test_greedy_text_is_what_the_whole_model_says_at_each_step():
    tokens = TOKENIZER.encode("a small")
    for _ in range(8):
        hidden_BTD = MODEL(np.array([tokens], np.int32)).hidden_BTD
        token = int(MODEL.logits(hidden_BTD)[0, -1].argmax())
        if token == TOKENIZER.eos:
            break
        tokens.append(token)
    assert sample_text(MODEL, TOKENIZER, "a small", length=8, temperature=0) == TOKENIZER.decode(tokens)


def test_draws_follow_the_seed():
    first, again, other = (sample_text(MODEL, TOKENIZER, "a", length=20, temperature=2.0, seed=s) for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(("prompt", "length"), [("", 5), ("a", 0)])
def test_what_cannot_be_sampled(prompt, length):
    with pytest.raises(ValueError, match="give"):
        sample_text(MODEL, TOKENIZER, prompt, length=length)
