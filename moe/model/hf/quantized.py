"""Checkpoints with quantized weights, as compressed-tensors defines them and Hugging Face's loader and vLLM read them.

| here | `format` there | a linear layer (out, in) is |
|---|---|---|
| int8 | int-quantized | weight I8 (out, in), weight_scale F32 (out, 1) |
| fp8 | float-quantized | weight F8_E4M3 (out, in), weight_scale F32 (out, 1) |
| int4 | pack-quantized | weight_packed I32 (out, in / 8), weight_scale BF16 (out, groups), weight_shape I64 (2,) |

A word of weight_packed has eight neighbours, each plus 8, the first in the lowest bits
(https://github.com/vllm-project/compressed-tensors: compressors/pack_quantized and naive_quantized). So all three hold
the very bytes of a `QuantizedWeight`, transposed. Embedding, head, norms and routers stay as they are.

The first two formats are those of products whose activations are quantized as well, and config.json says so: by token,
as they come. That is how other engines then compute; here `activations` says (moe/serve/language_model.py).
"""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from moe.model.config import ConfigError, ModelConfig
from moe.model.hf.checkpoint import FLOATS, hf_tensors, model_specs
from moe.model.hf.config import Family, model_config
from moe.model.hf.names import HfTensor
from moe.model.parameter import QUANTIZED_KINDS, quantized
from moe.model.pieces import Piece, parameters
from moe.model.precision import Precision
from moe.model.tensor_files import NewTensor, TensorFolder, WeightsError, new_folder, write_tensors
from moe.ops.quantize import GROUPS, Quantized, QuantizedWeight

SETTING = "quantization_config"
FORMATS: dict[Quantized, str] = {"int8": "int-quantized", "fp8": "float-quantized", "int4": "pack-quantized"}
PER_WORD = 8
"""Values of int4 in a word."""


class _Part(NamedTuple):
    """One tensor of a linear layer. suffix: of its name. dtypes: that can be read, by name; the first is written."""

    suffix: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


class Layer(NamedTuple):
    """A tensor of the checkpoint before quantization, and the matrix that is kept of it, in shapes."""

    tensor: HfTensor
    weight: QuantizedWeight

    @property
    def name(self) -> str:
        """The linear layer's."""
        return self.tensor.name.removesuffix(".weight")

    @property
    def groups(self) -> int:
        """Of one output."""
        return math.prod(self.weight.scales.shape) // self.tensor.shape[0]

    def parts(self) -> list[_Part]:
        rows, columns = self.tensor.shape
        if self.weight.format != "int4":
            dtype = self.weight.values.dtype.name
            return [_Part("weight", (rows, columns), (dtype,)), _Part("weight_scale", (rows, 1), FLOATS)]
        return [
            _Part("weight_packed", (rows, columns // PER_WORD), ("int32",)),
            _Part("weight_scale", (rows, self.groups), ("bfloat16",)),
            _Part("weight_shape", (2,), ("int64", "int32")),
        ]

    def to_arrays(self, weight: QuantizedWeight) -> list[np.ndarray]:
        """The contents of `parts`."""
        rows = self.tensor.shape[0]
        values, scales = (np.asarray(x).reshape(-1, rows).T for x in (weight.values, weight.scales))
        if weight.format != "int4":
            return [values, scales]
        packed = np.ascontiguousarray(values).view("<i4")
        return [packed, scales, np.array(self.tensor.shape, np.int64)]

    def from_arrays(self, arrays: list[np.ndarray]) -> QuantizedWeight:
        """The inverse of `to_arrays`."""
        values: Any = arrays[0]
        scales: Any = arrays[1].astype(self.weight.scales.dtype)
        if self.weight.format == "int4":
            values = values.view(np.uint8)
        values, scales = values.T.reshape(self.weight.values.shape), scales.T.reshape(self.weight.scales.shape)
        return QuantizedWeight(values, scales, self.weight.format, self.weight.axis)


def quantized_layers(config: ModelConfig, family: Family, format: Quantized) -> dict[str, Layer]:
    """What is quantized of a checkpoint, by the tensor's name.

    Raises:
        ConfigError: the format is none of theirs, or a layer's inputs do not fill words.
    """
    if format not in FORMATS:
        raise ConfigError(f"weights in {format}: checkpoints are written in {', '.join(FORMATS)}")
    kinds = {path: spec.kind for path, spec in parameters(model_specs(config, Precision()))}
    found = {}
    for tensor in hf_tensors(config, family):
        if kinds[tensor.piece.path] not in QUANTIZED_KINDS:
            continue
        if format == "int4" and tensor.shape[1] % PER_WORD:
            raise ConfigError(
                f"{tensor.name}: {tensor.shape[1]} inputs do not fill words of {PER_WORD} in int4: take int8 or fp8"
            )
        values = jax.ShapeDtypeStruct(tensor.piece.shape, jnp.float32)
        weight = jax.eval_shape(lambda values, axes=tensor.piece.axes: quantized(values, axes, format), values)
        found[tensor.name] = Layer(tensor, weight)
    return found


def in_layer_order(config: ModelConfig, family: Family) -> list[HfTensor]:
    """All tensors of a checkpoint in the order of computation: embedding, layers one by one, final norm and head."""

    def place(tensor: HfTensor) -> float:
        if tensor.piece.layer is not None:
            return tensor.piece.layer
        return -1 if tensor.piece.path[0] == "embedding_VD" else math.inf

    return sorted(hf_tensors(config, family), key=place)


class QuantizedCheckpoint:
    """A checkpoint of this form; a `moe.model.pieces.Source` whose matrices are quantized already."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            ConfigError: config.json says what is not implemented.
            WeightsError: a tensor is missing, surplus, misshapen or truncated.
        """
        self.folder = folder
        self.settings: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
        where = str(folder / "config.json")
        self.format = read_format(self.settings[SETTING], where)
        family, self.config = model_config({k: v for k, v in self.settings.items() if k != SETTING}, where)
        self._files = TensorFolder(folder)
        self._layers = quantized_layers(self.config, family, self.format)
        self._tensors = {(t.piece.path, t.piece.index): t for t in hf_tensors(self.config, family)}
        self._check()

    def dtype(self, piece: Piece) -> np.dtype:
        """Of what is not quantized; a matrix is as the embedding."""
        name = self._tensors[piece.path, piece.index].name
        return self._files.tensors["model.embed_tokens.weight" if name in self._layers else name].dtype

    def read(self, piece: Piece) -> Any:
        """The piece's values; of a matrix a QuantizedWeight."""
        tensor = self._tensors[piece.path, piece.index]
        layer = self._layers.get(tensor.name)
        if layer is None:
            return tensor.to_piece(self._files.read(tensor.name))
        return layer.from_arrays([self._files.read(f"{layer.name}.{part.suffix}") for part in layer.parts()])

    def _check(self) -> None:
        expected: dict[str, _Part] = {}
        for tensor in self._tensors.values():
            layer = self._layers.get(tensor.name)
            if layer is None:
                expected[tensor.name] = _Part("weight", tensor.shape, FLOATS)
            else:
                expected |= {f"{layer.name}.{part.suffix}": part for part in layer.parts()}
        found = self._files.tensors
        for name, part in expected.items():
            if name not in found:
                raise WeightsError(f"{self.folder}: lacks the tensor {name}, expected of shape {part.shape}")
            if found[name].shape != part.shape:
                hint = f"; groups have {GROUPS['int4']} inputs" if name.endswith("_scale") else ""
                raise WeightsError(f"{self.folder}: {name} has shape {found[name].shape}, expected {part.shape}{hint}")
            if found[name].dtype.name not in part.dtypes:
                known = ", ".join(part.dtypes)
                raise WeightsError(f"{self.folder}: {name} is stored as {found[name].dtype.name}; {known} can be read")
        surplus = found.keys() - expected.keys()
        if surplus:
            raise WeightsError(f"{self.folder}: holds {min(surplus)}, which config.json does not ask for")


def is_quantized_checkpoint(folder: Path) -> bool:
    """Whether its config.json speaks of quantization."""
    try:
        return json.loads((folder / "config.json").read_text("utf-8")).get(SETTING) is not None
    except (OSError, ValueError, AttributeError):
        return False


def read_format(told: Any, where: str) -> Quantized:
    """The format that a quantization_config describes.

    Raises:
        ConfigError: it is none of ours.
    """

    def refused(what: str, remedy: str) -> ConfigError:
        return ConfigError(f"{where}: {SETTING}.{what} is not implemented; {remedy}")

    if not isinstance(told, dict) or told.get("quant_method") != "compressed-tensors":
        method = told.get("quant_method") if isinstance(told, dict) else told
        raise refused(f"quant_method={method!r}", "give the checkpoint before its quantization, or compressed-tensors")
    format = next((ours for ours, theirs in FORMATS.items() if theirs == told.get("format")), None)
    if format is None:
        raise refused(f"format={told.get('format')!r}", f"{', '.join(FORMATS.values())} are")
    if told.get("kv_cache_scheme"):
        raise refused("kv_cache_scheme", "give a checkpoint without, and the cache's format when serving")
    expected = _weights_scheme(format, None)
    for name, group in told.get("config_groups", {}).items():
        weights = group.get("weights") or {}
        for key in ("num_bits", "type", "symmetric", "strategy"):
            if weights.get(key) != expected[key]:
                raise refused(f"config_groups.{name}.weights.{key}={weights.get(key)!r}", f"{expected[key]!r} is")
        if (group.get("input_activations") or {"dynamic": True}).get("dynamic") is not True:
            raise refused(f"config_groups.{name}.input_activations", "scales that are found as tokens come are")
    return format


def quantization_config(config: ModelConfig, family: Family, format: Quantized) -> dict[str, Any]:
    """That of config.json (compressed-tensors, quantization/quant_config.py and quant_args.py)."""
    layers = quantized_layers(config, family, format)
    by_size: dict[int | None, set[str]] = {}
    for layer in layers.values():
        size = layer.tensor.shape[1] // layer.groups if format == "int4" else None
        by_size.setdefault(size, set()).add(_pattern(layer.name))
    wide = [t for t in hf_tensors(config, family) if t.name not in layers and len(t.shape) > 1]
    ignored = {t.name.removesuffix(".weight") for t in wide} - {"model.embed_tokens"} | {"lm_head"}
    activations = None if format == "int4" else _scheme(format) | {"strategy": "token", "dynamic": True}
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if len(by_size) == 1 else sorted(names),
            "weights": _weights_scheme(format, size),
            "input_activations": activations,
            "output_activations": None,
        }
        for number, (size, names) in enumerate(by_size.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": FORMATS[format],
        "config_groups": groups,
        "ignore": sorted(ignored),
        "kv_cache_scheme": None,
    }


def _pattern(name: str) -> str:
    """The names of this linear layer in all layers and experts, as compressed-tensors' targets have them."""
    return "re:" + r"\.".join(r"\d+" if word.isdecimal() else word for word in name.split(".")) + "$"


def _scheme(format: Quantized) -> dict[str, Any]:
    kind = "float" if format == "fp8" else "int"
    return {"num_bits": 4 if format == "int4" else 8, "type": kind, "symmetric": True}


def _weights_scheme(format: Quantized, group_size: int | None) -> dict[str, Any]:
    strategy = "group" if format == "int4" else "channel"
    return _scheme(format) | {"strategy": strategy, "group_size": group_size, "dynamic": False}


def write_quantized(
    output: Path,
    config: ModelConfig,
    settings: dict[str, Any],
    format: Quantized,
    dtypes: dict[str, np.dtype],
    contents: Iterable[np.ndarray | QuantizedWeight],
) -> None:
    """Writes a checkpoint of this form, holding one tensor at a time.

    Args:
        settings: config.json of the checkpoint before quantization.
        dtypes: of the tensors that are not quantized, by name.
        contents: pieces in the order of `in_layer_order`.

    Raises:
        ConfigError: see quantized_layers.
        WeightsError: `output` is there already.
    """
    family: Family = settings["model_type"]
    layers = quantized_layers(config, family, format)
    tensors = in_layer_order(config, family)
    new = []
    for tensor in tensors:
        layer = layers.get(tensor.name)
        if layer is None:
            new.append(NewTensor(tensor.name, dtypes[tensor.name], tensor.shape))
            continue
        for part in layer.parts():
            dtype = layer.weight.scales.dtype if part.suffix == "weight_scale" else _dtype(part.dtypes[0])
            new.append(NewTensor(f"{layer.name}.{part.suffix}", np.dtype(dtype), part.shape))

    def arrays() -> Iterator[np.ndarray]:
        for tensor, piece in zip(tensors, contents, strict=True):
            if isinstance(piece, QuantizedWeight):
                yield from layers[tensor.name].to_arrays(piece)
            else:
                yield tensor.from_piece(piece)

    told = settings | {SETTING: quantization_config(config, family, format)}
    with new_folder(output) as folder:
        write_tensors(folder, new, arrays())
        (folder / "config.json").write_text(json.dumps(told, indent=1), "utf-8")


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))
