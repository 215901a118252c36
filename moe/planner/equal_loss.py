"""The dense model that would reach a mixture of experts' loss on the same tokens.

By the joint scaling law of Ludziejewski et al. (arXiv 2502.05172), equation 6 with the coefficients of its table 3:

    L(N, D, E) = a Ê^δ N^(α + γ ln Ê) + b Ê^ω D^(β + ζ ln Ê) + c

of N active parameters, embeddings among them, D tokens and E experts, of which each token takes one. Fitted up to
2.7e9 active parameters, 80e9 tokens and 32 experts: beyond that it extrapolates.
"""

import math
from dataclasses import replace

from moe.model.config import ConfigError, ModelConfig

A, ALPHA, DELTA, GAMMA = 35.91, -0.1889, -0.2285, 0.0098
B, BETA, OMEGA, ZETA = 35.98, -0.1775, 0.5529, -0.0259
FEWEST, MOST, C = 2.0732, 290.4521, 1.3637
SOURCE = "the joint scaling law of arXiv 2502.05172, table 3"
TOKENS_PER_PARAMETER = 20
"""Fewer tokens than this for each active parameter lie outside the law, and of training worth its compute (arXiv
2203.15556): a shorter run is taken for the beginning of one that long."""
ROUND = 128
"""Widths are multiples of it, as products on GPUs want them."""


def transformed(experts: float) -> float:
    """Ê of the law: saturates at both ends (its equation 5, after arXiv 2202.01169)."""
    return 1 / (1 / (experts - 1 + 1 / (1 / FEWEST - 1 / MOST)) + 1 / MOST)


def loss(active: float, tokens: float, experts: float) -> float:
    """Nats a token."""
    few, log = transformed(experts), math.log(transformed(experts))
    by_size = A * few**DELTA * active ** (ALPHA + GAMMA * log)
    return by_size + B * few**OMEGA * tokens ** (BETA + ZETA * log) + C


def dense_parameters(active: float, tokens: float, experts: float) -> float:
    """Parameters of the dense model of equal loss; never fewer than the mixture's active ones."""
    wanted, dense = loss(active, tokens, experts), transformed(1)
    log = math.log(dense)
    left = wanted - B * dense**OMEGA * tokens ** (BETA + ZETA * log) - C
    if left <= 0:
        raise ConfigError(f"no dense model reaches the loss of {experts:g} experts on {tokens:.3g} tokens by {SOURCE}")
    return max(active, (left / (A * dense**DELTA)) ** (1 / (ALPHA + GAMMA * log)))


def dense_twin(model: ModelConfig, active: int, tokens: float) -> ModelConfig:
    """`model` with one wide feed-forward network in place of its experts, at equal loss.

    A shared expert's width counts as that of a chosen one: E is all experts' width over the chosen ones'.

    Args:
        active: parameters of `model` that take part in one token.
        tokens: of the whole training.
    """
    chosen = model.router.top_k + model.num_shared_experts
    experts = (model.num_experts + model.num_shared_experts) / chosen
    wanted = dense_parameters(active, max(tokens, TOKENS_PER_PARAMETER * active), experts)
    layers, moe_layers = model.num_layers, model.num_layers - model.num_dense_layers
    networks = 3 * model.d_model * (moe_layers * chosen * model.d_expert + model.num_dense_layers * model.d_dense)
    routers = moe_layers * model.d_model * model.num_experts
    width = (wanted - (active - networks - routers)) / (3 * model.d_model * layers)
    return replace(
        model, num_experts=0, num_shared_experts=0, num_dense_layers=0, d_expert=0,
        d_dense=round(width / ROUND) * ROUND,
        router=replace(model.router, top_k=1, capacity_factor=None, overflow="drop"),
    )  # fmt: skip
