import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from moe.model.config import ConfigError, ModelConfig, RopeConfig, RouterConfig
from moe.model.execution import Execution
from moe.model.hf.__main__ import main
from moe.model.hf.checkpoint import hf_tensors
from moe.model.hf.config import differences, hunyuan_settings, model_config
from moe.model.hf.convert import export_trained
from moe.model.precision import FULL
from moe.model.presets import HUNYUAN_LARGE, SPEED_158M, TINY
from moe.model.transformer import Transformer
from moe.train.trained import ArraySource
from tests.oracle import transformer as oracle

RELEASED = {
    "architectures": ["HunYuanForCausalLM"], "attention_bias": False, "attention_dropout": 0.1, "bos_token_id": 1,
    "capacity_factor": 1.0, "cla_share_factor": 2, "eos_token_id": 127960, "hidden_act": "silu", "hidden_size": 6400,
    "initializer_range": 0.02, "intermediate_size": 18304, "max_position_embeddings": 262144, "mlp_bias": False,
    "model_type": "hunyuan", "moe_drop_tokens": False, "moe_random_routing_dropped_token": False, "moe_topk": 1,
    "num_attention_heads": 80, "num_experts": 16, "num_hidden_layers": 64, "num_key_value_heads": 8,
    "num_shared_expert": 1, "pad_token_id": 127961, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"alpha": 100000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "type": "dynamic"},
    "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.41.2",
    "use_cache": True, "use_cla": True, "use_mixed_mlp_moe": True, "use_qk_norm": True, "vocab_size": 128512,
}  # fmt: skip


def test_the_released_config_is_our_preset():
    family, config = model_config(RELEASED)
    assert family == "hunyuan"
    assert config == replace(HUNYUAN_LARGE, padding_id=127961)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"cla_share_factor": 4}, {"cla_factor": 4}),
        ({"use_cla": False}, {"cla_factor": 1}),
        ({"use_qk_norm": False}, {"qk_norm": "none"}),
        ({"use_mixed_mlp_moe": False}, {"num_shared_experts": 0}),
        ({"num_shared_expert": [2] * 64}, {"num_shared_experts": 2}),
        ({"moe_topk": 3}, {"router": RouterConfig(top_k=3)}),
        ({"tie_word_embeddings": False}, {"tie_embeddings": False}),
        ({"rope_scaling": None}, {"rope": RopeConfig(frequencies="bfloat16")}),
        ({"rope_scaling": {"type": "dynamic", "alpha": 1000.0}}, {"rope": RopeConfig(ntk_alpha=1000.0)}),
        ({"pad_token_id": None}, {"padding_id": None}),
        ({"pad_token_id": -1}, {"padding_id": 128511}),
        ({"moe_intermediate_size": [128] * 64}, {"d_expert": 128}),
        ({"moe_layer_num_skipped": 1}, {"num_dense_layers": 1, "d_dense": 18304}),
        ({"attention_head_dim": 128}, {"head_dim": 128}),
        (
            {"num_experts": 1},
            {"num_experts": 0, "d_expert": 0, "d_dense": 18304, "num_shared_experts": 0},
        ),
    ],
    ids=str,
)
def test_each_setting_is_heard(changes, expected):
    _, config = model_config(RELEASED | changes)
    assert config == replace(HUNYUAN_LARGE, **{"padding_id": 127961} | expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama' is not implemented; hunyuan, hunyuan_v1_moe, mixtral"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling=.*linear.* is not implemented"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling=.* is not implemented"),
        ({"rope_scaling": {"type": "dynamic", "alpha": 2.0, "wave": 1}}, "has wave, not known here"),
        ({"attention_bias": True}, "attention_bias=True is not implemented; False is"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"pretraining_tp": 2}, "pretraining_tp=2 is not implemented; 1"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not implemented"),
        ({"use_mla": True}, "use_mla=True"),
        ({"quantization_config": {"bits": 4}}, "serve it as it is, or give the checkpoint before it"),
        ({"moe_topk": [1, 2]}, "moe_topk=.* differs from layer to layer"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False is not implemented"),
        ({"new_lever": 3}, "new_lever=3 is a setting that is not known here"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_key_value_heads": 7}, "num_kv_heads=7"),
        ({"hidden_size": "wide"}, "config.json"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        model_config(RELEASED | changes)


@pytest.mark.parametrize("config", [HUNYUAN_LARGE, SPEED_158M, TINY])
def test_what_we_train_is_exported_as_what_it_is(config):
    _, again = model_config(hunyuan_settings(config, "bfloat16"))
    assert differences(config, again) == []


def test_models_that_the_release_lacks_are_not_exported():
    with pytest.raises(ConfigError, match="model.qk_norm='before_rope': the released code knows 'none' only"):
        hunyuan_settings(replace(TINY, qk_norm="before_rope", cla_factor=1), "float32")
    with pytest.raises(ConfigError, match="no place for the selection biases"):
        hunyuan_settings(replace(TINY, router=RouterConfig(balance="bias")), "float32")


SMALL = ModelConfig(
    vocab_size=40, d_model=16, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=4, num_experts=4, d_expert=12,
    cla_factor=2, init_std=0.3, rope=RopeConfig(ntk_alpha=1000.0),
)  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"cla_factor": 4, "router": RouterConfig(top_k=3)}, marks=pytest.mark.slow),
        pytest.param({"tie_embeddings": False, "qk_norm": "none"}, marks=pytest.mark.slow),
        pytest.param({"num_shared_experts": 0, "rope": RopeConfig(ntk_alpha=1.0)}, marks=pytest.mark.slow),
        pytest.param({"num_experts": 0, "d_dense": 20}, marks=pytest.mark.slow),
        {"num_dense_layers": 1, "d_dense": 20, "head_dim": 8},
    ],
    ids=str,
)
def test_an_exported_model_evaluates_to_the_oracle(changes, tmp_path):
    config = replace(SMALL, **changes)
    params = nnx.to_pure_dict(nnx.state(Transformer(config, FULL, Execution(), rngs=nnx.Rngs(0)), nnx.Param))
    export_trained(ArraySource(params), config, tmp_path / "model", lambda count: None)
    ids = np.asarray(jax.random.randint(jax.random.key(1), (1, 12), 0, config.vocab_size))
    save_file({"input_ids": ids}, tmp_path / "in.safetensors")
    arguments = ["--inputs", str(tmp_path / "in.safetensors"), "--output", str(tmp_path / "out.safetensors")]
    assert main(["evaluate", str(tmp_path / "model"), *arguments]) == 0
    found = load_file(tmp_path / "out.safetensors")
    expected = oracle.logits(params, config, ids[0], np.arange(12), np.ones(12))
    np.testing.assert_allclose(found["logits"][0], expected, atol=2e-5 * np.abs(expected).max())
    names = {f"grad.{tensor.name}" for tensor in hf_tensors(config, "hunyuan")}
    assert {name for name in found if name.startswith("grad.")} == names
    grown = ids[:, :8]
    for _ in range(16):
        logits = oracle.logits(params, config, grown[0], np.arange(grown.shape[1]), np.ones(grown.shape[1]))
        grown = np.append(grown, [[logits[-1].argmax()]], axis=1)
    np.testing.assert_array_equal(found["greedy_ids"], grown)


def test_a_config_that_is_no_json_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED)[:50])
    assert main(["import", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "is not JSON" in capsys.readouterr().err
