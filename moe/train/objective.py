"""What training makes small: the cross-entropy of a batch, and what routing adds."""

from collections.abc import Callable
from typing import Any

import jax

from moe.model.moe_layer import MoEStats
from moe.model.transformer import Transformer
from moe.train.data import Batch
from moe.train.loss import cross_entropy_sum
from moe.train.state import Blueprint
from parallel.layout import Layout

Objective = Callable[..., tuple[jax.Array, tuple[jax.Array, MoEStats | None]]]


def make_objective(blueprint: Blueprint, *, microbatches: int, loss_chunk: int) -> Objective:
    """The objective of one of `microbatches` parts of a step's batch, as a function of

    params, histories: what it is differentiated by.
    landing: by number of the stack, what its gradients are to be those of; None without.
    balance, frozen: of the model.
    batch: the part.
    key: of the part.
    num_targets: of the whole step, f32[].

    It tells the part's summed cross-entropy and the MoE layers' statistics besides.
    """
    router = blueprint.config.router

    def objective(
        params: Any,
        histories: Any,
        landing: Any,
        balance: Any,
        frozen: Any,
        batch: Batch,
        key: jax.Array,
        num_targets: jax.Array,
    ):
        model = blueprint.model(params, balance, frozen, histories)
        output = model(
            batch.tokens_BT,
            batch.positions_BT,
            batch.segments_BT,
            key=key,
            layout=blueprint.layout,
            landing=landing,
        )
        loss = summed_loss(model, output.hidden_BTD, batch, loss_chunk, blueprint.layout)
        total = loss / num_targets
        if output.stats is not None:
            total += output.stats.penalty(router) / microbatches
        return total, (loss, output.stats)

    return objective


def summed_loss(model: Transformer, hidden_BTD: jax.Array, batch: Batch, loss_chunk: int, layout: Layout) -> jax.Array:
    """The summed cross-entropy of a batch, nats, from what the model makes of it; see `cross_entropy_sum`."""
    return cross_entropy_sum(
        hidden_BTD,
        model.head_weight_VD,
        batch.targets_BT,
        batch.weights_BT,
        loss_chunk,
        layout,
        model.products.recipe,
        model.products.history("head"),
    )
