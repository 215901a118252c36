"""Whole checkpoints from one form to the other, one piece in memory at a time."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from moe.model.config import ConfigError, ModelConfig
from moe.model.folder import ModelFolder, Origin, copy_tokenizer, write_model_folder
from moe.model.hf.checkpoint import HfCheckpoint, hf_tensors, model_specs
from moe.model.hf.config import FAMILIES, Family, hunyuan_settings
from moe.model.hf.peft import with_adapters
from moe.model.pieces import Source
from moe.model.precision import Precision
from moe.model.tensor_files import NewTensor, new_folder, write_tensors

Progress = Callable[[int], object]
"""Called with the number of bytes that have been written since the last call."""


def import_checkpoint(checkpoint: HfCheckpoint, output: Path, progress: Progress, adapters: Path | None = None) -> None:
    """Writes the model folder `output`.

    Args:
        adapters: a folder that PEFT wrote, to merge into the weights.

    Raises:
        WeightsError: `output` is there already, or a tensor cannot be read.
    """
    origin = Origin(checkpoint.family, checkpoint.settings, checkpoint.tied_head_stored)
    specs = model_specs(checkpoint.config, Precision())
    source = with_adapters(checkpoint, adapters)
    with new_folder(output) as folder:
        write_model_folder(folder, checkpoint.config, specs, source, origin, progress)
        copy_tokenizer(checkpoint.folder, folder)


def export_folder(model: ModelFolder, output: Path, progress: Progress) -> None:
    """Writes the Hugging Face checkpoint of which `model` was imported: the same names, shapes, formats and values.

    Raises:
        WeightsError: `output` is there already, or `model` is damaged.
    """
    model.check(model_specs(model.config, Precision()))
    if model.origin.family not in FAMILIES:
        raise ConfigError(f"{model.folder}: origin.family={model.origin.family!r} is not one of {', '.join(FAMILIES)}")
    export(model, model.config, model.origin, output, progress)
    copy_tokenizer(model.folder, output)


def export_trained(source: Source, config: ModelConfig, output: Path, progress: Progress) -> None:
    """Writes a model that was trained here as a checkpoint for Tencent's released code.

    Raises:
        ConfigError: the released code has no such model.
        WeightsError: `output` is there already.
    """
    name = {"float32": "float32", "bfloat16": "bfloat16"}[source_dtype(source, config).name]
    export(source, config, Origin("hunyuan", hunyuan_settings(config, name), False), output, progress)


def source_dtype(source: Source, config: ModelConfig) -> np.dtype:
    """In which the embedding is stored."""
    return source.dtype(hf_tensors(config, "hunyuan")[0].piece)


def export(source: Source, config: ModelConfig, origin: Origin, output: Path, progress: Progress) -> None:
    """Writes `source` as a checkpoint folder of `origin`'s family."""
    family: Family = next(family for family in FAMILIES if family == origin.family)
    tensors = hf_tensors(config, family)
    new = [NewTensor(tensor.name, source.dtype(tensor.piece), tensor.shape) for tensor in tensors]
    if origin.tied_head_stored:
        embedding = next(tensor for tensor in tensors if tensor.name == "model.embed_tokens.weight")
        tensors = [*tensors, embedding]
        new.append(NewTensor("lm_head.weight", source.dtype(embedding.piece), embedding.shape))

    def contents() -> Iterator[np.ndarray]:
        for tensor in tensors:
            values = tensor.from_piece(source.read(tensor.piece))
            yield values
            progress(values.nbytes)

    with new_folder(output) as folder:
        write_tensors(folder, new, contents())
        (folder / "config.json").write_text(json.dumps(origin.settings, indent=1), "utf-8")
