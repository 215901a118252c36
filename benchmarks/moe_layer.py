"""A dropless mixture-of-experts layer, forward and backward, beside a dense layer of equal useful FLOPs.

    python -m benchmarks.moe_layer [--tokens 8192] [--repeats 7]

Layers have the 158M model's width and no shared expert; the dense layer is as wide as the experts that a token goes to
are together. Two at a time take turns, each in a process of its own; ratios compare a turn with the turn beside it.
"""

import argparse
import time
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks.rivals.pairing import alternate
from benchmarks.rivals.party import drive_or_join, party
from benchmarks.rivals.protocol import About, Take
from benchmarks.spread import machine, spread
from moe.model.config import RouterConfig
from moe.model.execution import Execution
from moe.model.feed_forward import FeedForward
from moe.model.moe_layer import MoELayer
from moe.model.parameter import SelectionBias
from moe.model.precision import FULL, Precision
from moe.model.presets import SPEED_158M
from parallel.layout import SINGLE_DEVICE
from parallel.malloc import use_large_pages

LENGTH = 512
FORMATS = {"float32": FULL, "bfloat16": Precision()}


@dataclass(frozen=True)
class Layer:
    """
    experts: 0 for a dense layer of `top_k` experts' width.
    skewed: whether all tokens go to the first expert.
    """

    experts: int
    top_k: int
    skewed: bool = False

    @property
    def name(self) -> str:
        if not self.experts:
            return f"dense, of {self.top_k} experts' width"
        return f"{self.experts} experts, top-{self.top_k}" + (", all tokens to one" if self.skewed else "")

    def runner(self, precision: Precision, tokens: int) -> Take:
        """A function that goes through the layer and back."""
        sizes = SPEED_158M
        shape = (tokens // LENGTH, LENGTH, sizes.d_model)
        x_BTD, dy_BTD = (jax.random.normal(jax.random.key(i), shape).astype(precision.compute_dtype) for i in range(2))
        graph, params, *others = nnx.split(self._module(precision), nnx.Param, ...)
        valid_BT = jnp.ones(shape[:2], bool)

        def through(params: Any, x_BTD: jax.Array) -> jax.Array:
            module = nnx.merge(graph, params, *others)
            if self.experts:
                return module(x_BTD, valid_BT, jnp.int32(0), None, SINGLE_DEVICE)[0]
            return module(x_BTD, SINGLE_DEVICE)

        @jax.jit
        def there_and_back(params: Any, x_BTD: jax.Array, dy_BTD: jax.Array) -> Any:
            y_BTD, back = jax.vjp(through, params, x_BTD)
            return y_BTD, back(dy_BTD)

        def take() -> tuple[dict[str, float], None]:
            begin = time.perf_counter()
            jax.block_until_ready(there_and_back(params, x_BTD, dy_BTD))
            return {"layer": time.perf_counter() - begin}, None

        take()
        return take

    def _module(self, precision: Precision) -> nnx.Module:
        sizes, rngs = SPEED_158M, nnx.Rngs(0)
        if not self.experts:
            width = self.top_k * sizes.d_expert
            return FeedForward(sizes.d_model, width, "dense", sizes.init_std, precision, rngs=rngs)
        router = RouterConfig(top_k=self.top_k, balance="bias", capacity_factor=None)
        config = replace(sizes, num_experts=self.experts, num_shared_experts=0, router=router)
        module = MoELayer(config, precision, Execution(), rngs=rngs)
        if self.skewed:
            # More than any probability.
            module.router.bias_E = SelectionBias(2.0 * jax.nn.one_hot(0, self.experts))
        return module


PAIRS: tuple[tuple[Layer, Layer], ...] = (
    (Layer(16, 1), Layer(0, 1)),
    (Layer(16, 2), Layer(0, 2)),
    (Layer(128, 1), Layer(8, 1)),
    (Layer(16, 1, skewed=True), Layer(16, 1)),
)
"""What is measured, and what with."""
MODULE = "benchmarks.moe_layer"


def begin(name: str, format: str, tokens: int) -> tuple[About, Take]:
    """Makes the layer of this name ready to take turns."""
    (layer,) = {layer for pair in PAIRS for layer in pair if layer.name == name}
    return {}, layer.runner(FORMATS[format], tokens)


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help=f"a multiple of {LENGTH} (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each layer (default: %(default)s)")
    options = parser.parse_args()
    if options.tokens < 1 or options.tokens % LENGTH or options.repeats < 1:
        parser.error(
            f"--tokens {options.tokens} --repeats {options.repeats}: give a multiple of {LENGTH}, and 1 or more"
        )
    console = Console(width=140, highlight=False)
    console.print(f"{machine()}, {options.tokens} tokens, {options.repeats} turns: median (least to most)")
    for format in FORMATS:
        table = Table(format, "ms", "beside", "time, times its", box=None)
        for layer, rival in PAIRS:
            with (
                party(MODULE, layer.name, format=format, tokens=options.tokens) as own,
                party(MODULE, rival.name, format=format, tokens=options.tokens) as other,
            ):
                pairs = alternate(own, other, options.repeats)
            milliseconds = [1e3 * pair.ours.seconds["layer"] for pair in pairs]
            ratios = [pair.ours.seconds["layer"] / pair.rival.seconds["layer"] for pair in pairs]
            table.add_row(layer.name, spread(milliseconds, 0), rival.name, spread(ratios, 2))
        console.print(table)


if __name__ == "__main__":
    use_large_pages()
    drive_or_join(main, begin)
