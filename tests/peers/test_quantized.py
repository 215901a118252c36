"""Our quantized checkpoints, read by compressed-tensors and through it by Hugging Face's transformers:
`make test-peers`."""

import json
import re

import numpy as np
import pytest

from moe import HunyuanMoE
from moe.model.tensor_files import TensorFolder
from moe.serve.quantize import main

torch = pytest.importorskip("torch", reason="run by `make test-peers` in an environment of its own")
transformers = pytest.importorskip("transformers", reason="run by `make test-peers` in an environment of its own")
tensors = pytest.importorskip("compressed_tensors", reason="run by `make test-peers` in an environment of its own")
files = pytest.importorskip("safetensors.torch")

SETTINGS = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 128, "num_local_experts": 4, "num_experts_per_tok": 2,
    "initializer_range": 0.1, "pad_token_id": None,
}  # fmt: skip


def written(folder, format, **changes):
    """A Mixtral as the peer writes it, and quantized by us."""
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM._from_config(transformers.MixtralConfig(**SETTINGS | changes))
    model.save_pretrained(folder / "wide")
    assert main([str(folder / "wide"), str(folder / "out"), "--weights", format]) == 0
    return folder / "out"


# Of a model's experts transformers 5.24 reads float-quantized and pack-quantized, and no int-quantized ones.
@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_the_peer_computes_what_we_compute(format, tmp_path):
    folder = written(tmp_path, format)
    ids = torch.randint(0, SETTINGS["vocab_size"], (2, 24))
    ours = np.asarray(HunyuanMoE.from_hf(folder, compute="float32")(ids.numpy()))
    read = transformers.CompressedTensorsConfig(dequantize=True)
    peer = transformers.MixtralForCausalLM.from_pretrained(folder, quantization_config=read, dtype=torch.float32)
    with torch.no_grad():
        theirs = peer(ids).logits.numpy()
        wide = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.float32)(ids).logits
    lost = np.median(np.abs(theirs - wide.numpy()))
    assert lost > 1e-3 * theirs.std()
    # They widen int4 to its scales' format, bfloat16, before they compute.
    assert np.median(np.abs(ours - theirs)) < {"fp8": 1e-4, "int4": 0.1}[format] * lost


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_their_decompression_gives_the_weights_to_half_a_step(format, tmp_path):
    """With groups of 16, 32 and 48: the layers of each size are found by their targets."""
    folder = written(tmp_path, format, hidden_size=32, intermediate_size=48, head_dim=16)
    told = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = tensors.quantization.QuantizationConfig.model_validate(told)
    compressor = tensors.compressors.BaseCompressor.get_value_from_registry(config.format)
    packed, wide = files.load_file(folder / "model.safetensors"), TensorFolder(tmp_path / "wide")
    layers = [name.removesuffix("_scale") for name in packed if name.endswith(".weight_scale")]
    assert len(layers) == 2 * (4 + 3 * 4)
    for name in layers:
        module = name.removesuffix(".weight")
        (scheme,) = [
            group
            for group in config.config_groups.values()
            if any(t == "Linear" or re.match(t.removeprefix("re:"), module) for t in group.targets)
        ]
        own = {key.removeprefix(module + "."): value for key, value in packed.items() if key.startswith(module + ".")}
        found = compressor.decompress(own, scheme)["weight"].float().numpy()
        expected = wide.read(name)
        scale = np.repeat(own["weight_scale"].float().numpy(), expected.shape[1] // own["weight_scale"].shape[1], 1)
        step = 32 if format == "fp8" else 1
        # Of int4 the scales are rounded to bfloat16, and by them what they are multiplied with.
        assert (np.abs(found - expected) <= (0.5 * step + 2 * 8 / 256) * scale).all()
