"""How a train step's time grows with tokens, layers, experts and virtual devices.

    python -m benchmarks.scaling [--repeats 5]

Each row is beside the base, a model of the 158M preset's width with two layers on one device, and tells how many times
as long it takes and how many times the work of products it is; their quotient says what growing costs. More experts
are more weights, for the optimizer above all, and no more products. Virtual devices share the same cores. All take
turns in one process; ratios compare turns with turns.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.spread import asked_repeats, machine, spread
from benchmarks.train_step import stepper
from moe.model.precision import FULL
from moe.model.presets import SPEED_158M
from parallel.layout import SINGLE_DEVICE, Layout
from parallel.malloc import use_large_pages
from parallel.mesh import MeshConfig, make_mesh

LENGTH = 256
ONE_DEVICE = MeshConfig()


@dataclass(frozen=True)
class Case:
    """One model on one mesh. `batch` is of sequences of `LENGTH` tokens."""

    name: str
    batch: int = 8
    layers: int = 2
    experts: int = 16
    mesh: MeshConfig = ONE_DEVICE

    def ready(self) -> tuple[Callable[[], tuple[float, float]], float]:
        """A function that takes one step and tells its seconds, and the FLOPs of its products."""
        config = replace(SPEED_158M, num_layers=self.layers, num_experts=self.experts)
        layout = SINGLE_DEVICE if self.mesh.num_devices == 1 else Layout(make_mesh(self.mesh))
        take, flops = stepper(config, FULL, self.batch, LENGTH, layout)
        return take, flops * self.batch * LENGTH


BASE = Case("base: 2,048 tokens, 2 layers, 16 experts, 1 device")
CASES = (
    Case("1,024 tokens", batch=4),
    Case("4,096 tokens", batch=16),
    Case("8,192 tokens", batch=32),
    Case("4 layers", layers=4),
    Case("8 layers", layers=8),
    Case("8 experts", experts=8),
    Case("64 experts", experts=64),
    Case("2 devices, data 2", mesh=MeshConfig(data=2)),
    Case("4 devices, data 2 x expert 2", mesh=MeshConfig(data=2, expert=2)),
    Case("8 devices, data 2 x expert 4", mesh=MeshConfig(data=2, expert=4)),
)


def main() -> None:
    repeats = asked_repeats("benchmarks.scaling", __doc__, 5, "turns of each case")
    console = Console(width=120, highlight=False)
    console.print(f"{machine()}, {repeats} turns: median (least to most)")
    table = Table("float32", "time, times the base's", "work", "time for the work", box=None)
    take_base, work_of_base = BASE.ready()
    for case in CASES:
        take, work = case.ready()
        ratios = []
        for _ in range(repeats):
            base, own = take_base()[0], take()[0]
            ratios.append(own / base)
        more = work / work_of_base
        table.add_row(case.name, spread(ratios, 2), f"{more:.2f}", spread((np.array(ratios) / more).tolist(), 2))
        console.print(f"  {case.name}: measured")
    console.print(f"{BASE.name}: {BASE.batch * LENGTH / take_base()[0]:,.0f} tokens/s")
    console.print(table)


if __name__ == "__main__":
    use_large_pages()
    jax.config.update("jax_num_cpu_devices", 8)
    main()
