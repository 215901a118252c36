"""Low-rank adapters beside weights that stay as they are (LoRA, arXiv 2106.09685).

J is the rank: an adapter adds alpha / J · B(A(dropout(x))) to a product, where A maps the inputs to J numbers and B
these to the outputs. A is drawn as PEFT draws it, uniformly up to the inverse root of the inputs; B begins at zero, and
so the adapted model as the one it was.
"""

import math
from dataclasses import dataclass
from enum import IntEnum

import jax
import jax.numpy as jnp
from flax import nnx

from moe.model.config import ConfigError, require_positive
from moe.model.parameter import summed_axes, used
from moe.model.precision import Precision
from parallel.layout import Layout


@dataclass(frozen=True)
class LoraConfig:
    """Of adapters for attention's q, k, v and o projections. The defaults are the release's (Tencent-Hunyuan-Large,
    train/README.md).

    rank: J. alpha: the adapters' share, as alpha / rank. dropout: share of the inputs that an adapter does not see
        while it is trained.
    """

    rank: int = 64
    alpha: float = 128.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        require_positive(self, "rank", area="lora.")
        if not self.alpha > 0:
            raise ConfigError(f"lora.alpha={self.alpha}: give a number above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout={self.dropout}: give a share from 0 to below 1")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Projection(IntEnum):
    """Which of attention's products; numbers go into random keys."""

    q = 0
    k = 1
    v = 2
    o = 3


class Adapter(nnx.Module):
    """Beside one weight, stacked as that is. Stored as trained parameters are, computed as x is."""

    def __init__(self, weight: nnx.Param, config: LoraConfig, precision: Precision, *, rngs: nnx.Rngs) -> None:
        axes = weight.get_metadata("axes")
        self.inputs = summed_axes(axes)
        self.outputs = "".join(letter for letter in axes if letter not in self.inputs)
        self.config = config
        self.deterministic = False
        shape = weight.get_value().shape
        stack, sizes = shape[: len(shape) - len(axes)], dict(zip(axes[::-1], shape[::-1], strict=False))
        inputs, outputs = ([sizes[letter] for letter in part] for part in (self.inputs, self.outputs))
        bound = 1 / math.sqrt(math.prod(inputs))
        a = jax.random.uniform(rngs.params(), (*stack, *inputs, config.rank), jnp.float32, -bound, bound)
        b = jnp.zeros((*stack, config.rank, *outputs), precision.parameters)
        self.a = nnx.LoRAParam(a.astype(precision.parameters), axes=f"{self.inputs}J", kind="adapter")
        self.b = nnx.LoRAParam(b, axes=f"J{self.outputs}", kind="adapter")

    def __call__(self, x: jax.Array, key: jax.Array | None, layout: Layout) -> jax.Array:
        """What is added to the product of x. key: of this adapter in this step, for dropout."""
        inputs, outputs, kept = self.inputs, self.outputs, 1 - self.config.dropout
        if self.config.dropout and not self.deterministic:
            assert key is not None, "dropout draws: give the step's key, or set the model to `eval()`"
            x = jnp.where(jax.random.bernoulli(key, kept, x.shape), x / kept, 0).astype(x.dtype)
        a, b = (used(w, x.dtype, layout) for w in (self.a, self.b))
        h_BTJ = layout.constrain(jnp.einsum(f"BT{inputs},{inputs}J->BTJ", x, a), "BTJ")
        return self.config.scale * jnp.einsum(f"BTJ,J{outputs}->BT{outputs}", h_BTJ, b)
