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

from moe.model.config import ConfigError, ModelConfig
from moe.model.execution import Execution
from moe.model.folder import ModelFolder, Origin, is_model_folder
from moe.model.hf.checkpoint import HfCheckpoint, model_specs
from moe.model.hf.config import FAMILIES, differences
from moe.model.hf.peft import PeftFolder
from moe.model.hf.quantized import QuantizedCheckpoint, is_quantized_checkpoint
from moe.model.merge import Adapters, MergedSource
from moe.model.parameter import SelectionBias
from moe.model.pieces import Piece, Source, load, pieces, unrolled
from moe.model.precision import Precision
from moe.model.transformer import Transformer
from moe.ops.quantize import Quantized
from moe.train.base import CheckedSource
from moe.train.run_folder import BASE
from moe.train.trained import TrainedModel
from parallel.layout import Layout

TRAINED_HERE = Origin("hunyuan", {}, False)


@dataclass(frozen=True)
class Pretrained:
    """
    folder: which was given.
    config: of the model.
    dtype: in which most parameters are stored.
    origin: the checkpoint it was or would be: its family and config.json; without settings for a run.
    source: of the parameters, piece by piece, as stored.
    balance: the routers' selection biases on a layout.
    load: parameters and selection biases on a layout, as nested dicts; in a format, or None as stored; matrices
        quantized, or None as stored.
    quantized: the format in which the matrices are quantized already; None where they are wide.
    """

    folder: Path
    config: ModelConfig
    dtype: jnp.dtype
    origin: Origin
    source: Source
    balance: Callable[[Layout], dict[str, Any]]
    load: Callable[[Layout, DTypeLike | None, Quantized | None], tuple[dict[str, Any], dict[str, Any]]]
    quantized: Quantized | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """A checkpoint's config.json; empty for a run."""
        return self.origin.settings

    def load_unrolled(self, layout: Layout, format: Quantized | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `load`, in the formats in which they are stored, for an unrolled model (moe/model/transformer.py)."""
        if self.quantized is not None and format not in (None, self.quantized):
            raise _holds_another_format(self.folder, self.quantized, format)
        specs = model_specs(self.config, Precision())
        params = load(self.source, self.config, specs, layout, None, format or self.quantized, unrolled=True)
        return params, unrolled(self.balance(layout))

    def check(self, config: ModelConfig, whose: str = "init_from") -> None:
        """
        Args:
            whose: model `config` is.

        Raises:
            ConfigError: `config` computes something else than these weights were made for.
        """
        found = differences(config, self.config)
        if found:
            told = ", ".join(f"model.{name}={ours!r} instead of {theirs!r}" for name, ours, theirs in found)
            raise ConfigError(f"{whose}: {str(self.folder)!r} holds another model: {told}")
        ours, theirs = config.router.balance, self.config.router.balance
        if config.has_moe and theirs == "bias" != ours:
            raise ConfigError(
                f"{whose}: experts of {str(self.folder)!r} are chosen with selection biases, which "
                f"model.router.balance={ours!r} has no place for; give 'bias'"
            )


def open_pretrained(folder: Path, adapters: Path | None = None) -> Pretrained:
    """Opens weights of any of the three forms; reads none of them yet.

    Args:
        adapters: to merge into them: the folder of a run that trained adapters, or one that PEFT wrote. A run of
            adapters given as `folder` is its base with these merged.

    Raises:
        ConfigError, WeightsError, CheckpointError: nothing usable stands there; see HfCheckpoint, ModelFolder,
            TrainedModel and PeftFolder.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give a checkpoint, a model folder or the folder of a run")
    found = _opened(folder)
    return found if adapters is None else _with_adapters(found, adapters)


def _opened(folder: Path) -> Pretrained:
    if is_model_folder(folder):
        model = ModelFolder(folder)
        model.check(model_specs(model.config, Precision()))
        return _read(folder, model, model.config, model.origin)
    if _is_run(folder):
        trained = TrainedModel(folder)
        if trained.lora is None:
            dtype = jnp.dtype(trained.precision.parameters)
            return Pretrained(
                folder, trained.config, dtype, TRAINED_HERE, trained.source(), trained.balance, trained.restore
            )
        if trained.init_from is None:
            raise ConfigError(
                f"{folder}: trained adapters for weights that were drawn at random and are not kept; "
                "train with init_from=FOLDER"
            )
        return _with_adapters(open_pretrained(Path(trained.init_from)), folder)
    if is_quantized_checkpoint(folder):
        return _quantized(QuantizedCheckpoint(folder))
    checkpoint = HfCheckpoint(folder)
    origin = Origin(checkpoint.family, checkpoint.settings, False)
    return _read(folder, checkpoint, checkpoint.config, origin)


def _with_adapters(base: Pretrained, folder: Path) -> Pretrained:
    """`base` with the adapters of `folder` merged into each piece as it is read."""
    if base.quantized is not None:
        raise ConfigError(
            f"{folder}: adapters are merged into wide weights, and {base.folder} holds {base.quantized}: give the wide "
            f"checkpoint, with weights={base.quantized!r} to quantize what was merged"
        )
    if not _is_run(folder):
        family = next(family for family in FAMILIES if family == base.origin.family)
        return _merging(base, PeftFolder(folder, base.config, family), base.balance)
    trained = TrainedModel(folder)
    adapters = trained.adapters()
    base.check(trained.config, str(folder))
    checked = CheckedSource(base.source, folder / BASE, jnp.dtype(trained.precision.stored_dtype))
    return _merging(replace(base, folder=folder, source=checked), adapters, trained.balance)


def _quantized(checkpoint: QuantizedCheckpoint) -> Pretrained:
    """Its matrices stay as they are."""
    origin = Origin(checkpoint.family, checkpoint.settings, False)
    opened = _read(checkpoint.folder, checkpoint, checkpoint.config, origin)

    def load_as_stored(layout: Layout, dtype: DTypeLike | None, format: Quantized | None) -> Any:
        if format != checkpoint.format and (format, dtype) != (None, None):
            raise _holds_another_format(checkpoint.folder, checkpoint.format, format)
        return opened.load(layout, dtype, checkpoint.format)

    return replace(opened, load=load_as_stored, quantized=checkpoint.format)


def _holds_another_format(folder: Path, held: Quantized, wanted: Quantized | None) -> ConfigError:
    return ConfigError(
        f"{folder}: holds weights in {held}, and {wanted or 'wide ones'} were asked for: serve it without --weights, "
        f"or train adapters with precision.frozen={held!r}"
    )


def _merging(base: Pretrained, adapters: Adapters, balance: Callable[[Layout], dict[str, Any]]) -> Pretrained:
    source = MergedSource(base.source, adapters)
    return replace(base, source=source, balance=balance, load=partial(_load, source, base.config, balance))


def _is_run(folder: Path) -> bool:
    try:
        return "fingerprint" in json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False


def _read(folder: Path, source: Source, config: ModelConfig, origin: Origin) -> Pretrained:
    first: Piece = pieces(config, model_specs(config, Precision()))[0]
    dtype, balance = jnp.dtype(source.dtype(first)), partial(_no_biases, config)
    return Pretrained(folder, config, dtype, origin, source, balance, partial(_load, source, config, balance))


def _load(
    source: Source,
    config: ModelConfig,
    balance: Callable[[Layout], dict[str, Any]],
    layout: Layout,
    dtype: DTypeLike | None,
    format: Quantized | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    return load(source, config, model_specs(config, Precision()), layout, dtype, format), balance(layout)


def _no_biases(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    model = nnx.eval_shape(lambda: Transformer(config, Precision(), Execution(), rngs=nnx.Rngs(0)))
    balance = nnx.to_pure_dict(nnx.state(model, SelectionBias))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=layout.whole()), balance)
