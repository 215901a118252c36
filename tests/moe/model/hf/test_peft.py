"""PEFT's files, written and read by us; the real PEFT reads and writes them in tests/peers/test_peft.py."""

import json
from typing import get_args

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe.model.adapter import LoraConfig, Target
from moe.model.config import ConfigError, ModelConfig
from moe.model.execution import Execution
from moe.model.hf.checkpoint import model_specs
from moe.model.hf.peft import PeftFolder, export_adapters
from moe.model.merge import StackedAdapters
from moe.model.pieces import pieces
from moe.model.precision import FULL
from moe.model.tensor_files import WeightsError
from moe.train.optimizer import OptimizerConfig
from moe.train.state import make_blueprint
from moe.train.trained import ArraySource
from parallel.layout import SINGLE_DEVICE

MODEL = ModelConfig(
    vocab_size=16, d_model=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, num_experts=4, d_expert=6,
    num_shared_experts=1,
)  # fmt: skip
LORA = LoraConfig(rank=2, alpha=3.0, dropout=0.1, targets=get_args(Target))
LAYER = "base_model.model.model.layers.1"


@pytest.fixture(scope="module")
def adapters():
    adam = OptimizerConfig()
    blueprint = make_blueprint(MODEL, FULL, Execution(), adam, SINGLE_DEVICE, steps=10000, lora=LORA)
    r = np.random.default_rng(0)
    params = jax.tree.map(lambda x: r.normal(size=x.shape).astype(np.float32), blueprint.abstract_state().params)
    return StackedAdapters(ArraySource(params), LORA)


@pytest.fixture
def folder(adapters, tmp_path):
    export_adapters(adapters, LORA, np.dtype(np.float32), MODEL, "hunyuan_v1_moe", "base", tmp_path / "peft")
    return tmp_path / "peft"


@pytest.mark.parametrize("family", ["hunyuan", "hunyuan_v1_moe"])
def test_what_is_written_is_read_again(family, adapters, tmp_path):
    export_adapters(adapters, LORA, np.dtype(np.float32), MODEL, family, "base", tmp_path / "peft")
    again = PeftFolder(tmp_path / "peft", MODEL, family)
    compared = 0
    for piece in pieces(MODEL, model_specs(MODEL, FULL)):
        expected, found = adapters.factors(piece), again.factors(piece)
        assert (expected is None) == (found is None)
        if expected is not None and found is not None:
            product, wanted = (x.scale * np.tensordot(x.a, x.b, 1) for x in (found, expected))
            np.testing.assert_allclose(product, wanted, atol=1e-5)
            compared += 1
    # Of each layer q, k, v and o, and three each of four experts and the shared one.
    assert compared == 2 * (4 + 3 * 4 + 3)


def test_experts_that_are_modules_have_tensors_of_their_own(adapters, tmp_path):
    export_adapters(adapters, LORA, np.dtype(np.float32), MODEL, "hunyuan", "base", tmp_path / "peft")
    tensors = load_file(tmp_path / "peft/adapter_model.safetensors")
    piece = next(p for p in pieces(MODEL, model_specs(MODEL, FULL)) if p.index == (1, 2) and "w_down_EFD" in p.path)
    a_FJ, b_JD, _ = adapters.factors(piece)
    np.testing.assert_array_equal(tensors[f"{LAYER}.mlp.experts.2.down_proj.lora_A.weight"], a_FJ.T)
    np.testing.assert_array_equal(tensors[f"{LAYER}.mlp.experts.2.down_proj.lora_B.weight"], b_JD.T)
    told = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], told["lora_dropout"]) == (2, 3.0, 0.1)
    names = ("q", "k", "v", "o", "gate", "up", "down")
    assert set(told["target_modules"]) == {f"{name}_proj" for name in names}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("use_dora", True),
        ("use_rslora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("init_lora_weights", "pissa"),
        ("peft_type", "IA3"),
        ("a_new_one", {"x": 1}),
    ],
)
def test_settings_that_compute_something_else_are_refused(setting, value, folder):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {setting: value}))
    with pytest.raises(ConfigError, match=f"{setting}=.* is not implemented; let PEFT merge it"):
        PeftFolder(folder, MODEL, "hunyuan_v1_moe")


def test_tensors_that_do_not_fit_are_refused_by_name(folder):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    head = "base_model.model.lm_head.lora_A.weight"
    save_file(tensors | {head: np.ones((2, 8), np.float32)}, file)
    with pytest.raises(WeightsError, match=f"holds {head}, which stands beside no projection"):
        PeftFolder(folder, MODEL, "hunyuan_v1_moe")
    name = f"{LAYER}.self_attn.q_proj.lora_B.weight"
    save_file({key: x for key, x in tensors.items() if key != name}, file)
    with pytest.raises(WeightsError, match=f"lacks the tensor {name}"):
        PeftFolder(folder, MODEL, "hunyuan_v1_moe")
    save_file(tensors | {name: np.ones((8, 3), np.float32)}, file)
    folder_read = PeftFolder(folder, MODEL, "hunyuan_v1_moe")
    piece = next(p for p in pieces(MODEL, model_specs(MODEL, FULL)) if p.index == (1,) and "w_q_DNH" in p.path)
    with pytest.raises(WeightsError, match=r"q_proj.lora_B.weight has shape \(8, 3\) .* ask for \(8, 2\)"):
        folder_read.factors(piece)


def test_a_folder_without_adapters_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="adapter_config.json: cannot be read"):
        PeftFolder(tmp_path, MODEL, "hunyuan")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="describes no LoRA adapters"):
        PeftFolder(tmp_path, MODEL, "hunyuan")
