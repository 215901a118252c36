"""The layouts that a search goes through, as changes of an experiment's settings."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from moe.model.config import ModelConfig
from parallel.mesh import MeshConfig

AXES = tuple(field.name for field in fields(MeshConfig))


@dataclass(frozen=True)
class Savings:
    """One way to make a step fit, by what it costs: the later in `SAVINGS`, the dearer.

    changes: of settings.
    """

    name: str
    changes: Mapping[str, Any]


SAVINGS = (
    Savings("nothing recomputed", {"execution.remat": "none"}),
    Savings("products kept", {"execution.remat": "matmuls"}),
    Savings("all recomputed", {"execution.remat": "full"}),
    Savings("optimizer states on the host", {"execution.remat": "full", "layout.optimizer_states": "host"}),
    Savings(
        "bfloat16 parameters; gradients, optimizer states and float32 master weights on the host",
        {
            "execution.remat": "full",
            "layout.optimizer_states": "host",
            "layout.gradients": "host",
            "precision.parameters": "bfloat16",
            "precision.gradients": "bfloat16",
            "optimizer.master_weights": True,
        },
    ),
)
"""Tried in this order for each mesh: the first that fits is the fastest that does, for each adds work to the last."""


def factorizations(devices: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ordered ways to write `devices` as a product of `parts` whole numbers, in lexical order."""
    if parts == 1:
        yield (devices,)
        return
    for first in (size for size in range(1, devices + 1) if devices % size == 0):
        for rest in factorizations(devices // first, parts - 1):
            yield (first, *rest)


def meshes(devices: int, per_node: int, model: ModelConfig, sequence_length: int) -> Iterator[MeshConfig]:
    """Meshes worth a look, in a fixed order.

    Left out is what cannot be better than a mesh that is there: `tensor` and `sequence` beyond a node (they send
    activations in every layer), more stages than groups of layers, more expert devices than experts, and sequences
    split into parts of fewer than 1024 tokens.
    """
    groups = math.ceil(model.num_layers / model.cla_factor)
    for sizes in factorizations(devices, len(AXES)):
        mesh = MeshConfig(**dict(zip(AXES, sizes, strict=True)))
        if mesh.tensor * mesh.sequence > per_node or mesh.stage > groups or mesh.expert > max(1, model.num_experts):
            continue
        if mesh.sequence > 1 and sequence_length // mesh.sequence < 1024:
            continue
        yield mesh


def microbatches(mesh: MeshConfig, batch_size: int) -> Iterator[int]:
    """Parts of the batch: powers of two that divide a device's rows; with stages at least as many as these, below which
    they mostly wait."""
    shards = mesh.replica * mesh.data * mesh.expert
    if batch_size % shards:
        return
    rows = batch_size // shards
    count = 1
    while count <= rows:
        if rows % count == 0 and (mesh.stage == 1 or count >= mesh.stage):
            yield count
        count *= 2


def settings_of(mesh: MeshConfig, parts: int, virtual: int) -> dict[str, Any]:
    """The changes that lay an experiment on `mesh` with so many microbatches and virtual stages."""
    changes: dict[str, Any] = {f"mesh.{axis}": size for axis, size in mesh.sizes.items()}
    return changes | {"training.microbatches": parts, "training.virtual_stages": virtual}


def virtual_stages(mesh: MeshConfig, parts: int, model: ModelConfig) -> list[int]:
    """Chunks of layers a stage: 1, and where microbatches come in groups of stages the most that divide the layers up
    to 8, which idles least."""
    groups = math.ceil(model.num_layers / model.cla_factor)
    if mesh.stage == 1 or parts % mesh.stage or groups % mesh.stage:
        return [1]
    most = max(v for v in range(1, 9) if groups // mesh.stage % v == 0)
    return sorted({1, most})
