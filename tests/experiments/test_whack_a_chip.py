import json

import pytest

from experiments.whack_a_chip import CHIPS, main
from moe.planner.chips import H20, H100


@pytest.mark.slow
def test_the_study_by_estimates(capsys, tmp_path):
    files = {name: tmp_path / f"study.{name}" for name in ("json", "html")}
    picture = tmp_path / "study.png"
    arguments = [part for name, file in files.items() for part in (f"--{name}", str(file))]
    assert main(["--estimate", *arguments, "--picture", str(picture)]) == 0
    told = json.loads(files["json"].read_text("utf-8"))
    assert list(told["campaigns"]) == [chip.name for chip in CHIPS]
    h20, h100 = told["campaigns"][H20.name], told["campaigns"][H100.name]
    assert (h20["export"], h100["export"]) == ("free", "restricted")
    assert h20["origin"] == "estimated"
    # 7e12 tokens in steps of 1024 x 4096.
    assert h20["days"] == 7e12 / (1024 * 4096) * h20["step_seconds"] / 86400
    assert h20["megawatt_hours"] == h20["gpu_days"] * 24 * 400 / 1e6
    for points in (*told["limits"].values(), told["tpp"]["full recipe"][::-1]):
        slower = [each for _, each in points]
        assert slower == sorted(slower), "less of anything is never faster"
    assert told["memory"]["1.0"]["gpus"] == 512
    assert "estimated, not compiled" in capsys.readouterr().out
    assert "<svg" in files["html"].read_text("utf-8")
    assert picture.read_bytes().startswith(b"\x89PNG")
