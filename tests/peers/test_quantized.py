"""Our quantized checkpoints, read by Hugging Face's transformers through compressed-tensors: `make test-peers`."""

import numpy as np
import pytest

from moe import HunyuanMoE
from moe.serve.quantize import main

torch = pytest.importorskip("torch", reason="run by `make test-peers` in an environment of its own")
transformers = pytest.importorskip("transformers", reason="run by `make test-peers` in an environment of its own")
pytest.importorskip("compressed_tensors", reason="run by `make test-peers` in an environment of its own")

SETTINGS = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_the_peer_computes_what_we_compute(format, tmp_path):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SETTINGS)
    transformers.MixtralForCausalLM._from_config(config).save_pretrained(tmp_path / "wide")
    assert main([str(tmp_path / "wide"), str(tmp_path / "out"), "--weights", format]) == 0
    ids = torch.randint(0, config.vocab_size, (2, 24))
    ours = np.asarray(HunyuanMoE.from_hf(tmp_path / "out", compute="float32")(ids.numpy()))

    read = transformers.CompressedTensorsConfig(dequantize=True)
    peer = transformers.MixtralForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=read, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        theirs = peer(ids).logits.numpy()
        wide = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.float32)(ids).logits
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())
    assert np.abs(theirs - wide.numpy()).max() > 1e-3 * np.abs(theirs).max()
