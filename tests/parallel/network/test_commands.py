import json

import pytest

from parallel.network.__main__ import main
from tests.parallel.network.recorded import FOLDER


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("hgx_h20_healthy", 0),
        ("roce_dma_buf", 0),
        ("rail_down", 1),
        ("nic_on_other_socket", 1),
        ("peermem_missing", 1),
        ("rdma_disabled", 1),
        ("cloud_vm", 1),
        ("no_gpu", 3),
    ],
)
def test_doctor(name, code, capsys):
    assert main(["doctor", "--from", str(FOLDER / name)]) == code
    out = capsys.readouterr().out
    assert out.startswith("There is no GPU here" if code == 3 else "GPUDirect RDMA will")
    assert main(["doctor", "--from", str(FOLDER / name), "--json"]) == code
    answer = json.loads(capsys.readouterr().out)
    assert answer["exit_code"] == code
    assert answer["sentence"].split()[0] == out.split()[0]
    assert len(answer["rails"]) == (0 if code == 3 else 8)


def test_doctor_that_cannot_tell(tmp_path):
    for name in ("nvidia-smi-gpus.txt", "nvidia-smi-topo.txt"):
        (tmp_path / name).write_bytes((FOLDER / "hgx_h20_healthy" / name).read_bytes())
    assert main(["doctor", "--from", str(tmp_path)]) == 4


def test_doctor_with_a_log_of_ones_own(capsys):
    log = FOLDER / "hgx_h20_healthy" / "nccl.log"
    assert main(["doctor", "--from", str(FOLDER / "peermem_missing"), "--nccl-log", str(log)]) == 0
    assert "NCCL's log shows it" in capsys.readouterr().out


def test_doctor_with_mistakes(tmp_path, capsys):
    assert main(["doctor", "--from", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["doctor", "--nccl-log", str(tmp_path / "job.log")]) == 2
    assert "job.log: no such file" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["doctor", "--record", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err


def test_doctor_here(tmp_path, capsys):
    # No GPU where the tests run; where there is one, any verdict of its own is right.
    code = main(["doctor", "--record", str(tmp_path / "node")])
    assert code in (0, 1, 3, 4)
    assert main(["doctor", "--from", str(tmp_path / "node")]) == code
