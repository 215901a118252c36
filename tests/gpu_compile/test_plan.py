"""`plan` and `ablate` from the command to the page, with a program that XLA compiles.

Needs the CUDA plugin; skipped without. Run as tests/gpu_compile/test_gpu_compile.py is.
"""

import json
from pathlib import Path

import pytest

from experiments.plan import main
from moe.planner.target import can_compile

pytestmark = pytest.mark.skipif(not can_compile(), reason="the CUDA plugin is not installed: `make plan-setup`")

TINY = str(Path(__file__).parent.parent.parent / "experiments/tiny.py")
SMALL = [
    "--set", "model.num_layers=2", "--set", "mesh.data=1", "--set", "mesh.expert=2", "--set", "data.batch_size=4",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["train", "decode"])
def test_a_compiled_plan(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([TINY, "--chip", "h20", "--kind", kind, *SMALL, "--json", "plan.json", "--html", "plan.html"]) == 0
    told = capsys.readouterr()
    assert "compiling for 2 x NVIDIA H20" in told.err
    assert "stimated" not in told.out
    values = json.loads(Path("plan.json").read_text("utf-8"))
    assert values["origin"] == "compiled"
    assert values["compiling"]["seconds"] > 0
    memory = values["memory"]
    assert sum(memory["parts_bytes"].values()) == memory["peak_bytes"] <= memory["allocated_bytes"]
    assert max(alive for _, alive in memory["over_program"]) == memory["peak_bytes"]
    assert memory["largest"]
    assert any(each["source"].startswith("moe/") for each in memory["largest"])
    if kind == "train":
        assert values["arithmetic"]["executed_to_model"] == pytest.approx(1, abs=0.1)
        assert {each["kind"] for each in values["exchanges"]} >= {"all-to-all", "all-gather"}
    assert "<svg" in Path("plan.html").read_text("utf-8")
