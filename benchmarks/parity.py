"""How far we are from Tencent's released code on its golden results: python -m benchmarks.parity

Worst figure of each quantity: the largest difference over the largest expected value (tests/golden/README.md).
"""

import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from moe.model.hf.evaluate import evaluate
from parallel.layout import SINGLE_DEVICE, Layout
from parallel.mesh import MeshConfig, make_mesh

GOLDEN = Path(__file__).parent.parent / "tests/golden"
QUANTITIES = ("hidden_states", "logits", "loss", "grad", "grad_norm")


def worst_figures(fixture: Path, layout: Layout) -> dict[str, float]:
    """By quantity; under "greedy_ids" the number of tokens that differ."""
    expected = load_file(fixture / "reference.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.safetensors"
        evaluate(fixture, fixture / "reference.safetensors", output, layout)
        found = load_file(output)
    worst = dict.fromkeys(QUANTITIES, 0.0)
    for name, value in expected.items():
        quantity = name.split(".")[0]
        if quantity not in worst:
            continue
        is_norm = quantity == "grad_norm"
        ours = np.array(np.linalg.norm(found[name.replace("grad_norm", "grad", 1)])) if is_norm else found[name]
        worst[quantity] = max(worst[quantity], float(np.abs(ours - value).max() / np.abs(value).max()))
    return worst | {"greedy_ids": int((found["greedy_ids"] != expected["greedy_ids"]).sum())}


def main() -> None:
    mesh = Layout(make_mesh(MeshConfig(data=2, expert=4)))
    table = Table("fixture", "devices", *QUANTITIES, "greedy tokens that differ", box=None)
    for fixture in sorted(path.parent for path in GOLDEN.glob("*/reference.safetensors")):
        for devices, layout in (("1", SINGLE_DEVICE), ("data 2 x expert 4", mesh)):
            worst = worst_figures(fixture, layout)
            figures = [f"{worst[quantity]:.1e}" for quantity in QUANTITIES]
            table.add_row(fixture.name, devices, *figures, str(worst["greedy_ids"]))
    Console(width=120, highlight=False).print(table)


if __name__ == "__main__":
    main()
