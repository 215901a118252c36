"""What one process compiled another finds; what cannot be read or written costs a warning and no more."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax, jax.numpy as jnp
from parallel.program_cache import keep_programs
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
keep_programs()
jax.monitoring.register_event_listener(
    lambda name, **_: print("found") if name == "/jax/compilation_cache/cache_hits" else None)
print(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((4, 4)))[0, 0])
"""


@pytest.fixture
def run(tmp_path):
    def once(**environment):
        environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "true", "PYTHONPATH": os.getcwd(), **environment}
        return subprocess.run(
            [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )

    return once


def test_a_second_process_finds_the_program_and_gets_the_same_numbers(run, tmp_path):
    first, second = run(), run()
    assert "found" not in first.stdout
    assert list((tmp_path / ".cache/programs").iterdir())
    assert second.stdout.replace("found\n", "") == first.stdout != second.stdout


def test_a_program_compiled_with_other_flags_is_another(run):
    run()
    assert "found" not in run(JAX_DISABLE_MOST_OPTIMIZATIONS="0", XLA_FLAGS="--xla_cpu_enable_fast_math=true").stdout


def test_the_variables_of_jax_name_another_folder_and_keep_nothing(run, tmp_path):
    run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "other"))
    run(JAX_ENABLE_COMPILATION_CACHE="false")
    assert list((tmp_path / "other").iterdir())
    assert not (tmp_path / ".cache").exists()


def test_a_file_cut_short_is_told_of_and_compiled_anew(run, tmp_path):
    first = run()
    for file in (tmp_path / ".cache/programs").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    again = run()
    assert again.stdout == first.stdout
    assert "Error reading persistent compilation cache entry" in again.stderr


def test_a_folder_that_cannot_be_made_is_told_of_and_stops_nothing(run, tmp_path):
    first = run()
    (tmp_path / "file").touch()
    again = run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "file"))
    assert again.stdout == first.stdout
    assert "Error reading persistent compilation cache entry" in again.stderr
