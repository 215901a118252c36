"""The exchanges compiled for eight H20s: XLA's own ragged all-to-all, and what runs while rows travel."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from moe.model.config import ModelConfig, RouterConfig
from moe.model.execution import Execution
from moe.model.moe_layer import MoELayer
from moe.model.precision import Precision
from parallel.exchange import WireFormat
from parallel.layout import Layout
from parallel.mesh import MeshConfig
from tests.gpu_compile.target import h20_mesh, needs_plugin
from tests.parallel.exchange.collectives import bytes_of
from tests.parallel.exchange.program import main_computation

pytestmark = needs_plugin

B, T, D, F, E = 8, 1024, 1024, 1024, 16


def compiled_layer(exchange: str, chunks: int = 1, gradients: bool = True, wire: WireFormat = "bfloat16"):
    config = ModelConfig(
        vocab_size=10, d_model=D, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2,
        num_experts=E, d_expert=F, num_shared_experts=1, router=RouterConfig(top_k=2),
    )  # fmt: skip
    execution = Execution(grouped_matmul="ragged", exchange=exchange, exchange_chunks=chunks, devices_per_node=2)
    layout = Layout(h20_mesh(MeshConfig(expert=8)))

    def layer() -> MoELayer:
        return MoELayer(config, Precision(exchange=wire), execution, rngs=nnx.Rngs(0))

    graph, shapes = nnx.split(nnx.eval_shape(layer))
    whole = NamedSharding(layout.mesh, PartitionSpec())
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)

    def loss(weights, x_BTD):
        y_BTD, _ = nnx.merge(graph, weights)(x_BTD, jnp.ones((B, T), bool), jnp.int32(0), None, layout)
        return jnp.sin(y_BTD.astype(jnp.float32)).sum()

    x_BTD = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16, sharding=layout.activation("BTD"))
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1)) if gradients else loss).lower(weights, x_BTD)
    return lowered.compile({"xla_gpu_enable_latency_hiding_scheduler": True})


def groups_of(text: str, opcode: str) -> list[str]:
    return re.findall(rf" {opcode}\(.*?replica_groups=(\{{\{{.*?\}}\}})", text)


def test_ragged_compiles_to_xlas_own_operation():
    text = compiled_layer("ragged").as_text()
    # There and back, and the gradient of each.
    assert groups_of(text, "ragged-all-to-all-start") == ["{{0,1,2,3,4,5,6,7}}"] * 4
    # Of how many rows they are devices tell one another by an all-to-all.
    assert not received(text, "all-to-all-start")


def test_ragged_hierarchical_compiles_to_two_steps():
    found = groups_of(compiled_layer("ragged_hierarchical").as_text(), "ragged-all-to-all-start")
    # Rows there and back and the gradients, weights there and their gradients.
    assert found.count("{{0,2,4,6},{1,3,5,7}}") == 6
    assert found.count("{{0,1},{2,3},{4,5},{6,7}}") == 6


def received(text: str, opcode: str) -> list[str]:
    """What each exchange of rows gives. Counts of rows are integers of 32 and 64 bits."""
    return re.findall(rf"\), ((?:u8|bf16)\S+?)\{{\S*?\) {opcode}\(", text)


def test_rows_in_8_bits_take_33_bytes_where_bfloat16_takes_64():
    wide, short = (
        received(compiled_layer("padded", wire=wire).as_text(), "all-to-all-start") for wire in ("bfloat16", "fp8")
    )
    # There and back, and the gradient of each: blocks of 2048 rows for each device.
    assert wide == [f"bf16[8,2048,{D}]"] * 4
    assert short == [f"u8[8,2048,{D * 33 // 32}]"] * 4
    assert sum(map(bytes_of, short)) / sum(map(bytes_of, wide)) == 33 / 64


def test_ragged_rows_in_8_bits_travel_as_bytes():
    found = received(compiled_layer("ragged", wire="int8").as_text(), "ragged-all-to-all-start")
    there, back = f"u8[16384,{D * 33 // 32}]", f"u8[2048,{D * 33 // 32}]"
    assert sorted(found) == [there, there, back, back]


@pytest.mark.parametrize("exchange", ["padded", "ragged"])
def test_the_shared_expert_is_scheduled_while_rows_travel(exchange):
    opcode = {"padded": "all-to-all", "ragged": "ragged-all-to-all"}[exchange]
    program = main_computation(compiled_layer(exchange, chunks=2, gradients=False).as_text())
    travelling, meanwhile = set(), []
    for name, each in program.items():
        if each.opcode == f"{opcode}-start" and "bf16[" in each.line:
            travelling.add(name)
        elif each.opcode == f"{opcode}-done":
            travelling -= {*each.operands}
        elif travelling and "dot_general" in each.line:
            meanwhile.append(each.line)
    assert any("/shared_expert/" in line for line in meanwhile), meanwhile
