import pytest

from parallel.network import all_reduce
from parallel.network.collect import collect
from parallel.network.recording import FILES, RecordingError, read_recording, write_recording
from tests.parallel.network.recorded import recorded


@pytest.mark.parametrize("name", ["hgx_h20_healthy", "no_gpu"])
def test_written_and_read_again(tmp_path, name):
    recording = recorded(name)
    write_recording(recording, tmp_path / "node")
    again = read_recording(tmp_path / "node")
    assert (again.texts, again.missing) == (recording.texts, recording.missing)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RecordingError, match="not empty"):
        write_recording(recorded("no_gpu"), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_no_recording(tmp_path):
    with pytest.raises(RecordingError, match="no such folder"):
        read_recording(tmp_path / "node")
    (tmp_path / "readme.txt").write_text("?")
    with pytest.raises(RecordingError, match="holds no file of a recording"):
        read_recording(tmp_path)


def test_another_format(tmp_path):
    write_recording(recorded("no_gpu"), tmp_path / "node")
    (tmp_path / "node" / "about.txt").write_text("format: 2\n")
    with pytest.raises(RecordingError, match="reads format 1"):
        read_recording(tmp_path / "node")


def test_bytes_that_are_no_text(tmp_path):
    write_recording(recorded("no_gpu"), tmp_path / "node")
    (tmp_path / "node" / "modules.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordingError, match="modules.txt: not a text file"):
        read_recording(tmp_path / "node")


def test_this_machine(monkeypatch):
    monkeypatch.setenv("NCCL_IB_HCA", "=mlx5_0")
    log = "a:1:2 [0] NCCL INFO Using network IB\n"
    recording = collect(log)
    assert recording.texts.keys() | recording.missing.keys() == set(FILES)
    assert not recording.texts.keys() & recording.missing.keys()
    assert "NCCL_IB_HCA==mlx5_0\n" in recording.texts["variables.txt"]
    assert "Max locked memory" in recording.texts["limits.txt"]
    assert recording.texts["nccl.log"] == log


def test_an_all_reduce_without_gpus(tmp_path, monkeypatch):
    """Two GPUs by a false nvidia-smi, none for JAX: the reason is kept, and no log is made up."""
    false = tmp_path / "nvidia-smi"
    false.write_text("#!/bin/sh\nprintf '0, NVIDIA H20, 00000000:0F:00.0\\n1, NVIDIA H20, 00000000:34:00.0\\n'\n")
    false.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    recording = collect()
    assert recording.texts["nvidia-smi-gpus.txt"].count("H20") == 2
    assert "jax sees no GPU" in recording.missing["nccl.log"]


def test_the_all_reduce_itself(monkeypatch):
    monkeypatch.setattr(all_reduce.jax, "default_backend", lambda: "gpu")
    assert all_reduce.main() == 0
