"""Sums that tell one frozen base from another."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe.model.adapter import LoraConfig
from moe.model.config import ConfigError, ModelConfig
from moe.model.execution import Execution
from moe.model.hf.checkpoint import model_specs
from moe.model.pieces import pieces
from moe.model.precision import Precision
from moe.train.base import CheckedSource, base_sums, check_base, sum_on_host
from moe.train.optimizer import OptimizerConfig
from moe.train.state import make_blueprint
from moe.train.trained import ArraySource
from parallel.layout import SINGLE_DEVICE, Layout
from parallel.mesh import MeshConfig, make_mesh

MODEL = ModelConfig(
    vocab_size=16, d_model=8, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=4, num_experts=4, d_expert=6
)
NAME = "stacks.0.blocks.0.feed_forward.experts.w_up_EDF"


def blueprint_of(frozen="bfloat16", layout=SINGLE_DEVICE):
    precision = Precision(frozen=frozen)
    return make_blueprint(
        MODEL, precision, Execution(), OptimizerConfig(), layout, steps=10000, lora=LoraConfig(rank=2)
    )


@pytest.fixture(scope="module")
def frozen():
    r = np.random.default_rng(0)
    abstract = blueprint_of().abstract_state().frozen
    return jax.tree.map(lambda x: jnp.asarray(r.normal(size=x.shape), x.dtype), abstract)


def changed(frozen, layer: int, expert: int):
    """One bit of one number."""
    experts = frozen["stacks"][0]["blocks"][0]["feed_forward"]["experts"]
    w_LEDF = np.array(experts["w_up_EDF"])
    w_LEDF.view(np.uint16)[layer, expert, 3, 2] ^= 1
    block = frozen["stacks"][0]["blocks"][0]
    feed_forward = block["feed_forward"] | {"experts": experts | {"w_up_EDF": jnp.asarray(w_LEDF)}}
    return frozen | {"stacks": {0: {"blocks": {0: block | {"feed_forward": feed_forward}}}}}


def test_host_and_device_sum_as_a_loop_does(frozen):
    sums = base_sums(blueprint_of(), frozen)
    for piece in pieces(MODEL, model_specs(MODEL, Precision())):
        values = ArraySource(frozen).read(piece)
        bits = values.reshape(-1).view(np.uint16)
        expected = sum(int(x) * (2 * i + 1) for i, x in enumerate(bits)) % 2**32
        found = sums[piece.name]
        for place in piece.index:
            found = found[place]
        assert found == expected == sum_on_host(values)


def test_float32_is_summed_as_well():
    values = np.arange(7, dtype=np.float32).reshape(7, 1) - 3
    expected = sum(int(x) * (2 * i + 1) for i, x in enumerate(values.reshape(-1).view(np.uint32))) % 2**32
    assert sum_on_host(values) == expected


@pytest.mark.slow
def test_every_mesh_has_the_same_sums():
    layout = Layout(make_mesh(MeshConfig(data=2, expert=2, tensor=2)))
    alone, spread = blueprint_of("int8"), blueprint_of("int8", layout)
    frozen = alone.create_state(seed=0).frozen
    moved = jax.device_put(frozen, spread.shardings().frozen)
    assert base_sums(alone, frozen) == base_sums(spread, moved)
    assert f"{NAME}.scales" in base_sums(alone, frozen)


def test_another_base_is_refused_by_the_parameters_name(frozen, tmp_path):
    file = tmp_path / "base.json"
    with pytest.raises(ConfigError, match=r"base.json: cannot be read .*start another --run-dir"):
        check_base(file, blueprint_of(), frozen, begins=False)
    check_base(file, blueprint_of(), frozen, begins=True)
    check_base(file, blueprint_of(), frozen, begins=False)
    with pytest.raises(ConfigError, match=f"{NAME} differs: init_from, or the seed, gives another base"):
        check_base(file, blueprint_of(), changed(frozen, 1, 2), begins=False)
    assert json.loads(file.read_text()) == base_sums(blueprint_of(), frozen)


def test_a_piece_of_another_base_is_refused_as_it_is_read(frozen, tmp_path):
    file = tmp_path / "base.json"
    check_base(file, blueprint_of(), frozen, begins=True)
    # The run had it in bfloat16, and the folder has it wide.
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), changed(frozen, 1, 2))
    source = CheckedSource(ArraySource(wide), file, np.dtype(ml_dtypes.bfloat16))
    refused = []
    for piece in pieces(MODEL, model_specs(MODEL, Precision())):
        try:
            assert source.read(piece).dtype == source.dtype(piece) == np.float32
        except ConfigError as error:
            refused.append(str(error))
    assert len(refused) == 1
    assert refused[0].startswith(f"{NAME}.1.2 differs: these weights are not those")
