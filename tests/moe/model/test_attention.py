"""How arrays of attention travel where `sequence` splits sequences; the numbers: tests/moe/train/test_layouts.py."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moe.model.attention import Attention, Sight
from moe.model.config import ConfigError, ModelConfig
from moe.model.execution import Execution
from moe.model.precision import FULL
from moe.ops.rope import rope_tables
from parallel.layout import Layout, LayoutConfig
from parallel.mesh import MeshConfig, make_mesh

B, T = 2, 64
CONFIG = ModelConfig(
    vocab_size=8, d_model=16, num_layers=1, num_heads=8, num_kv_heads=4, head_dim=8, num_experts=0, d_dense=8
)  # fmt: skip


def compiled(config: LayoutConfig, execution: Execution) -> str:
    layout = Layout(make_mesh(MeshConfig(sequence=4)), config)
    graph, weights = nnx.split(Attention(CONFIG, FULL, execution, projects_kv=True, rngs=nnx.Rngs(0)))

    def apply(weights, x_BTD, positions_BT, segments_BT):
        sight = Sight(positions_BT, segments_BT, rope_tables(positions_BT, CONFIG.head_dim, theta=1e4))
        return nnx.merge(graph, weights)(x_BTD, sight, None, layout)[0]

    x_BTD = jax.ShapeDtypeStruct((B, T, CONFIG.d_model), jnp.float32, sharding=layout.activation("BTD"))
    number_BT = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=layout.activation("BT"))
    return jax.jit(apply).lower(weights, x_BTD, number_BT, number_BT).compile().as_text()


def moved(text: str) -> dict[str, set[str]]:
    """Number formats by the collective that moves them."""
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        match = re.search(r"= (.*?) (all-to-all|all-gather|all-reduce|collective-permute)\(", line)
        if match:
            found.setdefault(match[2], set()).update(re.findall(r"\b(f32|s32|pred)\[", match[1]))
    return found


# Below ZeRO-3 the weights are whole, and what is gathered is no weight.


def test_heads_travel_by_all_to_all_and_only_the_documents_are_gathered():
    assert moved(compiled(LayoutConfig(sequence="heads", zero=1), Execution())) == {
        "all-to-all": {"f32"},
        "all-gather": {"s32"},
    }


def test_on_a_ring_nothing_is_gathered():
    assert set(moved(compiled(LayoutConfig(sequence="ring", zero=1), Execution()))) == {"collective-permute"}


@pytest.mark.parametrize("backend", ["dense", "cudnn"])
def test_a_ring_has_a_backend_of_its_own(backend):
    with pytest.raises(
        ConfigError, match=f"execution.attention='{backend}' with layout.sequence='ring': the ring comp"
    ):
        compiled(LayoutConfig(sequence="ring"), Execution(attention=backend))
