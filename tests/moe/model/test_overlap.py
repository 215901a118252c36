"""What may run at the same time, from the compiled layer: chunks' exchanges wait for no expert, nor the shared one."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moe.model.config import ModelConfig, RouterConfig
from moe.model.execution import Execution
from moe.model.moe_layer import MoELayer
from moe.model.precision import FULL
from parallel.layout import Layout
from parallel.mesh import MeshConfig, make_mesh
from tests.parallel.exchange.program import ancestors, main_computation

B, T, D, F, CHUNKS = 8, 8, 16, 24, 2


def compiled_layer(exchange: str) -> str:
    config = ModelConfig(
        vocab_size=10, d_model=D, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2,
        num_experts=8, d_expert=F, num_shared_experts=1, router=RouterConfig(top_k=2),
    )  # fmt: skip
    execution = Execution(exchange=exchange, exchange_chunks=CHUNKS, devices_per_node=2)
    layout = Layout(make_mesh(MeshConfig(expert=8)))
    graph, weights = nnx.split(MoELayer(config, FULL, execution, rngs=nnx.Rngs(0)))

    def apply(weights, x_BTD):
        return nnx.merge(graph, weights)(x_BTD, jnp.ones((B, T), bool), jnp.int32(0), None, layout)[0]

    given = jax.ShapeDtypeStruct((B, T, D), jnp.float32, sharding=layout.activation("BTD"))
    return jax.jit(apply).lower(weights, given).compile().as_text()


@pytest.mark.parametrize("exchange", ["padded", pytest.param("hierarchical", marks=pytest.mark.slow)])
def test_chunks_and_the_shared_expert_do_not_wait_for_one_another(exchange):
    program = main_computation(compiled_layer(exchange))
    waits_for = {name: ancestors(program, name) for name in program}
    crossings = [name for name, each in program.items() if each.opcode == "all-to-all"]
    experts = {name for name, each in program.items() if "/experts/" in each.line and each.opcode == "while"}
    shared = {name for name, each in program.items() if "/shared_expert/" in each.line and each.opcode != "parameter"}
    assert experts
    assert shared

    there = [name for name in crossings if not waits_for[name] & experts]
    back = [name for name in crossings if waits_for[name] & experts]
    assert len(back) == CHUNKS * {"padded": 1, "hierarchical": 2}[exchange]
    assert len(there) > len(back)
    # What comes back waits for the experts of its own chunk alone.
    assert all(len(waits_for[name] & experts) == len(experts) / CHUNKS for name in back)
    for name in crossings:
        assert not waits_for[name] & shared
    products = {name for name in shared if "dot_general" in program[name].line}
    assert products
    for name in products:
        assert not waits_for[name] & {*crossings, *experts}
