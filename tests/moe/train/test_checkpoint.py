import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe.train.checkpoint import CheckpointError, CheckpointStore
from moe.train.state import TrainState
from parallel.layout import SINGLE_DEVICE, Layout, LayoutConfig
from parallel.mesh import MeshConfig, make_mesh

ON_MESH = Layout(make_mesh(MeshConfig(data=2, expert=4)))


def state_of(value: float, layout=ON_MESH) -> TrainState:
    """Three formats, an optimizer's states, and an empty subtree."""
    w_DF = jnp.arange(16 * 4, dtype=jnp.float32).reshape(16, 4) + value
    if layout.mesh is not None:
        w_DF = jax.device_put(w_DF, layout.stored("DF", w_DF.shape))
    params = {"w_DF": w_DF, "stacks": {0: {"scale_D": jnp.full(16, value, jnp.bfloat16)}}}
    return TrainState(jnp.int32(value), params, {}, optax.adam(1e-3).init(params), {}, {})


def abstract(layout=ON_MESH):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_of(0, layout))


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path, fingerprint="f1", keep=2)
    yield store
    store.close()


def filled(store, *steps):
    for step in steps:
        store.save(step, state_of(step), {"next_index": step})
    store.wait()
    return store


def damage(store, step):
    file = next(f for f in store.path(step).rglob("*") if f.is_file() and f.name not in ("manifest.json", "run.json"))
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    return file


@pytest.mark.parametrize(
    "layout", [ON_MESH, SINGLE_DEVICE, Layout(make_mesh(MeshConfig(data=8)))], ids=["same", "one", "other"]
)
def test_comes_back_bit_by_bit_onto_any_mesh(store, layout):
    filled(store, 3)
    restored = store.restore_latest(abstract(layout), print)
    jax.tree.map(np.testing.assert_array_equal, restored.state, state_of(3))
    assert restored.state.params["stacks"][0]["scale_D"].dtype == jnp.bfloat16
    assert restored.state.params["w_DF"].sharding == state_of(0, layout).params["w_DF"].sharding
    assert (restored.step, restored.data) == (3, {"next_index": 3})


def test_comes_back_where_the_devices_that_wrote_it_are_missing(store, tmp_path):
    filled(store, 3)
    code = f"""
    import jax, jax.numpy as jnp, numpy as np, optax
    from pathlib import Path
    from moe.train.checkpoint import CheckpointStore
    from moe.train.state import TrainState
    params = {{"w_DF": jnp.zeros((16, 4)), "stacks": {{0: {{"scale_D": jnp.zeros(16, jnp.bfloat16)}}}}}}
    state = TrainState(jnp.int32(0), params, {{}}, optax.adam(1e-3).init(params), {{}}, {{}})
    store = CheckpointStore(Path({str(tmp_path)!r}), fingerprint="f1", keep=2)
    restored = store.restore_latest(jax.eval_shape(lambda: state), print).state
    print(jax.device_count(), restored.step, float(restored.params["w_DF"].sum()))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.split() == ["1", "3", str(float(sum(range(64)) + 3 * 64))], done.stderr


def test_nothing_saved_is_nothing_restored(store):
    assert store.restore_latest(abstract(), print) is None


def test_keeps_the_newest(store):
    assert filled(store, 1, 2, 3).steps() == [2, 3]


def test_saved_arrays_may_be_donated_at_once(store):
    state = state_of(5)
    double = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s), donate_argnums=0)
    store.save(5, state, {})
    double(state)
    store.wait()
    jax.tree.map(np.testing.assert_array_equal, store.restore_latest(abstract(), print).state, state_of(5))


def test_states_that_wait_on_the_host_come_back_there(store):
    layout = Layout(ON_MESH.mesh, LayoutConfig(optimizer_states="host"))

    def placed(value):
        on_host = layout.optimizer_state("DF", (16, 4))
        return state_of(value)._replace(
            opt_state={"mu": jax.device_put(jnp.full((16, 4), value, jnp.float32), on_host)}
        )

    state = placed(7)
    where = {"mu": state.opt_state["mu"].sharding}

    def double(opt_state):
        return jax.tree.map(lambda x: 2 * x, jax.device_put(opt_state, jax.memory.Space.Device))

    store.save(7, state, {})
    jax.jit(double, donate_argnums=0, out_shardings=where)(state.opt_state)
    store.wait()
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed(0))
    restored = store.restore_latest(wanted, print).state
    jax.tree.map(np.testing.assert_array_equal, restored, placed(7))
    assert restored.opt_state["mu"].sharding.memory_kind == "pinned_host"


@pytest.mark.parametrize("how", ["flip", "cut", "remove", "manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(store, how):
    filled(store, 1, 2)
    file = damage(store, 2)
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    if how == "remove":
        file.unlink()
    if how == "manifest":
        (store.path(2) / "manifest.json").unlink()
    told = []
    assert store.restore_latest(abstract(), told.append).step == 1
    assert len(told) == 1
    assert "00000002 is damaged" in told[0]
    assert ("manifest.json" if how == "manifest" else file.name) in told[0]
    # The step is saved again when the run comes by.
    assert filled(store, 2).restore_latest(abstract(), print).step == 2


def test_all_damaged_is_an_error(store):
    filled(store, 1, 2)
    damage(store, 1)
    damage(store, 2)
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints is whole; start anew"):
        store.restore_latest(abstract(), lambda line: None)


def test_a_checkpoint_of_another_configuration_is_refused(store, tmp_path):
    filled(store, 1)
    other = CheckpointStore(tmp_path, fingerprint="f2", keep=2)
    with pytest.raises(CheckpointError, match="belongs to a run of another configuration"):
        other.restore_latest(abstract(), print)
    assert other.steps() == [1]
    other.close()


def test_a_checkpoint_from_before_the_run_changed_its_mesh_is_taken(store, tmp_path):
    filled(store, 1)
    later = CheckpointStore(tmp_path, fingerprint="f2", keep=2, earlier=["f0", "f1"])
    assert later.restore_latest(abstract(), print).step == 1
    later.close()


def test_a_full_disk_is_said_and_the_earlier_checkpoint_stays(store, monkeypatch):
    filled(store, 1)

    def full(path, text):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("moe.train.checkpoint.write_atomically", full)
    store.save(2, state_of(2), {})
    with pytest.raises(CheckpointError, match="No space left on device.; the one of step 1 is intact"):
        store.wait()
    monkeypatch.undo()
    assert store.restore_latest(abstract(), print).step == 1
    assert filled(store, 3).steps() == [1, 3]


def test_files_limited_in_size_by_the_system(tmp_path):
    """A real failure inside the arrays' own writing, in a process of its own."""
    code = f"""
    import resource, signal, jax, jax.numpy as jnp
    from pathlib import Path
    from moe.train.checkpoint import CheckpointError, CheckpointStore
    from moe.train.state import TrainState
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = CheckpointStore(Path({str(tmp_path)!r}), fingerprint="f1", keep=2)
    store.save(1, TrainState(jnp.int32(1), {{"w": jnp.zeros(8)}}, {{}}, (), {{}}, {{}}), {{}})
    store.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    big = jax.random.normal(jax.random.key(0), (1_000_000,))
    try:
        store.save(2, TrainState(jnp.int32(2), {{"w": big}}, {{}}, (), {{}}, {{}}), {{}})
        store.wait()
    except CheckpointError as error:
        print("ERROR", error)
    print("STEPS", store.steps())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert "could not be written" in done.stdout, done.stderr
    assert "the one of step 1 is intact" in done.stdout
    assert "STEPS [1]" in done.stdout


def test_killed_while_saving_leaves_the_earlier_one(store, tmp_path):
    filled(store, 1)
    code = f"""
    import os, jax.numpy as jnp
    from pathlib import Path
    from moe.train import checkpoint
    from moe.train.state import TrainState
    checkpoint._digest = lambda file: os.kill(os.getpid(), 9)
    store = checkpoint.CheckpointStore(Path({str(tmp_path)!r}), fingerprint="f1", keep=2)
    store.save(2, TrainState(jnp.int32(2), {{"w": jnp.zeros(8)}}, {{}}, (), {{}}, {{}}), {{}})
    store.wait()
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False).returncode == -9
    assert (tmp_path / "00000002.saving").exists()
    again = CheckpointStore(tmp_path, fingerprint="f1", keep=2)
    assert again.steps() == [1]
    assert not (tmp_path / "00000002.saving").exists()
    again.close()
