"""Quantized checkpoints: written, read again, and calibrated."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from moe import HunyuanMoE
from moe.model.config import ConfigError
from moe.model.tensor_files import TensorFolder, WeightsError
from moe.ops.quantize import QuantizedWeight
from moe.serve.quantize import main
from moe.train.pretrained import open_pretrained
from parallel.layout import SINGLE_DEVICE
from tests.moe.serve.serving import LINES

FORMATS = ["int8", "fp8", "int4"]
TOKENS = np.random.default_rng(0).integers(0, 300, (4, 24))


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory):
    """By format, what the command writes."""
    where = tmp_path_factory.mktemp("formats")
    for format in FORMATS:
        assert main([str(checkpoint), str(where / format), "--weights", format]) == 0
    return {format: where / format for format in FORMATS}


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_read_is_what_quantizing_gives_bit_for_bit(checkpoint, folders, format):
    found = open_pretrained(folders[format]).load(SINGLE_DEVICE, None, None)[0]
    expected = open_pretrained(checkpoint).load(SINGLE_DEVICE, None, format)[0]
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (ours.dtype, np.asarray(ours).tobytes()) == (theirs.dtype, np.asarray(theirs).tobytes())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("layer", ["self_attn.q_proj", "self_attn.o_proj", "mlp.experts.3.down_proj"])
def test_the_files_hold_the_weights_as_the_format_defines_them(checkpoint, folders, format, layer):
    """Read value by value from the definition: compressed-tensors, compressors/pack_quantized and naive_quantized."""
    name = f"model.layers.0.{layer}"
    w = TensorFolder(checkpoint).read(f"{name}.weight")
    files = TensorFolder(folders[format])
    scale = files.read(f"{name}.weight_scale").astype(np.float32)
    if format == "int4":
        words = files.read(f"{name}.weight_packed")
        assert tuple(files.read(f"{name}.weight_shape")) == w.shape
        assert words.dtype == np.int32
    else:
        values = files.read(f"{name}.weight").astype(np.float32)
        assert scale.shape == (w.shape[0], 1)
    for o, i in np.ndindex(*w.shape):
        own = scale[o, i * scale.shape[1] // w.shape[1]]
        kept = (int(words[o, i // 8]) >> 4 * (i % 8) & 15) - 8 if format == "int4" else values[o, i]
        step = own * (2.0 ** max(-9, np.floor(np.log2(abs(kept))) - 3) if format == "fp8" and kept else 1)
        # Half a step, and of eight steps the rounding of a bfloat16 scale.
        assert abs(kept * own - w[o, i]) <= (0.5 + 8 / 256) * step


def test_config_json_names_the_layers_of_each_group_size(folders):
    told = json.loads((folders["int4"] / "config.json").read_text())["quantization_config"]
    assert (told["quant_method"], told["format"]) == ("compressed-tensors", "pack-quantized")
    sizes = {g["weights"]["group_size"]: g["targets"] for g in told["config_groups"].values()}
    # Heads of 8, a width of 32, experts of 24.
    assert set(sizes) == {8, 32, 24}
    assert sizes[8] == [r"re:model\.layers\.\d+\.self_attn\.o_proj$"]
    assert {name for name in told["ignore"] if "layers.0" in name} == {"model.layers.0.mlp.gate.wg"}
    channel = json.loads((folders["int8"] / "config.json").read_text())["quantization_config"]["config_groups"]
    assert channel["group_0"]["targets"] == ["Linear"]
    assert channel["group_0"]["input_activations"]["dynamic"] is True


@pytest.mark.slow
def test_calibration_brings_logits_nearer(checkpoint, folders, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("".join(LINES) * 40, "utf-8")
    arguments = [str(checkpoint), str(tmp_path / "out"), "--text", str(text), "--sequences", "24", "--length", "24"]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    # 4 layers of q, o, 3 of the shared expert and 3 of 4 experts each; k and v of 2 of them.
    assert "of 72 matrices calibrated" in told
    expected = HunyuanMoE.from_hf(checkpoint)
    tokens = np.array([expected.vocabulary.encode("".join(LINES) * 2)[:48]])
    errors = [
        np.square(HunyuanMoE.from_hf(folder)(tokens) - expected(tokens)).mean()
        for folder in (tmp_path / "out", folders["int4"])
    ]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.slow
def test_experts_without_tokens_are_named_and_rounded(checkpoint, folders, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("abc " * 20, "utf-8")
    assert main([str(checkpoint), str(tmp_path / "out"), "--text", str(text), "--sequences", "2", "--length", "8"]) == 0
    told = capsys.readouterr().out
    assert "0 of 72 matrices calibrated" in told
    assert "rounded to the nearest: layer 3 w_down_EFD of expert 3, " in told
    assert (tmp_path / "out/model.safetensors").read_bytes() == (folders["int4"] / "model.safetensors").read_bytes()


def test_it_is_served_without_being_told_its_format(folders):
    quantized = HunyuanMoE.from_hf(folders["int4"])
    assert quantized.weights.served.precision.frozen == "int4"
    matrices = jax.tree.leaves(quantized.weights.params, is_leaf=lambda x: isinstance(x, QuantizedWeight))
    assert any(isinstance(x, QuantizedWeight) for x in matrices)


def test_what_cannot_be_done(checkpoint, folders, tmp_path, capsys):
    with pytest.raises(ConfigError, match="holds weights in int4, and int8 were asked for"):
        HunyuanMoE.from_hf(folders["int4"], weights="int8")
    for arguments, message in [
        ([folders["int4"], tmp_path / "a"], "holds weights in int4 already"),
        ([checkpoint, tmp_path / "a", "--weights", "int8", "--text", checkpoint / "config.json"], "is for int4"),
        ([checkpoint, folders["int4"]], "is there already"),
        ([checkpoint, tmp_path / "a", "--text", checkpoint / "config.json", "--length", "9999"], "do not fill"),
    ]:
        assert main([str(argument) for argument in arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "marlin-24"}, "format='marlin-24' is not implemented; int-quantized"),
        ({"quant_method": "gptq"}, "quant_method='gptq' is not implemented"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is not implemented"),
        ({"config_groups": {"group_0": {"weights": {"num_bits": 4}}}}, "num_bits=4 is not implemented; 8 is"),
    ],
    ids=str,
)
def test_foreign_quantization_is_refused_by_name(folders, tmp_path, change, message):
    shutil.copytree(folders["int8"], tmp_path / "copy")
    settings = json.loads((tmp_path / "copy/config.json").read_text())
    settings["quantization_config"] |= change
    (tmp_path / "copy/config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=message):
        open_pretrained(tmp_path / "copy")


def test_a_tensor_that_does_not_fit_is_named(folders, tmp_path):
    shutil.copytree(folders["int8"], tmp_path / "copy")
    files = TensorFolder(folders["int8"])
    tensors = {name: files.read(name) for name in files.tensors}
    del tensors["model.layers.1.mlp.experts.0.up_proj.weight_scale"]
    save_file(tensors, tmp_path / "copy/model.safetensors")
    with pytest.raises(WeightsError, match=r"lacks the tensor model.layers.1.mlp.experts.0.up_proj.weight_scale"):
        open_pretrained(tmp_path / "copy")
