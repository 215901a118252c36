import io
import json
import os
import signal
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from rich.console import Console

from moe.model.config import ConfigError
from moe.train import loop
from moe.train.loop import DivergedError, TrainingConfig
from moe.train.metrics import read_metrics
from tests.moe.train.small_run import small_run

TIMED = ("tokens_per_second", "mfu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def undisturbed(folder):
    """The run folder and the final state of a run that nothing disturbs."""
    path = folder / "undisturbed"
    return path, small_run(path, folder).state


def untimed(path):
    return [{k: v for k, v in record.items() if k not in TIMED} for record in read_metrics(path / "metrics.jsonl")]


def about_last_checkpoint(path):
    return json.loads((path / "checkpoints/00000012/run.json").read_text())


def assert_same_end(path, folder, undisturbed):
    """Starting the finished run again restores its last state."""
    state = small_run(path, folder).state
    jax.tree.map(np.testing.assert_array_equal, state, undisturbed[1])
    assert untimed(path) == untimed(undisturbed[0])
    assert about_last_checkpoint(path) == about_last_checkpoint(undisturbed[0])


def test_a_run_learns_and_leaves_everything_behind(undisturbed):
    path = undisturbed[0]
    records = read_metrics(path / "metrics.jsonl")
    losses = [record["loss"] for record in records if "loss" in record]
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 13))
    assert [record["step"] for record in records if "validation_loss" in record] == [4, 8, 12]
    assert losses[-1] < losses[0] - 0.3
    layers = records[0]["layers"]
    assert np.asarray(layers["load"]).shape == (2, 4)
    np.testing.assert_allclose(np.sum(layers["load"], axis=1), 1, atol=1e-5)
    assert min(layers["wire_bytes"]) > 0
    assert {p.name for p in (path / "pictures").iterdir()} == {"loss.png", "expert_load.png"}
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["00000004", "00000008", "00000012"]
    assert list((path / "tensorboard").iterdir())
    assert json.loads((path / "summary.json").read_text())["sample"]


def test_a_finished_run_does_not_train_on(undisturbed, folder):
    before = (undisturbed[0] / "metrics.jsonl").read_bytes()
    small_run(undisturbed[0], folder)
    assert (undisturbed[0] / "metrics.jsonl").read_bytes() == before


def test_a_run_stopped_by_a_signal_ends_in_the_same_bits(undisturbed, folder, monkeypatch):
    path = folder / "stopped"
    steps = 0
    place = loop.place_batch

    def interrupt_in_step_6(batch, layout):
        nonlocal steps
        steps += 1
        if steps == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return place(batch, layout)

    # Without evaluations in between, batches are placed by steps only.
    monkeypatch.setattr(loop, "place_batch", interrupt_in_step_6)
    outcome = small_run(path, folder, "training.evaluate_every=100", "training.checkpoint_every=100")
    assert (outcome.finished, outcome.step, outcome.signal) == (False, 6, signal.SIGTERM)
    monkeypatch.undo()
    state = small_run(path, folder, "training.evaluate_every=100", "training.checkpoint_every=100").state
    jax.tree.map(np.testing.assert_array_equal, state, undisturbed[1])
    steps_of = [record for record in untimed(undisturbed[0]) if "loss" in record]
    assert [record for record in untimed(path) if "loss" in record] == steps_of


def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_used(undisturbed, folder):
    path = folder / "damaged"
    small_run(path, folder)
    file = next(file for file in (path / "checkpoints/00000012/state").rglob("*") if file.stat().st_size > 1000)
    file.write_bytes(file.read_bytes()[:-7])
    told = io.StringIO()
    small_run(path, folder, console=Console(file=told, width=400))
    assert f"00000012 is damaged (state/{file.relative_to(path / 'checkpoints/00000012/state')} has changed" in (
        told.getvalue()
    )
    assert "resuming from the checkpoint of step 8" in told.getvalue()
    assert_same_end(path, folder, undisturbed)


@pytest.mark.slow
def test_steps_that_are_not_finite_stop_the_run(folder, monkeypatch):
    path = folder / "diverged"
    small_run(path, folder, "training.steps=12")
    # From the checkpoint of step 8 on, one step sees a loss that is no number.
    (path / "checkpoints/00000012/manifest.json").write_bytes(b"")
    make = loop.make_train_step

    def poisoned(*args, **kwargs):
        step = make(*args, **kwargs)

        def with_nan(state, batch):
            new, metrics = step(state, batch)
            return new, metrics._replace(loss=jax.numpy.where(state.step == 9, jax.numpy.nan, metrics.loss))

        return jax.jit(with_nan, donate_argnums=0)

    monkeypatch.setattr(loop, "make_train_step", poisoned)
    with pytest.raises(DivergedError) as caught:
        small_run(path, folder)
    message = str(caught.value)
    assert message.startswith("step 10: loss nan")
    assert "the last good checkpoint is" in message
    assert "00000008" in message
    assert "all tensors of the step were finite when it was repeated" in message
    assert "layer 1: largest load" in message
    assert not (path / "checkpoints/00000012").exists()


KILLS = [
    ("loop.place_batch", 3),
    ("checkpoint._digest", 2),
    ("checkpoint.write_atomically", 3),
    ("loop.record_of", 3),
    ("loop.place_batch", 6),
]
"""Before which call of which function each start kills itself: in a step before any checkpoint, in the midst of the
first save, in that of the second, between a step and its record, and in a step or an evaluation later on."""


@pytest.mark.slow
def test_killed_again_and_again_a_run_ends_in_the_same_bits(undisturbed, folder):
    path = folder / "killed"
    for place, call in KILLS:
        module, function = place.split(".")
        code = f"""
        import os
        from pathlib import Path
        from moe.train import {module}
        from tests.moe.train.small_run import small_run
        inner, calls = {place}, 0
        def deadly(*args, **kwargs):
            global calls
            calls += 1
            if calls == {call}:
                os.kill(os.getpid(), 9)
            return inner(*args, **kwargs)
        {module}.{function} = deadly
        small_run(Path({str(path)!r}), Path({str(folder)!r}))
        """
        killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert_same_end(path, folder, undisturbed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "training.steps=0: give a whole number of at least 1"),
        ({"checkpoint_every": 0}, "training.checkpoint_every=0"),
        ({"seed": -1}, "training.seed=-1: give a whole number from 0"),
        ({"peak_tflops": 0.0}, "training.peak_tflops=0.0: give TFLOP/s above 0"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**changes)
