import json

import pytest

from experiments.old_hardware import CHIPS, main


@pytest.mark.slow
def test_the_study_by_estimates(capsys, tmp_path):
    file = tmp_path / "study.json"
    assert main(["--estimate", "--json", str(file)]) == 0
    told = json.loads(file.read_text("utf-8"))["campaigns"]
    assert list(told) == [chip.name for chip in CHIPS]
    assert told["v100"]["gpu_days"] > told["a800"]["gpu_days"]
    assert all(each["origin"] == "estimated" for each in told.values())
    shown = capsys.readouterr().out
    assert "The layout for each, chosen by estimates" in shown
