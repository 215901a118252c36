"""Fine-tuning by low-rank adapters (moe/model/adapter.py): which parameters are trained.

With a quantized base (`Precision.frozen`) this is QLoRA (arXiv 2305.14314).
"""

from typing import Any

from flax import nnx

from moe.model.adapter import LoraConfig
from moe.model.config import ConfigError
from moe.model.precision import Precision


def trained(lora: LoraConfig | None) -> Any:
    """The kind of parameters that gradients move, as `nnx.state` takes it."""
    return nnx.Param if lora is None else nnx.LoRAParam


def frozen(lora: LoraConfig | None) -> Any:
    """The parameters that are left, as `nnx.state` takes it."""
    return nnx.Nothing() if lora is None else nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))


def check_frozen(precision: Precision, lora: LoraConfig | None, stages: int) -> None:
    """
    Raises:
        ConfigError: a format for frozen parameters where all are trained, products without gradients, or adapters over
            stages.
    """
    if precision.activations is not None:
        raise ConfigError(
            f"precision.activations={precision.activations!r} in training: products with quantized matrices have no "
            "gradients; it is for serving, so set precision.activations=none"
        )
    if precision.frozen is not None and lora is None:
        raise ConfigError(
            f"precision.frozen={precision.frozen!r} without lora: all parameters are trained; set "
            "lora=LoraConfig(), or precision.frozen=None"
        )
    if lora is not None and stages > 1:
        raise ConfigError(
            f"lora with mesh.stage={stages}: pipelines train all parameters; use these devices along mesh.data, "
            "mesh.expert or mesh.tensor"
        )
