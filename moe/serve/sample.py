"""Text from a model, to look at after training. Recomputes the whole text for each token; no cache."""

import jax
import jax.numpy as jnp

from moe.model.transformer import Transformer
from moe.train.tokenizer import Tokenizer
from parallel.layout import SINGLE_DEVICE


def sample_text(
    model: Transformer, tokenizer: Tokenizer, prompt: str, *, length: int, temperature: float = 0.8, seed: int = 0
) -> str:
    """The prompt and up to `length` tokens more, on one device; ends where the model ends the document.

    Args:
        model: with its parameters on one device.
        temperature: by which the logits are divided; 0 takes the likeliest token.
        seed: of the draws.

    Raises:
        ValueError: an empty prompt, no length, or a negative temperature.
    """
    tokens = tokenizer.encode(prompt)
    if not tokens:
        raise ValueError("prompt is empty: give some text to go on from")
    if length < 1 or temperature < 0:
        raise ValueError(f"length={length}, temperature={temperature}: give at least 1 token and no negative number")
    # A row of fixed size compiles once; what lies behind the text is padding, which nothing sees.
    total = len(tokens) + length
    row_T = jnp.array(tokens + [tokenizer.pad] * length, jnp.int32)

    @jax.jit
    def draw(model: Transformer, row_T: jax.Array, count: jax.Array, key: jax.Array) -> jax.Array:
        segments_BT = (jnp.arange(total) < count)[None].astype(jnp.int32)
        hidden_BTD = model(row_T[None], None, segments_BT, key=key).hidden_BTD
        last_B1D = jax.lax.dynamic_slice_in_dim(hidden_BTD, count - 1, 1, axis=1)
        logits_V = model.logits(last_B1D, SINGLE_DEVICE)[0, 0]
        if temperature == 0:
            return logits_V.argmax()
        return jax.random.categorical(jax.random.fold_in(key, count), logits_V / temperature)

    key = jax.random.key(seed)
    for count in range(len(tokens), total):
        token = int(draw(model, row_T, jnp.int32(count), key))
        if token == tokenizer.eos:
            break
        row_T = row_T.at[count].set(token)
        tokens.append(token)
    return tokenizer.decode(tokens)
