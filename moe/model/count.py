"""Parameters and FLOPs of a model, counted from its specs; no array is made."""

import math
from typing import Any, NamedTuple

import jax

from moe.model.config import ModelConfig
from moe.model.parameter import ParameterSpec


class ParameterCount(NamedTuple):
    """total: all parameters. active: those that take part in one token's forward pass."""

    total: int
    active: int


def _by_kind(specs: dict[str, Any]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for spec in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, ParameterSpec)):
        sizes[spec.kind] = sizes.get(spec.kind, 0) + math.prod(spec.shape)
    return sizes


def count_parameters(config: ModelConfig, specs: dict[str, Any]) -> ParameterCount:
    """A token uses K of E routed experts and all the rest."""
    sizes = _by_kind(specs)
    total = sum(sizes.values())
    routed = sizes.get("expert", 0)
    active_routed = routed * config.router.top_k // config.num_experts if routed else 0
    return ParameterCount(total, total - routed + active_routed)


def train_flops_per_token(
    config: ModelConfig, specs: dict[str, Any], sequence_length: int, *, frozen: bool = False
) -> float:
    """Model FLOPs of one token's forward and backward pass, without recomputation.

    6 per active parameter of a matrix product (the embedding's lookup is none; a tied head is one), and for causal
    attention 12 · L · N · H · T / 2, as PaLM counts them (arXiv 2204.02311, appendix B), halved for causality.

    Args:
        frozen: whether the parameters have no gradients, which saves a third of their FLOPs; adapters beside them are
            not counted.
    """
    sizes = _by_kind(specs)
    lookup = sizes["embedding"] if not config.tie_embeddings else 0
    in_products = count_parameters(config, specs).active - sizes.get("norm", 0) - lookup
    attention = 6 * config.num_layers * config.num_heads * config.head_dim * sequence_length
    return float((4 if frozen else 6) * in_products + attention)
