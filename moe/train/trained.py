"""A model that was trained here, read from its run's folder: configuration, parameters, tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import nnx
from jax.typing import DTypeLike

from moe.model.adapter import LoraConfig
from moe.model.config import ConfigError, ModelConfig
from moe.model.execution import plain_execution
from moe.model.folder import config_from_json
from moe.model.merge import StackedAdapters
from moe.model.parameter import SelectionBias, specs_of
from moe.model.pieces import Piece, load
from moe.model.precision import Precision
from moe.ops.quantize import Quantized
from moe.train.checkpoint import CheckpointError, damage_of, named
from moe.train.lora import trained
from moe.train.state import fresh_model
from parallel.layout import Layout


class ArraySource:
    """Parameters in memory as nested dicts; a `moe.model.pieces.Source`."""

    def __init__(self, params: dict[str, Any]) -> None:
        self.params = params

    def dtype(self, piece: Piece) -> np.dtype:
        return self._stacked(piece).dtype

    def read(self, piece: Piece) -> np.ndarray:
        return np.asarray(self._stacked(piece)[piece.index])

    def _stacked(self, piece: Piece) -> jax.Array:
        array: Any = self.params
        for key in piece.path:
            array = array[key]
        return array


class CheckpointSource:
    """Parameters in a checkpoint's arrays (OCDBT, as Orbax writes them), of which a piece alone is read; a
    `moe.model.pieces.Source`."""

    CACHED = 1_000_000_000
    """Bytes of chunks that are kept: a chunk has the same part of all layers."""

    def __init__(self, state: Path) -> None:
        self._store = {"driver": "ocdbt", "base": state.as_uri()}
        self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": self.CACHED}})
        self._open: dict[str, Any] = {}

    def dtype(self, piece: Piece) -> np.dtype:
        return self._array(piece).dtype.numpy_dtype

    def read(self, piece: Piece) -> np.ndarray:
        return self._array(piece)[piece.index].read().result()

    def _array(self, piece: Piece) -> Any:
        if piece.name not in self._open:
            kvstore = {**self._store, "path": f"params.{piece.name}/"}
            found = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, read=True, context=self._context)
            self._open[piece.name] = found.result()
        return self._open[piece.name]


class TrainedModel:
    """The newest whole checkpoint of a run. The run may be going on: nothing is changed in its folder.

    lora: of a run that trained adapters; these alone are its parameters then, and `init_from` names their base.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            ConfigError: no run's folder.
            CheckpointError: it has no whole checkpoint.
        """
        self.folder = folder
        try:
            frozen = json.loads((folder / "config.json").read_text("utf-8"))["config"]
            self.config: ModelConfig = config_from_json(frozen["model"])
            self.precision = Precision(**frozen["precision"])
            lora = frozen.get("lora")
            self.lora = lora and LoraConfig(**lora | {"targets": tuple(lora["targets"])})
            self.init_from: str | None = frozen["init_from"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{folder}: is no model folder, no checkpoint and no folder of a run of this version ({error})"
            ) from error
        execution = plain_execution(self.precision)
        model = nnx.eval_shape(
            lambda: fresh_model(self.config, self.precision, execution, self.lora, jax.random.key(0))
        )
        self.specs = specs_of(model, trained(self.lora))
        self._abstract = {
            "params": nnx.to_pure_dict(nnx.state(model, trained(self.lora))),
            "balance": nnx.to_pure_dict(nnx.state(model, SelectionBias)),
        }
        self.checkpoint = self._newest()

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.json"

    def copy_tokenizer(self, target: Path) -> None:
        """Copies the run's tokenizer into the folder `target`."""
        if self.tokenizer.is_file():
            shutil.copyfile(self.tokenizer, target / self.tokenizer.name)

    def source(self) -> CheckpointSource:
        """The parameters, to be read piece by piece.

        Raises:
            ConfigError: they are adapters.
        """
        if self.lora is not None:
            raise ConfigError(f"{self.folder}: holds adapters for {self.init_from}, and no weights of a whole model")
        return CheckpointSource(self.checkpoint / "state")

    def adapters(self) -> StackedAdapters:
        """The adapters, to be read piece by piece.

        Raises:
            ConfigError: the run trained none.
        """
        if self.lora is None:
            raise ConfigError(f"{self.folder}: trained all weights, and no adapters; give the run as the model itself")
        return StackedAdapters(CheckpointSource(self.checkpoint / "state"), self.lora)

    def balance(self, layout: Layout) -> dict[str, Any]:
        """The routers' selection biases on `layout`."""
        return self._restore(layout, None, ["balance"])["balance"]

    def restore(
        self, layout: Layout, dtype: DTypeLike | None = None, format: Quantized | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The parameters on `layout`, and the routers' selection biases, as nested dicts.

        Args:
            dtype: of the parameters; None as stored.
            format: of matrices that can be quantized, piece by piece; None to leave them.
        """
        if format is not None:
            return load(self.source(), self.config, self.specs, layout, dtype, format), self.balance(layout)
        found = self._restore(layout, dtype, ["params", "balance"])
        return found["params"], found["balance"]

    def _restore(self, layout: Layout, dtype: DTypeLike | None, parts: list[str]) -> dict[str, Any]:
        where = {
            "params": jax.tree.map(
                lambda spec: layout.stored(spec.axes, spec.shape), self.specs, is_leaf=lambda x: hasattr(x, "axes")
            ),
            "balance": jax.tree.map(lambda _: layout.whole(), self._abstract["balance"]),
        }
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

        def place(x: jax.ShapeDtypeStruct, sharding: Any, wanted: DTypeLike | None) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, wanted or x.dtype, sharding=sharding or here)

        abstract = {
            part: jax.tree.map(
                lambda x, sharding, wanted=dtype if part == "params" else None: place(x, sharding, wanted),
                self._abstract[part],
                where[part],
                is_leaf=lambda x: x is None,
            )
            for part in parts
        }
        flat = named(abstract)
        if not flat:
            return abstract
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            found = checkpointer.restore(
                self.checkpoint / "state",
                args=ocp.args.PyTreeRestore(
                    flat, restore_args=ocp.checkpoint_utils.construct_restore_args(flat), partial_restore=True
                ),
            )
        return jax.tree.unflatten(jax.tree.structure(abstract), [jnp.asarray(found[name]) for name in flat])

    def _newest(self) -> Path:
        checkpoints = self.folder / "checkpoints"
        steps = sorted((p for p in checkpoints.glob("*") if p.name.isdecimal()), reverse=True)
        for path in steps:
            if damage_of(path) is None:
                return path.resolve()
        raise CheckpointError(f"{checkpoints}: holds no whole checkpoint; train the run first")
