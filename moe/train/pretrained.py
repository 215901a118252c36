"""Weights to start from, whatever form they have: a checkpoint of Hugging Face's kind, a model folder, or a run."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from moe.model.adapter import LoraConfig
from moe.model.config import ConfigError, ModelConfig
from moe.model.execution import Execution
from moe.model.folder import ModelFolder, is_model_folder
from moe.model.hf.checkpoint import HfCheckpoint, model_specs
from moe.model.hf.config import differences
from moe.model.hf.quantized import QuantizedCheckpoint, is_quantized_checkpoint
from moe.model.parameter import SelectionBias
from moe.model.pieces import Piece, Source, load, pieces
from moe.model.precision import Precision
from moe.model.transformer import Transformer
from moe.ops.quantize import Quantized
from moe.train.lora import merged
from moe.train.trained import ArraySource, TrainedModel
from parallel.layout import SINGLE_DEVICE, Layout


@dataclass(frozen=True)
class Pretrained:
    """
    folder: which was given.
    config: of the model.
    dtype: in which most parameters are stored.
    settings: a checkpoint's config.json; empty for a run.
    load: parameters and selection biases on a layout, as nested dicts; in a format, or None as stored; matrices
        quantized, or None as stored.
    source: for reading the parameters piece by piece.
    quantized: the format in which the matrices are quantized already; None where they are wide.
    """

    folder: Path
    config: ModelConfig
    dtype: jnp.dtype
    settings: dict[str, Any]
    load: Callable[[Layout, DTypeLike | None, Quantized | None], tuple[dict[str, Any], dict[str, Any]]]
    source: Callable[[], Source]
    quantized: Quantized | None = None

    def check(self, config: ModelConfig) -> None:
        """
        Raises:
            ConfigError: `config` computes something else than these weights were made for.
        """
        found = differences(config, self.config)
        if found:
            told = ", ".join(f"model.{name}={ours!r} instead of {theirs!r}" for name, ours, theirs in found)
            raise ConfigError(f"init_from={str(self.folder)!r} holds another model: {told}")


def open_pretrained(folder: Path) -> Pretrained:
    """Opens weights of any of the three forms; reads none of them yet.

    Raises:
        ConfigError, WeightsError, CheckpointError: nothing usable stands there; see HfCheckpoint, ModelFolder and
            TrainedModel.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give a checkpoint, a model folder or the folder of a run")
    if is_model_folder(folder):
        model = ModelFolder(folder)
        model.check(model_specs(model.config, Precision()))
        return _from_source(folder, model, model.config, model.origin.settings)
    if _is_run(folder):
        trained = TrainedModel(folder)
        dtype = jnp.dtype(trained.precision.parameters)
        if trained.lora is None:
            return Pretrained(folder, trained.config, dtype, {}, trained.restore, trained.source)
        return _adapted(trained, trained.lora)
    if is_quantized_checkpoint(folder):
        return _quantized(QuantizedCheckpoint(folder))
    checkpoint = HfCheckpoint(folder)
    return _from_source(folder, checkpoint, checkpoint.config, checkpoint.settings)


def _adapted(trained: TrainedModel, lora: LoraConfig) -> Pretrained:
    """The model in which a run trained adapters, with these merged."""
    if trained.init_from is None:
        raise ConfigError(
            f"{trained.folder}: trained adapters for weights that were drawn at random and are not kept; "
            "train with init_from=FOLDER"
        )
    base = open_pretrained(Path(trained.init_from))

    def load_merged(layout: Layout, dtype: DTypeLike | None, format: Quantized | None) -> Any:
        params, _ = base.load(layout, dtype, format)
        adapters, balance = trained.restore(layout)
        return merged(adapters, params, lora), balance

    def source() -> Source:
        return ArraySource(load_merged(SINGLE_DEVICE, None, None)[0])

    return Pretrained(trained.folder, base.config, base.dtype, base.settings, load_merged, source, base.quantized)


def _quantized(checkpoint: QuantizedCheckpoint) -> Pretrained:
    """Its matrices stay as they are."""

    def load_as_stored(layout: Layout, dtype: DTypeLike | None, format: Quantized | None) -> Any:
        if format != checkpoint.format and (format, dtype) != (None, None):
            raise ConfigError(
                f"{checkpoint.folder}: holds weights in {checkpoint.format}, and {format or 'wide ones'} were asked "
                f"for: serve it without --weights, or train adapters with precision.frozen={checkpoint.format!r}"
            )
        return _load(checkpoint, checkpoint.config, layout, dtype, checkpoint.format)

    opened = _from_source(checkpoint.folder, checkpoint, checkpoint.config, checkpoint.settings)
    return replace(opened, load=load_as_stored, quantized=checkpoint.format)


def _is_run(folder: Path) -> bool:
    try:
        return "fingerprint" in json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False


def _from_source(folder: Path, source: Source, config: ModelConfig, settings: dict[str, Any]) -> Pretrained:
    first: Piece = pieces(config, model_specs(config, Precision()))[0]
    return Pretrained(
        folder, config, jnp.dtype(source.dtype(first)), settings, partial(_load, source, config), lambda: source
    )


def _load(
    source: Source, config: ModelConfig, layout: Layout, dtype: DTypeLike | None, format: Quantized | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    precision = Precision()
    model = nnx.eval_shape(lambda: Transformer(config, precision, Execution(), rngs=nnx.Rngs(0)))
    balance = nnx.to_pure_dict(nnx.state(model, SelectionBias))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=layout.whole()), balance)
    return load(source, config, model_specs(config, precision), layout, dtype, format), zeros
