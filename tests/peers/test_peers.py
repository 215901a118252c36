"""Other projects' models at tiny size, computed by Hugging Face's transformers and by us: `make test-peers`."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe.model.hf.__main__ import main

torch = pytest.importorskip("torch", reason="run by `make test-peers` in an environment of its own")
transformers = pytest.importorskip("transformers", reason="run by `make test-peers` in an environment of its own")

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
PEERS = {
    "hunyuan_a13b": ("HunYuanMoEV1", {
        "intermediate_size": 48, "num_experts": 6, "moe_topk": 3, "head_dim": 8, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0, "rope_theta": 10000.0},
    }),
    "hunyuan_a13b_top1_untied": ("HunYuanMoEV1", {
        "intermediate_size": 48, "num_experts": 4, "moe_topk": 1, "head_dim": 16, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }),
    "mixtral": ("Mixtral", {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", {
        "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3, "head_dim": 16,
        "norm_topk_prob": True,
    }),
    "qwen3_moe_dense_first_unnormalised": ("Qwen3Moe", {
        "moe_intermediate_size": 24, "intermediate_size": 40, "num_experts": 6, "num_experts_per_tok": 2,
        "head_dim": 16, "norm_topk_prob": False, "mlp_only_layers": [0],
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PEERS)
def test_we_compute_what_the_peer_computes(name, tmp_path):
    family, settings = PEERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**COMMON, **settings)
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(tmp_path / "peer")
    ids = torch.randint(0, config.vocab_size, (2, 24))
    save_file({"input_ids": ids.numpy()}, tmp_path / "in.safetensors")
    with torch.no_grad():
        theirs = model(ids, labels=ids, output_hidden_states=True)
        greedy = model.generate(ids[:, :8], max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)

    command = ["evaluate", str(tmp_path / "peer"), "--inputs", str(tmp_path / "in.safetensors")]
    assert main([*command, "--output", str(tmp_path / "out.safetensors")]) == 0
    ours = load_file(tmp_path / "out.safetensors")
    for number, state in enumerate(theirs.hidden_states):
        expected = state.numpy()
        np.testing.assert_allclose(ours[f"hidden_states.{number}"], expected, atol=1e-5 * np.abs(expected).max())
    logits = theirs.logits.numpy()
    np.testing.assert_allclose(ours["logits"], logits, atol=1e-5 * np.abs(logits).max())
    np.testing.assert_allclose(ours["loss"][0], theirs.loss.item(), rtol=1e-6)
    np.testing.assert_array_equal(ours["greedy_ids"], greedy.numpy())

    settings_on_disk = json.loads((tmp_path / "peer" / "config.json").read_text())
    assert settings_on_disk["model_type"] in ("hunyuan_v1_moe", "mixtral", "qwen3_moe")
