"""A checkpoint folder of Hugging Face's kind: opened, checked against its config, read piece by piece."""

from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from moe.model.config import ModelConfig
from moe.model.execution import Execution
from moe.model.hf.config import Family, read_config
from moe.model.hf.names import HfTensor, hf_tensor
from moe.model.parameter import specs_of
from moe.model.pieces import Piece, pieces
from moe.model.precision import Precision
from moe.model.tensor_files import TensorFolder, WeightsError
from moe.model.transformer import Transformer

FLOATS = ("float32", "float16", "bfloat16")


class HfCheckpoint:
    """Weights in safetensors with their config.json; a `moe.model.pieces.Source`."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            ConfigError: config.json is missing, or says what is not implemented.
            WeightsError: a tensor is missing, surplus, misshapen, truncated or no number of the usual formats.
        """
        self.folder = folder
        self.family, self.config, self.settings = read_config(folder / "config.json")
        self._files = TensorFolder(folder)
        self.tensors = hf_tensors(self.config, self.family)
        self._by_piece = {(tensor.piece.path, tensor.piece.index): tensor for tensor in self.tensors}
        self.tied_head_stored = self.config.tie_embeddings and "lm_head.weight" in self._files.tensors
        self._check()

    def dtype(self, piece: Piece) -> np.dtype:
        return self._files.tensors[self._tensor(piece).name].dtype

    def read(self, piece: Piece) -> np.ndarray:
        tensor = self._tensor(piece)
        return tensor.to_piece(self._files.read(tensor.name))

    def _tensor(self, piece: Piece) -> HfTensor:
        return self._by_piece[piece.path, piece.index]

    def _check(self) -> None:
        found = self._files.tensors
        formats: dict[tuple, tuple[str, np.dtype]] = {}
        for name, shape, piece in self.tensors:
            if name not in found:
                raise WeightsError(f"{self.folder}: lacks the tensor {name}, expected of shape {shape}")
            if found[name].shape != shape:
                raise WeightsError(f"{self.folder}: {name} has shape {found[name].shape}; config.json asks for {shape}")
            dtype = found[name].dtype
            if dtype.name not in FLOATS:
                raise WeightsError(f"{self.folder}: {name} is stored as {dtype.name}; {', '.join(FLOATS)} can be read")
            first, expected = formats.setdefault(piece.path, (name, dtype))
            if dtype != expected:
                raise WeightsError(
                    f"{self.folder}: {name} is stored as {dtype.name} and {first} as {expected.name}; "
                    "the same weight of all layers must have one format"
                )
        surplus = found.keys() - {tensor.name for tensor in self.tensors}
        if self.tied_head_stored:
            surplus.discard("lm_head.weight")
            self._check_tied_head()
        if surplus:
            name = min(surplus)
            raise WeightsError(
                f"{self.folder}: holds {len(surplus)} tensors that config.json does not ask for, first {name} "
                f"of shape {found[name].shape}"
            )

    def _check_tied_head(self) -> None:
        head, embedding = (self._files.tensors[f"{name}.weight"] for name in ("lm_head", "model.embed_tokens"))
        same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
        rows = range(head.shape[0]) if same else ()
        if not same or any(
            self._files.read("lm_head.weight", (row,)).tobytes()
            != self._files.read("model.embed_tokens.weight", (row,)).tobytes()
            for row in rows
        ):
            raise WeightsError(
                f"{self.folder}: config.json ties lm_head.weight to model.embed_tokens.weight, and they differ; "
                "set tie_word_embeddings to false"
            )


def model_specs(config: ModelConfig, precision: Precision) -> dict[str, Any]:
    """The parameters' shapes and axes, as nested dicts."""
    return specs_of(nnx.eval_shape(lambda: Transformer(config, precision, Execution(), rngs=nnx.Rngs(0))))


def hf_tensors(config: ModelConfig, family: Family) -> list[HfTensor]:
    """All tensors of a checkpoint, in the order of the pieces."""
    return [hf_tensor(piece, family) for piece in pieces(config, model_specs(config, Precision()))]
