"""How a train step's time grows with tokens, layers, experts and virtual devices.

    python -m benchmarks.scaling [--repeats 5]

Each row is beside the base, a model of the 158M preset's width with two layers on one device, and tells how many times
as long it takes and how many times the work of products it is; their quotient says what growing costs. More experts
are more weights, for the optimizer above all, and no more products. Virtual devices share the same cores. Each takes
turns with the base, in a process of its own; ratios compare a turn with the turn beside it.
"""

from dataclasses import dataclass, replace

import jax
from rich.console import Console
from rich.table import Table

from benchmarks.rivals.pairing import alternate
from benchmarks.rivals.party import drive_or_join, party
from benchmarks.rivals.protocol import About, Take
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
MODULE = "benchmarks.scaling"


def begin(name: str) -> tuple[About, Take]:
    """Makes the case of this name ready to take turns. It is about the FLOPs of a step's products."""
    (case,) = (case for case in (BASE, *CASES) if case.name == name)
    jax.config.update("jax_num_cpu_devices", case.mesh.num_devices)
    config = replace(SPEED_158M, num_layers=case.layers, num_experts=case.experts)
    layout = SINGLE_DEVICE if case.mesh.num_devices == 1 else Layout(make_mesh(case.mesh))
    take, flops = stepper(config, FULL, case.batch, LENGTH, layout)
    return {"work": flops * case.batch * LENGTH}, take


def main() -> None:
    repeats = asked_repeats(MODULE, __doc__, 5, "turns of each case")
    console = Console(width=120, highlight=False)
    console.print(f"{machine()}, {repeats} turns: median (least to most)")
    table = Table("float32", "time, times the base's", "work", "time for the work", box=None)
    with party(MODULE, BASE.name) as base:
        for case in CASES:
            with party(MODULE, case.name) as own:
                pairs = alternate(own, base, repeats)
                more = own.about["work"] / base.about["work"]
            ratios = [pair.ours.seconds["step"] / pair.rival.seconds["step"] for pair in pairs]
            table.add_row(case.name, spread(ratios, 2), f"{more:.2f}", spread([ratio / more for ratio in ratios], 2))
            console.print(f"  {case.name}: measured")
        console.print(f"{BASE.name}: {BASE.batch * LENGTH / base.turn().seconds['step']:,.0f} tokens/s")
    console.print(table)


if __name__ == "__main__":
    use_large_pages()
    drive_or_join(main, begin)
