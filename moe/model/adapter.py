"""Low-rank adapters beside weights that stay as they are (LoRA, arXiv 2106.09685).

J is the rank: an adapter adds alpha / J · B(A(dropout(x))) to a product, where A maps the inputs to J numbers and B
these to the outputs. A is drawn as PEFT draws it, uniformly up to the inverse root of the inputs; B begins at zero, and
so the adapted model as the one it was.

Each routed expert has an A and a B of its own. Its rows are on their way when dropout would draw for them, so for all
of an expert's rows the same inputs are dropped, as rows of its A (LoRA Dropout, arXiv 2404.09610).
"""

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from moe.model.config import ConfigError, require_positive
from moe.model.parameter import summed_axes, used
from moe.model.precision import Precision
from parallel.layout import Layout

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]


@dataclass(frozen=True)
class LoraConfig:
    """Of adapters. The defaults are the release's (Tencent-Hunyuan-Large, train/README.md).

    rank: J. alpha: the adapters' share, as alpha / rank. dropout: share of the inputs that an adapter does not see
        while it is trained.
    targets: beside which products adapters stand: attention's q, k, v and o, and gate, up and down of every
        feed-forward network: of dense layers, shared experts and routed experts.
    """

    rank: int = 64
    alpha: float = 128.0
    dropout: float = 0.1
    targets: tuple[Target, ...] = ("q", "k", "v", "o")

    def __post_init__(self) -> None:
        require_positive(self, "rank", area="lora.")
        if not self.alpha > 0:
            raise ConfigError(f"lora.alpha={self.alpha}: give a number above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout={self.dropout}: give a share from 0 to below 1")
        known = get_args(Target)
        if not self.targets or len(set(self.targets)) < len(self.targets) or not set(self.targets) <= set(known):
            raise ConfigError(f"lora.targets={','.join(self.targets)}: give some of {', '.join(known)}, each once")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Projection(IntEnum):
    """Which of a layer's products; numbers go into random keys."""

    q = 0
    k = 1
    v = 2
    o = 3
    gate = 4
    up = 5
    down = 6
    expert_gate = 7
    expert_up = 8
    expert_down = 9

    @property
    def target(self) -> str:
        """As `LoraConfig.targets` calls it."""
        return self.name.removeprefix("expert_")


class LowRank(NamedTuple):
    """What is added to the weights of a layer's experts, as a product: a_EDJ or a_EFJ, and b_EJF or b_EJD."""

    a: jax.Array
    b: jax.Array


class Adapter(nnx.Module):
    """Beside one weight, stacked as that is. Stored as trained parameters are, computed as x is."""

    def __init__(
        self, which: Projection, weight: nnx.Param, config: LoraConfig, precision: Precision, *, rngs: nnx.Rngs
    ) -> None:
        axes = weight.get_metadata("axes")
        self.which = which
        self.experts = "E" if axes.startswith("E") else ""
        self.inputs = summed_axes(axes)
        self.outputs = "".join(letter for letter in axes if letter not in self.experts + self.inputs)
        self.config = config
        self.deterministic = False
        shape = weight.get_value().shape
        stack, sizes = shape[: len(shape) - len(axes)], dict(zip(axes[::-1], shape[::-1], strict=False))
        experts, inputs, outputs = ([sizes[x] for x in part] for part in (self.experts, self.inputs, self.outputs))
        bound = 1 / math.sqrt(math.prod(inputs))
        a = jax.random.uniform(rngs.params(), (*stack, *experts, *inputs, config.rank), jnp.float32, -bound, bound)
        b = jnp.zeros((*stack, *experts, config.rank, *outputs), precision.parameters)
        a_axes, b_axes = f"{self.experts}{self.inputs}J", f"{self.experts}J{self.outputs}"
        self.a = nnx.LoRAParam(a.astype(precision.parameters), axes=a_axes, kind="adapter")
        self.b = nnx.LoRAParam(b, axes=b_axes, kind="adapter")

    def __call__(self, x: jax.Array, key: jax.Array | None, layout: Layout) -> jax.Array:
        """What is added to the product of x. key: of this layer in this step, for dropout."""
        inputs, outputs = self.inputs, self.outputs
        x = self._dropped(x, x.shape, key)
        a, b = (used(w, x.dtype, layout) for w in (self.a, self.b))
        h_BTJ = layout.constrain(jnp.einsum(f"BT{inputs},{inputs}J->BTJ", x, a), "BTJ")
        return self.config.scale * jnp.einsum(f"BTJ,J{outputs}->BT{outputs}", h_BTJ, b)

    def of_experts(self, dtype: DTypeLike, key: jax.Array | None, layout: Layout) -> LowRank:
        """What is added to the experts' weights, with the scale and dropout in it. key: as in `__call__`."""
        a, b = (used(w, dtype, layout) for w in (self.a, self.b))
        return LowRank(self._dropped(a, (*a.shape[:-1], 1), key), self.config.scale * b)

    def specs(self, layout: Layout) -> LowRank:
        """Where `of_experts` live, for `jax.shard_map`."""
        specs: Any = [layout.used_spec(w.get_metadata("axes")) for w in (self.a, self.b)]
        return LowRank(*specs)

    def _dropped(self, x: jax.Array, shape: tuple[int, ...], key: jax.Array | None) -> jax.Array:
        """x with some entries zero, drawn for an array of `shape`, and the others larger."""
        if not self.config.dropout or self.deterministic:
            return x
        assert key is not None, "dropout draws: give the step's key, or set the model to `eval()`"
        kept = 1 - self.config.dropout
        drawn = jax.random.bernoulli(jax.random.fold_in(key, int(self.which)), kept, shape)
        return jnp.where(drawn, x / kept, 0).astype(x.dtype)


def set_adapters(
    adapters: nnx.Dict,
    weights: dict[Projection, nnx.Param],
    config: LoraConfig,
    precision: Precision,
    *,
    rngs: nnx.Rngs,
) -> None:
    """Puts into `adapters` those that `config` asks for, by their targets."""
    for which, weight in weights.items():
        if which.target in config.targets:
            adapters[which.target] = Adapter(which, weight, config, precision, rngs=rngs)


def adapted(
    adapters: nnx.Dict, target: Target, x: jax.Array, y: jax.Array, layout: Layout, key: jax.Array | None
) -> jax.Array:
    """y, the product of x, with what its adapter adds, where it has one."""
    return y + adapters[target](x, key, layout) if target in adapters else y
