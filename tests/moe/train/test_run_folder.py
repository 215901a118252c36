import json
import subprocess
import sys
import textwrap

import pytest

from moe.train.run_folder import RunFolder, RunFolderError, write_atomically

CONFIG = {"name": "a", "model": {"d_model": 8}}


def opened(path, frozen=CONFIG, fingerprint="f1"):
    return RunFolder.open(path, frozen=frozen, fingerprint=fingerprint)


def test_freezes_the_configuration_and_notes_each_start(tmp_path):
    for _ in range(2):
        with opened(tmp_path / "run") as folder:
            assert json.loads((folder.path / "config.json").read_text())["config"] == CONFIG
    starts = json.loads((tmp_path / "run/environment.json").read_text())
    assert len(starts) == 2
    assert {"jax", "flax", "optax"} <= set(starts[0]["packages"])
    assert starts[0]["devices"] == ["cpu"] * 8
    assert "git" in starts[0]


def test_another_configuration_is_refused_with_what_differs(tmp_path):
    opened(tmp_path / "run").__exit__()
    before = (tmp_path / "run/config.json").read_bytes()
    with pytest.raises(RunFolderError, match="model.d_model: 8 there, 16 now.; give another --run-dir"):
        opened(tmp_path / "run", {"name": "a", "model": {"d_model": 16}}, "f2")
    assert (tmp_path / "run/config.json").read_bytes() == before


def test_settings_that_may_change_do_and_the_run_remembers_who_it_was(tmp_path):
    def on_mesh(data, fingerprint, **changes):
        frozen = {"name": "a", "mesh": {"data": data}} | changes
        return RunFolder.open(
            tmp_path / "run", frozen=frozen, fingerprint=fingerprint, may_change=("mesh.data",) if may_change else ()
        )

    may_change = False
    on_mesh(1, "f1").__exit__()
    with pytest.raises(RunFolderError, match="mesh.data: 1 there, 2 now.*, or --remesh to go on with it on this mesh"):
        on_mesh(2, "f2")
    may_change = True
    with pytest.raises(RunFolderError, match="mesh.data: 1 there, 2 now, name: a there, b now.; give another"):
        on_mesh(2, "f2", name="b")
    for data, fingerprint, earlier in [(2, "f2", ["f1"]), (4, "f3", ["f2", "f1"]), (1, "f1", ["f3", "f2"])]:
        with on_mesh(data, fingerprint) as folder:
            assert folder.earlier == earlier
    may_change = False
    with on_mesh(1, "f1") as folder:
        assert folder.earlier == ["f3", "f2"]


def test_logs_of_the_launcher_make_no_foreign_folder(tmp_path):
    (tmp_path / "run/logs").mkdir(parents=True)
    opened(tmp_path / "run").__exit__()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunFolderError, match="holds files of something else than a run"):
        opened(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_config_is_refused(tmp_path):
    opened(tmp_path / "run").__exit__()
    (tmp_path / "run/config.json").write_text("{")
    with pytest.raises(RunFolderError, match="config.json: cannot be read"):
        opened(tmp_path / "run")


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written .Not a directory."):
        opened(tmp_path / "file" / "run")


def test_a_live_process_keeps_the_folder_and_a_killed_one_frees_it(tmp_path):
    code = f"""
    import time
    from moe.train.run_folder import RunFolder
    folder = RunFolder.open({str(tmp_path / "run")!r}, frozen={CONFIG!r}, fingerprint="f1")
    print("open", flush=True)
    time.sleep(60)
    """
    owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "open\n"
    with pytest.raises(RunFolderError, match=f"in use by process {owner.pid} on .* give another --run-dir"):
        opened(tmp_path / "run")
    owner.kill()
    owner.wait()
    with opened(tmp_path / "run"):
        pass


def test_other_processes_neither_lock_nor_write(tmp_path):
    RunFolder.open(tmp_path / "run", frozen=CONFIG, fingerprint="f1", process_index=1)
    assert not (tmp_path / "run").exists()


def test_write_atomically_replaces(tmp_path):
    for text in ("one", "two"):
        write_atomically(tmp_path / "file", text)
    assert (tmp_path / "file").read_text() == "two"
    assert len(list(tmp_path.iterdir())) == 1
