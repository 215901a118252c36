"""A model folder: a model's configuration and weights under our own names, as `hf import` writes it.

model.json                  the configuration, and of which checkpoint it was made
model*.safetensors          stacked parameters, by the names of the nested dicts joined with dots
tokenizer files             as they stood beside the checkpoint
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe.model.config import ConfigError, ModelConfig, RopeConfig, RouterConfig
from moe.model.pieces import Piece, Source, parameters, pieces
from moe.model.tensor_files import NewTensor, TensorFolder, WeightsError, write_tensors

DESCRIPTION = "model.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "hy.tiktoken",
    "chat_template.jinja",
)


class Origin(NamedTuple):
    """The checkpoint that a folder was made of: its family, its config.json, and whether a tied head stood in it."""

    family: str
    settings: dict[str, Any]
    tied_head_stored: bool


class ModelFolder:
    """A model folder; a `moe.model.pieces.Source`."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            WeightsError: no model folder, or a damaged one.
            ConfigError: its configuration is none of ours.
        """
        self.folder = folder
        try:
            told = json.loads((folder / DESCRIPTION).read_text("utf-8"))
            self.config = config_from_json(told["config"])
            self.origin = Origin(**told["origin"])
        except OSError as error:
            raise WeightsError(f"{folder / DESCRIPTION}: cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise WeightsError(f"{folder / DESCRIPTION}: describes no model ({error!r})") from error
        self._files = TensorFolder(folder)

    def check(self, specs: dict[str, Any]) -> None:
        """
        Raises:
            WeightsError: a parameter is missing, surplus or misshapen.
        """
        found = dict(self._files.tensors)
        for path, spec in parameters(specs):
            name = ".".join(map(str, path))
            if name not in found:
                raise WeightsError(f"{self.folder}: lacks {name}, expected of shape {spec.shape}")
            if found[name].shape != spec.shape:
                raise WeightsError(f"{self.folder}: {name} has shape {found[name].shape}, expected {spec.shape}")
            del found[name]
        if found:
            raise WeightsError(f"{self.folder}: holds {min(found)}, which the model does not have")

    def dtype(self, piece: Piece) -> np.dtype:
        return self._files.tensors[piece.name].dtype

    def read(self, piece: Piece) -> np.ndarray:
        return self._files.read(piece.name, piece.index)


def is_model_folder(folder: Path) -> bool:
    return (folder / DESCRIPTION).is_file()


def write_model_folder(
    folder: Path, config: ModelConfig, specs: dict[str, Any], source: Source, origin: Origin, progress: Any
) -> None:
    """Fills `folder` from `source`, holding one piece at a time.

    Args:
        progress: called with the number of bytes written after each piece.
    """
    all_pieces = pieces(config, specs)
    formats = {piece.path: source.dtype(piece) for piece in all_pieces}
    tensors = [NewTensor(".".join(map(str, path)), formats[path], spec.shape) for path, spec in parameters(specs)]

    def contents() -> Iterator[np.ndarray]:
        for piece in all_pieces:
            values = source.read(piece)
            yield values
            progress(values.nbytes)

    write_tensors(folder, tensors, contents())
    told = {"config": asdict(config), "origin": origin._asdict()}
    (folder / DESCRIPTION).write_text(json.dumps(told, indent=1), "utf-8")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies what belongs to the tokenizer."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def config_from_json(told: dict[str, Any]) -> ModelConfig:
    """The ModelConfig whose `asdict` went through JSON.

    Raises:
        ConfigError: a field that is not ours, or a value that does not fit.
    """
    try:
        return ModelConfig(**told | {"rope": RopeConfig(**told["rope"]), "router": RouterConfig(**told["router"])})
    except (TypeError, KeyError) as error:
        raise ConfigError(f"the stored configuration is none of this version's ({error})") from error
