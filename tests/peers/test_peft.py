"""Adapters put over a model by Hugging Face's PEFT and by us, from the same files: `make test-peers`."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.model.adapter import LoraConfig, Target
from moe.model.execution import Execution
from moe.model.hf.checkpoint import HfCheckpoint, model_specs
from moe.model.hf.peft import PeftFolder, export_adapters
from moe.model.merge import MergedSource, StackedAdapters
from moe.model.pieces import load
from moe.model.precision import FULL
from moe.model.transformer import Transformer
from moe.train.optimizer import OptimizerConfig
from moe.train.state import make_blueprint
from moe.train.trained import ArraySource
from parallel.layout import SINGLE_DEVICE

torch = pytest.importorskip("torch", reason="run by `make test-peers` in an environment of its own")
transformers = pytest.importorskip("transformers", reason="run by `make test-peers` in an environment of its own")
peft = pytest.importorskip("peft", reason="run by `make test-peers` in an environment of its own")

SETTINGS = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "initializer_range": 0.3, "max_position_embeddings": 64, "pad_token_id": None, "intermediate_size": 48,
    "num_experts": 4, "moe_topk": 2, "head_dim": 8, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0, "rope_theta": 10000.0},
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peer") / "model"
    torch.manual_seed(0)
    config = transformers.HunYuanMoEV1Config(**SETTINGS)
    model = transformers.HunYuanMoEV1ForCausalLM._from_config(config, attn_implementation="eager")
    model.save_pretrained(folder)
    return HfCheckpoint(folder)


def peer(checkpoint):
    return transformers.HunYuanMoEV1ForCausalLM.from_pretrained(checkpoint.folder, attn_implementation="eager").eval()


def theirs(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def ours(checkpoint, source) -> np.ndarray:
    params = load(source, checkpoint.config, model_specs(checkpoint.config, FULL), SINGLE_DEVICE, jnp.float32)
    graph = nnx.graphdef(nnx.eval_shape(lambda: Transformer(checkpoint.config, FULL, Execution(), rngs=nnx.Rngs(0))))
    return _logits(nnx.merge(graph, params, {}))


@nnx.jit
def _logits(model: Transformer) -> jax.Array:
    return model.logits(model(TOKENS).hidden_BTD)


def assert_same(found, expected, before) -> None:
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * scale)
    assert np.abs(before - expected).max() > 0.05 * scale


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
WRITTEN = {
    "attention": {"target_modules": ATTENTION, "lora_dropout": 0.1},
    "all linear layers and parameters": {
        "target_modules": ATTENTION,
        "target_parameters": [*FUSED, *(f"mlp.shared_mlp.{name}_proj.weight" for name in ("gate", "up", "down"))],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"mlp.experts.down_proj": 5},
    },
    "gate_up_proj alone": {"target_modules": [], "target_parameters": FUSED[:1]},
    "down_proj alone": {"target_modules": [], "target_parameters": FUSED[1:]},
}


@pytest.mark.parametrize("what", WRITTEN)
def test_we_read_what_peft_writes(what, checkpoint, tmp_path):
    model = peer(checkpoint)
    before = theirs(model)
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **WRITTEN[what])
    model = peft.get_peft_model(model, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "peft")
    adapters = PeftFolder(tmp_path / "peft", checkpoint.config, checkpoint.family)
    assert_same(ours(checkpoint, MergedSource(checkpoint, adapters)), theirs(model), before)


@pytest.mark.parametrize(
    ("targets", "family"),
    [
        (get_args(Target), "hunyuan_v1_moe"),
        (("gate", "down"), "hunyuan_v1_moe"),
        (("q", "up"), "hunyuan_v1_moe"),
        (("q", "k", "v", "o"), "hunyuan"),
    ],
    ids=str,
)
def test_peft_reads_what_we_write(targets, family, checkpoint, tmp_path):
    lora = LoraConfig(rank=4, alpha=6.0, dropout=0.1, targets=targets)
    adam = OptimizerConfig()
    blueprint = make_blueprint(checkpoint.config, FULL, Execution(), adam, SINGLE_DEVICE, steps=10000, lora=lora)
    r = np.random.default_rng(1)
    params = jax.tree.map(lambda x: r.normal(0, 0.3, x.shape).astype(np.float32), blueprint.abstract_state().params)
    base = load(checkpoint, checkpoint.config, model_specs(checkpoint.config, FULL), SINGLE_DEVICE, jnp.float32)
    beside = blueprint.model(params, {}, base)
    beside.eval()

    adapters = StackedAdapters(ArraySource(params), lora)
    written = tmp_path / "peft"
    export_adapters(adapters, lora, np.dtype(np.float32), checkpoint.config, family, "base", written)
    model = peer(checkpoint)
    before = theirs(model)
    model = peft.PeftModel.from_pretrained(model, written).eval()
    expected = theirs(model)
    assert_same(_logits(beside), expected, before)
    again = PeftFolder(written, checkpoint.config, checkpoint.family)
    for source in (adapters, again):
        assert_same(ours(checkpoint, MergedSource(checkpoint, source)), expected, before)
    assert_same(theirs(model.merge_and_unload()), expected, before)
