"""Configurations of the released code beyond the golden ones, against its re-implementation in PyTorch."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe.model.hf.__main__ import main
from moe.model.hf.checkpoint import hf_tensors
from moe.model.hf.config import model_config

torch = pytest.importorskip("torch", reason="run by `make test-peers` in an environment of its own")

from tests.peers.released import Released  # noqa: E402

GOLDEN = Path(__file__).parent.parent / "golden"
BASE = json.loads((GOLDEN / "hunyuan_large_tiny/config.json").read_text())
TOLERANCES = {"logits": 1e-5, "loss": 1e-6, "hidden_states": 1e-5, "grad": 1e-4}
"""Largest difference, relative to the largest expected value."""

VARIANTS = {
    "cla_4": {"cla_share_factor": 4},
    "cla_3_of_5_layers": {"cla_share_factor": 3, "num_hidden_layers": 5},
    "alpha_1000": {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0}},
    "alpha_half_theta_5e5": {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 0.5}, "rope_theta": 5e5},
    "plain_rope": {"rope_scaling": None},
    "top_3": {"moe_topk": 3},
    "top_8_of_8": {"moe_topk": 8},
    "untied": {"tie_word_embeddings": False},
    "no_qk_norm": {"use_qk_norm": False},
    "no_qk_norm_no_cla": {"use_qk_norm": False, "use_cla": False},
    "no_shared_expert": {"use_mixed_mlp_moe": False},
    "two_shared_experts": {"num_shared_expert": 2},
    "dense": {"num_experts": 1},
    "one_kv_head_eps": {"num_key_value_heads": 1, "rms_norm_eps": 1e-2},
    "all_kv_heads": {"num_key_value_heads": 8},
    "everything": {
        "cla_share_factor": 2, "num_hidden_layers": 3, "moe_topk": 3, "tie_word_embeddings": False,
        "use_qk_norm": False, "use_mixed_mlp_moe": False, "num_experts": 5, "rope_scaling": None,
        "intermediate_size": 40,
    },
}  # fmt: skip


def expected(settings: dict, arrays: dict[str, np.ndarray], ids: np.ndarray) -> dict[str, np.ndarray]:
    """What the released code computes, by the names of `hf evaluate`."""
    weights = {name: torch.tensor(array, requires_grad=True) for name, array in arrays.items()}
    model, tokens = Released(settings, weights), torch.tensor(ids)
    logits, loss, states = model(tokens)
    loss.backward()
    found = {"logits": logits, "loss": loss[None]} | {f"hidden_states.{i}": x for i, x in enumerate(states)}
    found |= {f"grad.{name}": weight.grad for name, weight in weights.items()}
    greedy = tokens[:, :8]
    with torch.no_grad():
        for _ in range(16):
            greedy = torch.cat((greedy, model(greedy)[0][:, -1:].argmax(-1)), 1)
    return {name: x.detach().numpy() for name, x in found.items()} | {"greedy_ids": greedy.numpy()}


def check(found: dict[str, np.ndarray], told: dict[str, np.ndarray]) -> None:
    for name, value in told.items():
        if name == "greedy_ids":
            np.testing.assert_array_equal(found[name], value)
        elif name.startswith("grad_norm."):
            norm = np.linalg.norm(found[name.replace("grad_norm.", "grad.")])
            np.testing.assert_allclose(norm, value.item(), rtol=1e-4, err_msg=name)
        elif name != "input_ids":
            atol = TOLERANCES[name.split(".")[0]] * np.abs(value).max()
            np.testing.assert_allclose(found[name], value, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("fixture", ["hunyuan_large_tiny", "top2_no_cla"])
def test_the_second_opinion_agrees_with_tencents_code(fixture):
    settings = {"pad_token_id": 0} | json.loads((GOLDEN / fixture / "config.json").read_text())
    golden = load_file(GOLDEN / fixture / "reference.safetensors")
    check(expected(settings, load_file(GOLDEN / fixture / "model.safetensors"), golden["input_ids"]), golden)


@pytest.mark.parametrize("name", VARIANTS)
def test_we_compute_what_the_released_code_computes(name, tmp_path):
    settings = BASE | VARIANTS[name]
    family, config = model_config(settings)
    rng = np.random.default_rng(1)

    def draw(tensor) -> np.ndarray:
        around = 1.0 if len(tensor.shape) == 1 else 0.0
        return (around + 0.3 * rng.standard_normal(tensor.shape)).astype(np.float32)

    arrays = {tensor.name: draw(tensor) for tensor in hf_tensors(config, family)}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(settings))
    save_file(arrays, tmp_path / "model/model.safetensors")
    ids = rng.integers(0, settings["vocab_size"], (2, 32))
    save_file({"input_ids": ids}, tmp_path / "in.safetensors")
    output = tmp_path / "out.safetensors"
    arguments = ["evaluate", str(tmp_path / "model"), "--inputs", str(tmp_path / "in.safetensors")]
    assert main([*arguments, "--output", str(output)]) == 0
    check(load_file(output), expected(settings, arrays, ids))
