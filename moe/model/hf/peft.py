"""Adapters in and out of the files of Hugging Face's PEFT (0.21): adapter_config.json and adapter_model.safetensors.

Beside a linear layer stand lora_A.weight (J, in) and lora_B.weight (out, J). A model whose experts are modules, as in
Hunyuan-Large's released code, has such a pair for each expert. transformers 5 instead keeps a layer's experts in two
parameters, gate_up_proj and down_proj, which PEFT adapts as `target_parameters` (peft/tuners/lora/layer.py,
ParamWrapper): one lora_A (E·J, in), rows by expert, and one lora_B (out, J·E), columns by rank. There gate and up share
an A, so both of ours become one of twice the rank, and a B with zeros where one does not see the other's half.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe.model.adapter import LoraConfig
from moe.model.config import ConfigError, ModelConfig
from moe.model.hf.checkpoint import HfCheckpoint, model_specs
from moe.model.hf.config import Family
from moe.model.hf.names import hf_tensor
from moe.model.merge import Adapters, Factors, MergedSource
from moe.model.parameter import summed_axes
from moe.model.pieces import Piece, Source, pieces
from moe.model.precision import Precision
from moe.model.tensor_files import NewTensor, TensorFolder, WeightsError, new_folder, write_file

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
READ = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights")
ABOUT_TRAINING_AND_FILES = """
auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules inference_mode
layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_core peft_version
qalora_group_size revision runtime_config target_modules target_parameters task_type
"""
WITHOUT_EFFECT = frozenset(ABOUT_TRAINING_AND_FILES.split())
"""Settings that change nothing of what the tensors beside them mean."""
DRAWN = (True, False, "gaussian", "orthogonal", "eva")
"""`init_lora_weights` that leave the base as it was; PiSSA, OLoRA and others change it."""


class Place(NamedTuple):
    """Where a piece's adapter lies in the files.

    module: the tensors' name without lora_A.weight. target: what PEFT's patterns match.
    expert: index among `experts` that share the tensors; None where they have their own.
    outputs: which part of B's rows are the piece's.
    """

    module: str
    target: str
    expert: int | None = None
    experts: int = 1
    outputs: slice = slice(None)


class PeftFolder:
    """A folder that PEFT wrote, for a model of `config`; `moe.model.merge.Adapters`."""

    def __init__(self, folder: Path, config: ModelConfig, family: Family) -> None:
        """
        Raises:
            ConfigError: adapter_config.json is missing, or says what is not implemented.
            WeightsError: a tensor is missing, surplus or misshapen.
        """
        self.folder, self.config, self.family = folder, config, family
        self.settings = _read_settings(folder / CONFIG)
        self._files = TensorFolder(folder, TENSORS)
        self._places = {(piece.path, piece.index): self._place(piece) for piece in _pieces(config)}
        self._check()

    def factors(self, piece: Piece) -> Factors | None:
        place = self._places.get((piece.path, piece.index))
        if place is None:
            return None
        a_JI, b_OJ = (self._files.read(f"{place.module}.lora_{half}.weight") for half in "AB")
        if place.expert is not None:
            a_JI = a_JI.reshape(place.experts, -1, a_JI.shape[1])[place.expert]
            b_OJ = b_OJ.reshape(b_OJ.shape[0], -1, place.experts)[:, :, place.expert]
        b_OJ = b_OJ[place.outputs]
        rank = self._rank(place)
        split = len(summed_axes(piece.axes))
        inputs, outputs = piece.shape[:split], piece.shape[split:]
        for name, found, wanted in (
            ("A", a_JI.shape, (rank, math.prod(inputs))),
            ("B", b_OJ.shape, (math.prod(outputs), rank)),
        ):
            if found != wanted:
                raise WeightsError(
                    f"{self.folder}: {place.module}.lora_{name}.weight has shape {found} for one matrix; {CONFIG} and "
                    f"the model ask for {wanted}"
                )
        scale = _by_pattern(self.settings.get("alpha_pattern"), place.target, self.settings["lora_alpha"]) / rank
        return Factors(a_JI.T.reshape(*inputs, rank), b_OJ.T.reshape(rank, *outputs), scale)

    def _rank(self, place: Place) -> int:
        return _by_pattern(self.settings.get("rank_pattern"), place.target, self.settings["r"])

    def _place(self, piece: Piece) -> Place | None:
        """None where nothing adapts the piece."""
        target = hf_tensor(piece, self.family).name.removesuffix(".weight")
        if f"{PREFIX}{target}.lora_A.weight" in self._files.tensors:
            return Place(PREFIX + target, target)
        if not _is_expert(piece):
            return None
        experts, parameter = _fused(piece)
        inner, outer = f"{PREFIX}{experts}.base_layer", PREFIX + experts
        both = f"{inner}.lora_A.weight" in self._files.tensors
        adapted = [name.rsplit(".", 1)[-1] for name in self.settings.get("target_parameters") or ()]
        module = inner if both and parameter == "gate_up_proj" else outer
        if parameter not in adapted or f"{module}.lora_A.weight" not in self._files.tensors:
            return None
        F = self.config.d_expert
        halves = {"w_gate": slice(0, F), "w_up": slice(F, 2 * F), "w_down": slice(None)}
        outputs = halves[_word(piece)]
        return Place(module, f"{experts}.{parameter}", piece.index[1], self.config.num_experts, outputs)

    def _check(self) -> None:
        modules = {place.module for place in self._places.values() if place is not None}
        wanted = {f"{module}.lora_{half}.weight" for module in modules for half in "AB"}
        if missing := wanted - self._files.tensors.keys():
            raise WeightsError(f"{self.folder}: lacks the tensor {min(missing)}")
        if surplus := self._files.tensors.keys() - wanted:
            raise WeightsError(
                f"{self.folder}: holds {min(surplus)}, which stands beside no projection, expert, router or "
                "dense layer of this model"
            )
        if not wanted:
            raise WeightsError(f"{self.folder}: holds no adapter")


def with_adapters(checkpoint: HfCheckpoint, folder: Path | None) -> Source:
    """A checkpoint's weights, with the adapters of a folder that PEFT wrote merged in, where one is given.

    Raises:
        ConfigError, WeightsError: see PeftFolder.
    """
    if folder is None:
        return checkpoint
    return MergedSource(checkpoint, PeftFolder(folder, checkpoint.config, checkpoint.family))


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads(file.read_text("utf-8"))
        rank, alpha = settings["r"], settings["lora_alpha"]
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); give a folder that PEFT wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: describes no LoRA adapters ({error!r})") from error
    remedy = "is not implemented; let PEFT merge it (merge_and_unload), and give the merged checkpoint"
    allowed = {"peft_type": ("LORA",), "bias": ("none", None), "init_lora_weights": (*DRAWN, None)}
    for name, value in settings.items():
        known = allowed.get(name)
        if known is not None and value not in known:
            raise ConfigError(f"{file}: {name}={value!r} {remedy}")
        if name not in WITHOUT_EFFECT.union(READ) and value:
            raise ConfigError(f"{file}: {name}={value!r} {remedy}")
    if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float) and alpha > 0):
        raise ConfigError(f"{file}: r={rank!r} with lora_alpha={alpha!r}: both must be numbers above 0")
    return settings


def _by_pattern(patterns: dict[str, Any] | None, target: str, default: Any) -> Any:
    """As peft.utils.other.get_pattern_key chooses: the first pattern that the end of the name matches."""
    return next((x for key, x in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", target)), default)


def export_adapters(
    adapters: Adapters, lora: LoraConfig, dtype: np.dtype, config: ModelConfig, family: Family, base: str, output: Path
) -> None:
    """Writes the folder `output`, for PEFT to put over the checkpoint `base`.

    PEFT has no dropout for experts in one parameter, so lora_dropout is 0 with those.

    Raises:
        WeightsError: `output` is there already.
    """
    fused = family != "hunyuan"
    found: list[tuple[str, np.ndarray]] = []
    together: dict[tuple[str, str], list[tuple[Piece, Factors]]] = {}
    modules, parameters = set(), set()
    for piece in _pieces(config):
        factors = adapters.factors(piece)
        if factors is None:
            continue
        target = hf_tensor(piece, family).name.removesuffix(".weight")
        if fused and _is_expert(piece):
            together.setdefault(_fused(piece), []).append((piece, factors))
            continue
        if fused and "self_attn" not in target:
            # Of a module called gate_proj, PEFT would take the experts' parameter (convert_peft_config_moe).
            parameters.add(re.sub(r"^model\.layers\.\d+\.", "", target) + ".weight")
        else:
            modules.add(target.rsplit(".", 1)[-1])
        split = len(summed_axes(piece.axes))
        a_IJ = factors.a.reshape(math.prod(piece.shape[:split]), -1)
        b_JO = factors.b.reshape(-1, math.prod(piece.shape[split:]))
        found += _pair(PREFIX + target, a_IJ.T, b_JO.T)
    patterns: dict[str, int] = {}
    for (experts, parameter), parts in together.items():
        a_EJI, b_OJE = _joined(parts, config)
        inner = parameter == "gate_up_proj" and (experts, "down_proj") in together
        module = PREFIX + experts + (".base_layer" if inner else "")
        found += _pair(module, a_EJI.reshape(-1, a_EJI.shape[-1]), b_OJE.reshape(len(b_OJE), -1))
        parameters.add(f"mlp.experts.{parameter}")
        if a_EJI.shape[1] != lora.rank:
            patterns[f"mlp.experts.{parameter}"] = a_EJI.shape[1] // lora.rank
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0 if parameters else lora.dropout,
        "rank_pattern": {name: times * lora.rank for name, times in patterns.items()},
        "alpha_pattern": {name: times * lora.alpha for name, times in patterns.items()},
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
        "bias": "none",
        "inference_mode": True,
    }
    with new_folder(output) as folder:
        tensors = [NewTensor(name, dtype, values.shape) for name, values in found]
        write_file(folder / TENSORS, tensors, (values.astype(dtype) for _, values in found))
        (folder / CONFIG).write_text(json.dumps(settings, indent=1), "utf-8")


def _pair(module: str, a: np.ndarray, b: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    yield f"{module}.lora_A.weight", a
    yield f"{module}.lora_B.weight", b


def _joined(parts: list[tuple[Piece, Factors]], config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """A [E, J, in] and B [out, J, E] of a layer's experts in one parameter, from those of gate, of up or of both; or of
    down."""
    words = sorted({_word(piece) for piece, _ in parts})
    E, J = config.num_experts, parts[0][1].a.shape[-1]
    F = config.d_expert
    inputs, outputs = (F, config.d_model) if words == ["w_down"] else (config.d_model, 2 * F)
    a_EJI = np.zeros((E, len(words) * J, inputs), parts[0][1].a.dtype)
    b_OJE = np.zeros((outputs, len(words) * J, E), a_EJI.dtype)
    for piece, (a_IJ, b_JO, _) in parts:
        word, expert = _word(piece), piece.index[1]
        ranks = slice(words.index(word) * J, (words.index(word) + 1) * J)
        first = F if word == "w_up" else 0
        a_EJI[expert, ranks] = a_IJ.T
        b_OJE[first : first + b_JO.shape[1], ranks, expert] = b_JO.T
    return a_EJI, b_OJE


def _pieces(config: ModelConfig) -> Iterable[Piece]:
    """Those that PEFT's lora_A and lora_B may stand beside: linear layers. Of a router they can be merged as well."""
    found = pieces(config, model_specs(config, Precision()))
    return (piece for piece in found if len(piece.shape) > 1 and piece.axes != "VD")


def _is_expert(piece: Piece) -> bool:
    return len(piece.index) == 2


def _word(piece: Piece) -> str:
    return str(piece.path[-1]).rsplit("_", 1)[0]


def _fused(piece: Piece) -> tuple[str, str]:
    """(the module of a layer's experts in transformers 5, its parameter that holds the piece)."""
    return f"model.layers.{piece.layer}.mlp.experts", "down_proj" if _word(piece) == "w_down" else "gate_up_proj"
