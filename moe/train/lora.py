"""Fine-tuning by low-rank adapters (moe/model/adapter.py): which parameters are trained, and how they are merged.

With a quantized base (`Precision.frozen`) this is QLoRA (arXiv 2305.14314).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe.model.adapter import LoraConfig, Projection
from moe.model.config import ConfigError
from moe.model.precision import Precision
from moe.ops.quantize import QuantizedWeight, dequantize

WEIGHTS = {Projection.q: "w_q_DNH", Projection.k: "w_k_DMH", Projection.v: "w_v_DMH", Projection.o: "w_o_NHD"}


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


def merged(adapters: dict[str, Any], base: dict[str, Any], lora: LoraConfig) -> dict[str, Any]:
    """The parameters of a model without adapters that computes the same, to rounding.

    A quantized weight that has an adapter is wide afterwards, in the adapter's format; the others stay as they are.
    """
    found = {}
    for name, value in base.items():
        if name == "attention":
            own = adapters[name]["adapters"]
            changed = {
                WEIGHTS[which]: _merged(value[WEIGHTS[which]], own[which.name], lora.scale)
                for which in Projection
                if which.name in own
            }
            found[name] = value | changed
        else:
            found[name] = merged(adapters[name], value, lora) if name in adapters else value
    return found


def _merged(weight: Any, adapter: dict[str, jax.Array], scale: float) -> jax.Array:
    a, b = (adapter[name].astype(jnp.float32) for name in ("a", "b"))
    dtype = adapter["a"].dtype if isinstance(weight, QuantizedWeight) else weight.dtype
    wide = dequantize(weight, jnp.float32) if isinstance(weight, QuantizedWeight) else weight.astype(jnp.float32)
    stack, rank = a.shape[0], a.shape[-1]
    added = jnp.einsum("LIJ,LJO->LIO", a.reshape(stack, -1, rank), b.reshape(stack, rank, -1))
    return (wide + scale * added.reshape(wide.shape)).astype(dtype)
