"""How the next token is chosen from its logits, for each row of a batch in its own way."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class SamplingError(ValueError):
    """A setting that cannot be sampled with: names it, its value, and what would work."""


@dataclass(frozen=True)
class Sampling:
    """
    max_tokens: most tokens to generate.
    temperature: by which logits are divided; 0 takes the likeliest token.
    top_k: only the k likeliest tokens; 0 for all.
    top_p: only the likeliest tokens that together have this probability (arXiv 1904.09751).
    seed: of the draws; the same seed gives the same text, whatever else is computed beside it.
    stop: texts that end the answer; they are not part of it.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("top_k", 0), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
                raise SamplingError(f"{name}={value!r}: give a whole number from {least} to {2**31 - 1}")
        for name, low, high in (("temperature", 0.0, 100.0), ("top_p", 0.0, 1.0)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
                raise SamplingError(f"{name}={value!r}: give a number from {low} to {high}")
        if self.top_p == 0:
            raise SamplingError("top_p=0: no token has probability 0 or less; give more than 0")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise SamplingError(f"stop={self.stop!r}: give texts that are not empty")


class SamplingRows(NamedTuple):
    """The settings of a batch's rows. f32, i32, f32, u32, and i32: tokens already generated in each row."""

    temperature_B: jax.Array | np.ndarray
    top_k_B: jax.Array | np.ndarray
    top_p_B: jax.Array | np.ndarray
    seed_B: jax.Array | np.ndarray
    count_B: jax.Array | np.ndarray


def sampling_rows(settings: list[Sampling], counts: list[int]) -> SamplingRows | None:
    """The rows of several requests; None where each of them takes its likeliest tokens, so that a program without draws
    may be compiled."""
    if not any(each.temperature for each in settings):
        return None
    return SamplingRows(
        np.array([each.temperature for each in settings], np.float32),
        np.array([each.top_k for each in settings], np.int32),
        np.array([each.top_p for each in settings], np.float32),
        np.array([each.seed for each in settings], np.uint32),
        np.array(counts, np.int32),
    )


def choose_tokens(logits_BV: jax.Array, rows: SamplingRows | None) -> jax.Array:
    """i32[B]. A draw depends on its row's logits, settings, seed and count alone."""
    greedy_B = logits_BV.argmax(-1).astype(jnp.int32)
    if rows is None:
        return greedy_B
    return jnp.where(rows.temperature_B > 0, jax.vmap(_draw)(logits_BV, rows), greedy_B)


def _draw(logits_V: jax.Array, row: SamplingRows) -> jax.Array:
    logits_V = logits_V / jnp.maximum(row.temperature_B, 1e-6)
    sorted_V, tokens_V = jax.lax.top_k(logits_V, logits_V.size)
    probs_V = jax.nn.softmax(sorted_V)
    before_V = jnp.cumsum(probs_V) - probs_V
    rank_V = jnp.arange(logits_V.size)
    allowed_V = (before_V < row.top_p_B) & ((row.top_k_B == 0) | (rank_V < row.top_k_B))
    allowed_V |= rank_V == 0
    key = jax.random.fold_in(jax.random.key(row.seed_B), row.count_B)
    return tokens_V[jax.random.categorical(key, jnp.where(allowed_V, sorted_V, -jnp.inf))].astype(jnp.int32)
