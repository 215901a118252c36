"""What each optimizer keeps for a parameter, in bytes, of the arrays of a training state made on the spot.

python -m benchmarks.bytes_per_parameter

The model is Hunyuan-Large in small (TINY), in which the embedding is a larger part than in a large model: a second
column counts the matrices of attention and experts alone, of which a large model consists. Gradients are those of a
step, in the format of `precision.gradients`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from moe.model.execution import Execution
from moe.model.parameter import QUANTIZED_KINDS, is_spec
from moe.model.precision import Precision
from moe.model.presets import TINY
from moe.train.optimizer import OptimizerConfig
from moe.train.optimizers.rounding import Compensated, MasterWeights
from moe.train.state import Blueprint, TrainState, make_blueprint
from parallel.layout import SINGLE_DEVICE

FLOAT32 = Precision()
BFLOAT16 = Precision(parameters="bfloat16", gradients="bfloat16")
ROWS: tuple[tuple[str, Precision, OptimizerConfig], ...] = (
    ("AdamW", FLOAT32, OptimizerConfig()),
    ("AdamW, bfloat16", FLOAT32, OptimizerConfig(states="bfloat16")),
    ("AdamW, int8", FLOAT32, OptimizerConfig(states="int8")),
    ("AdamW, fp8", FLOAT32, OptimizerConfig(states="fp8")),
    ("Muon", FLOAT32, OptimizerConfig(kind="muon")),
    ("Muon, int8", FLOAT32, OptimizerConfig(kind="muon", states="int8")),
    ("Adafactor", FLOAT32, OptimizerConfig(kind="adafactor")),
    ("AdamW, master weights", BFLOAT16, OptimizerConfig(master_weights=True)),
    ("AdamW, master weights, int8", BFLOAT16, OptimizerConfig(master_weights=True, states="int8")),
    ("AdamW, Kahan, bfloat16", BFLOAT16, OptimizerConfig(rounding="kahan", states="bfloat16")),
    ("AdamW, Kahan, int8", BFLOAT16, OptimizerConfig(rounding="kahan", states="int8")),
    ("AdamW, stochastic rounding, int8", BFLOAT16, OptimizerConfig(rounding="stochastic", states="int8")),
    (
        "Muon, stochastic rounding, int8",
        BFLOAT16,
        OptimizerConfig("muon", rounding="stochastic", states="int8"),
    ),
    ("Adafactor, stochastic rounding", BFLOAT16, OptimizerConfig("adafactor", rounding="stochastic")),
)


class Bytes(NamedTuple):
    """For each parameter, the mean. copies: master weights, or what rounding lost."""

    parameters: float
    moments: float
    copies: float
    gradients: float

    @property
    def total(self) -> float:
        return sum(self)


def measure(precision: Precision, optimizer: OptimizerConfig) -> tuple[Bytes, Bytes]:
    """Over all parameters, and over the matrices of attention and experts."""
    blueprint = make_blueprint(TINY, precision, Execution(), optimizer, SINGLE_DEVICE, steps=1000)
    state = blueprint.create_state(seed=0)
    return _counted(blueprint, state, matrices=False), _counted(blueprint, state, matrices=True)


def _counted(blueprint: Blueprint, state: TrainState, *, matrices: bool) -> Bytes:
    """matrices: whether only they count."""
    kept: Any = state.opt_state
    copies = None
    if isinstance(kept, MasterWeights):
        kept, copies = kept.inner, kept.master
    elif isinstance(kept, Compensated):
        kept, copies = kept.inner, kept.compensation

    def chosen(x: Any) -> Any:
        """Of a state its trees like the parameters', and of these the counted parameters' arrays."""
        if not isinstance(x, dict):
            return []
        counted = jax.tree.map(
            lambda spec, own: own if not matrices or spec.kind in QUANTIZED_KINDS else None,
            blueprint.specs,
            x,
            is_leaf=is_spec,
        )
        return jax.tree.leaves(counted)

    def held(tree: Any) -> int:
        trees = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, dict))
        return sum(x.nbytes for each in trees for x in chosen(each))

    count = sum(x.size for x in chosen(state.params))
    gradients = jnp.dtype(blueprint.precision.gradients).itemsize
    return Bytes(held(state.params) / count, held(kept) / count, held(copies) / count, gradients)


def main() -> None:
    table = Table(title=f"bytes a parameter of {TINY.num_layers} layers, {TINY.num_experts} experts")
    table.add_column("optimizer")
    for column in (*Bytes._fields, "all", "all, matrices only"):
        table.add_column(column, justify="right")
    for name, precision, optimizer in ROWS:
        whole, matrices = measure(precision, optimizer)
        table.add_row(name, *(f"{value:.2f}" for value in (*whole, whole.total, matrices.total)))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
