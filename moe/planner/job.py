"""What is planned: one step of training, of prefilling or of decoding, as plain settings."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from moe.model.adapter import LoraConfig
from moe.model.config import ConfigError, ModelConfig, require_choice, require_positive
from moe.model.execution import Execution, check_execution
from moe.model.precision import Precision, check_gathered
from moe.train.lora import check_frozen
from moe.train.optimizer import OptimizerConfig
from parallel.layout import LayoutConfig
from parallel.mesh import MeshConfig

Kind = Literal["train", "prefill", "decode"]


@dataclass(frozen=True)
class Job:
    """
    kind: "train" is a whole optimizer step; "prefill" takes `batch_size` prompts of `sequence_length` tokens into an
        empty cache; "decode" makes one token more in each of `batch_size` texts, whose cache holds `sequence_length`.
    precision: its `frozen` is the weights' format in serving, and that of the base beneath LoRA.
    steps: of the whole run, which the learning rate's schedule knows.
    lora: adapters to train, the rest frozen; None trains everything.
    """

    kind: Kind
    model: ModelConfig
    batch_size: int
    sequence_length: int
    precision: Precision = field(default_factory=Precision)
    execution: Execution = field(default_factory=Execution)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    microbatches: int = 1
    virtual_stages: int = 1
    loss_chunk: int = 512
    steps: int = 1000
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        require_choice(self, "kind", get_args(Kind), area="job.")
        require_positive(self, "batch_size", "sequence_length", "microbatches", "virtual_stages", area="job.")
        check_gathered(self.precision, self.layout)
        check_execution(self.execution, self.precision)
        if self.kind == "train":
            check_frozen(self.precision, self.lora, self.mesh.stage)
        elif self.lora is not None:
            raise ConfigError(f"job.lora with job.kind={self.kind!r}: adapters are merged before a model serves")

    @property
    def tokens(self) -> int:
        """Of one step over all devices."""
        return self.batch_size * (1 if self.kind == "decode" else self.sequence_length)

    def check_estimated(self) -> None:
        """
        Raises:
            ConfigError: something of which only a compiled program tells.
        """
        name = {"train": "matmuls", "prefill": "activations"}.get(self.kind)
        if name is not None and (format := getattr(self.precision, name)) is not None:
            raise ConfigError(
                f"precision.{name}={format!r}: what products in 8 bits take is not estimated; plan "
                f"without --estimate (make plan-setup), or set precision.{name}=none"
            )
        if self.kind == "train" and not self.execution.scan_layers:
            raise ConfigError(
                "execution.scan_layers=False: what a step gains without a loop over layers is not estimated; plan "
                "without --estimate, which compiles the step, or set scan_layers=True"
            )
        if self.kind == "train" and self.optimizer.kind != "adamw":
            raise ConfigError(
                f"optimizer.kind={self.optimizer.kind!r}: only AdamW's update can be estimated; plan without "
                "--estimate, which compiles the step, or set kind='adamw'"
            )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def fingerprint(self) -> str:
        """64 hex digits, the same for the same settings."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def job_from_json(text: str) -> Job:
    """The inverse of `Job.to_json`.

    Raises:
        ConfigError: it describes no job.
    """
    try:
        return rebuilt(Job, json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"the description of a job cannot be read: {error}") from error


def rebuilt(kind: Any, value: Any) -> Any:
    """`value`, `dataclasses.asdict` of an annotated kind after a journey through JSON, as that kind."""
    if get_origin(kind) in (Union, UnionType):
        return None if value is None else rebuilt(next(k for k in get_args(kind) if k is not type(None)), value)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: rebuilt(hints[name], each) for name, each in value.items()})
    if get_origin(kind) is tuple:
        return tuple(rebuilt(get_args(kind)[0], each) for each in value)
    return value
