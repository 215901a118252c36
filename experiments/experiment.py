"""An experiment: everything that a run is, in one frozen dataclass that a file composes and a command carries out."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from experiments.overrides import check, settings, vary
from moe.model.adapter import LoraConfig
from moe.model.config import ConfigError, ModelConfig, divisors
from moe.model.execution import Execution, check_execution
from moe.model.precision import Precision, check_gathered
from moe.train.data import DataConfig
from moe.train.histories import check_products
from moe.train.loop import TrainingConfig
from moe.train.optimizer import OptimizerConfig, check_optimizer
from moe.train.pipelined import check_stages
from moe.train.state import Blueprint, make_blueprint
from moe.train.streamed import check_landing
from moe.train.tokenizer import SPECIAL
from parallel.layout import (
    BATCH_AXES,
    FSDP_AXES,
    SEQUENCE_AXIS,
    SINGLE_DEVICE,
    TENSOR_AXIS,
    Layout,
    LayoutConfig,
)
from parallel.mesh import MeshConfig, make_mesh

WITHOUT_EFFECT = (
    "name",
    "data.cache",
    "training.evaluate_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.peak_tflops",
)
"""Settings that leave every number of the training as it is. They may change from one start of a run to the next."""


@dataclass(frozen=True)
class Experiment:
    """
    name: of the run folder, runs/<name>.
    init_from: folder with the weights to start from: a checkpoint (moe/model/hf), a model folder or another run; None
        draws them at random.
    lora: adapters that are trained beside attention's weights, all others frozen; None trains everything.

    Raises ConfigError where the parts do not fit together. Every part has checked itself before.
    """

    name: str
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    precision: Precision = field(default_factory=Precision)
    execution: Execution = field(default_factory=Execution)
    init_from: str | None = None
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        for path, setting in settings(self).items():
            check(path, setting.kind, setting.value)
        if not self.name or set(self.name) & set("/\\\0") or self.name.startswith("."):
            raise ConfigError(f"name={self.name!r}: it names a folder, give one such as 'tiny'")
        self._check_batch()
        self._check_pipeline()
        self._check_sharding()
        check_optimizer(self.optimizer, self.precision, self.layout)
        check_gathered(self.precision, self.layout)
        check_execution(self.execution, self.precision)
        if self.optimizer.warmup_steps >= self.training.steps:
            raise ConfigError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} with training.steps={self.training.steps}: "
                f"warm up for fewer steps than the run has, {self.training.steps // 10} for example"
            )
        least = len(SPECIAL) + 256
        if self.data.tokenizer is None and self.model.vocab_size < least:
            raise ConfigError(
                f"model.vocab_size={self.model.vocab_size}: a byte-level tokenizer needs at least {least} ids"
            )

    def _check_batch(self) -> None:
        devices, microbatches = self._devices(*BATCH_AXES), self.training.microbatches
        parts = devices * microbatches
        if self.data.batch_size % parts:
            over = f"{self._over(*BATCH_AXES)} and training.microbatches={microbatches}"
            above = math.ceil(self.data.batch_size / parts) * parts
            raise ConfigError(
                f"data.batch_size={self.data.batch_size} does not divide over {over}: "
                f"use a multiple of {parts}, such as {above}"
            )

    def _check_sharding(self) -> None:
        experts, axes = self.model.num_experts, self.layout.experts
        if self.model.has_moe and experts % self._devices(*axes):
            raise ConfigError(
                f"model.num_experts={experts} does not divide over {self._over(*axes)}: use {divisors(experts)}"
            )
        for path, (size, axes) in self._split_sizes().items():
            parts = self._devices(*axes)
            if size % parts:
                raise ConfigError(
                    f"{path}={size} does not divide over {self._over(*axes)}: make it a multiple of {parts}, or "
                    f"share it out over {divisors(math.gcd(size, parts))} devices"
                )
        length, chunks = self.data.sequence_length, 2 * self.mesh.sequence
        if self.layout.sequence == "ring" and self.mesh.sequence > 1 and length % chunks:
            raise ConfigError(
                f"data.sequence_length={length} with layout.sequence='ring' over mesh.sequence={self.mesh.sequence}: "
                f"each device takes two chunks, make it a multiple of {chunks}, or set layout.sequence='heads'"
            )
        width, over = self.model.d_model, self._devices(*FSDP_AXES)
        if width % over:
            raise ConfigError(
                f"model.d_model={width} does not divide over {self._over(*FSDP_AXES)}, which share out the parameters: "
                f"make d_model a multiple of {over}, or move devices from mesh.data to mesh.replica"
            )

    def _check_pipeline(self) -> None:
        stages, virtual, microbatches = self.mesh.stage, self.training.virtual_stages, self.training.microbatches
        check_stages(self.model, stages, virtual)
        check_landing(self.layout, stages, microbatches)
        check_products(self.precision, self.execution, stages)
        if virtual > 1 and microbatches % stages:
            raise ConfigError(
                f"training.microbatches={microbatches} with training.virtual_stages={virtual}: interleaving takes "
                f"microbatches in groups of mesh.stage={stages}; use a multiple of {stages}, or virtual_stages=1"
            )

    def _split_sizes(self) -> dict[str, tuple[int, tuple[str, ...]]]:
        """What the tensor and sequence axes split, by the path of the setting, and over which axes. Key-value heads
        are never copied."""
        model, both = self.model, (SEQUENCE_AXIS, TENSOR_AXIS)
        tensor, heads = both[1:], both if self.layout.sequence == "heads" else both[1:]
        sizes: dict[str, tuple[int, tuple[str, ...]]] = {
            "model.num_kv_heads": (model.num_kv_heads, heads),
            "model.vocab_size": (model.vocab_size, tensor),
            "data.sequence_length": (self.data.sequence_length, both),
        }
        if model.has_moe and (self.layout.splits_width or model.num_shared_experts):
            sizes["model.d_expert"] = (model.d_expert, tensor)
        if model.has_dense:
            sizes["model.d_dense"] = (model.d_dense, tensor)
        return sizes

    def _devices(self, *axes: str) -> int:
        return math.prod(self.mesh.sizes[axis] for axis in axes)

    def _over(self, *axes: str) -> str:
        return " x ".join(f"mesh.{axis}={self.mesh.sizes[axis]}" for axis in axes)

    def vary(self, changes: Mapping[str, Any]) -> "Experiment":
        """A variant, checked anew: `experiment.vary({"model.router.top_k": 2, "mesh.expert": 4})`.

        Raises:
            ConfigError: an unknown path (the nearest ones are named), or a value that does not fit.
        """
        return vary(self, changes)

    def frozen(self) -> dict[str, Any]:
        """All settings as nested dicts of JSON values."""
        return json.loads(json.dumps(asdict(self)))

    def fingerprint(self) -> str:
        """64 hex digits, the same for the same numbers: all settings count but those `WITHOUT_EFFECT`."""
        counted = {path: setting.text for path, setting in settings(self).items() if path not in WITHOUT_EFFECT}
        return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()

    def blueprint(self, mesh: Mesh | None = None) -> Blueprint:
        """Plans the run's state on `mesh`; by default on the devices present, where one device needs no mesh
        unless its host's memory is used. Several processes (parallel/distributed.py) share one mesh, whatever its size.

        Raises:
            MeshError: there are fewer devices than `self.mesh` asks for, or more in several processes.
            LayoutError: a parameter does not divide over the mesh.
        """
        alone = self.mesh.num_devices == 1 and not jax.distributed.is_initialized()
        if mesh is None and (not alone or self.layout.on_host):
            mesh = make_mesh(self.mesh)
        layout = SINGLE_DEVICE if mesh is None else Layout(mesh, self.layout)
        steps, lora = self.training.steps, self.lora
        return make_blueprint(
            self.model, self.precision, self.execution, self.optimizer, layout, steps=steps, lora=lora
        )
