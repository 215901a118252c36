import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
NOTEBOOKS = sorted((ROOT / "experiments/notebooks").glob("*.ipynb"))
TOLD = {"first_steps": "nats per token", "whack_a_chip": "GPU-days"}
"""What each prints."""


def code_cells(notebook):
    return [cell for cell in json.loads(notebook.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_cleared_of_output(notebook):
    assert code_cells(notebook)
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code_cells(notebook))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(notebook, tmp_path):
    code = "\n\n".join("".join(cell["source"]) for cell in code_cells(notebook))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert TOLD[notebook.stem] in done.stdout
    if notebook.stem == "first_steps":
        assert list(tmp_path.glob("*/run/pictures/expert_load.png"))
