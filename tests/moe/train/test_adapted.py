"""Every way that a run's adapters have into a model, all of which give the same weights. The run's folder is written
without training."""

from typing import get_args

import jax
import numpy as np
import pytest

from moe.model.adapter import LoraConfig, Target
from moe.model.config import ConfigError
from moe.model.hf.__main__ import main
from moe.model.merge import merged
from moe.ops.quantize import QuantizedWeight
from moe.train.base import check_base
from moe.train.checkpoint import CheckpointStore
from moe.train.pretrained import open_pretrained
from moe.train.run_folder import RunFolder
from parallel.layout import SINGLE_DEVICE
from tests.moe.train.small_run import small_experiment


def write_run(experiment, path, seed, frozen=None):
    """A run's folder with a checkpoint of drawn numbers; returns its state."""
    blueprint, r = experiment.blueprint(), np.random.default_rng(seed)
    state = jax.tree.map(
        lambda x: jax.device_put(r.normal(0, 0.2, x.shape).astype(x.dtype)), blueprint.abstract_state()
    )
    state = state if frozen is None else state._replace(frozen=frozen)
    fingerprint = experiment.fingerprint()
    with RunFolder.open(path, frozen=experiment.frozen(), fingerprint=fingerprint) as folder:
        store = CheckpointStore(folder.checkpoints, fingerprint=fingerprint, keep=1)
        store.save(1, state, {})
        store.close()
        if experiment.lora is not None:
            check_base(folder.base, blueprint, state.frozen, begins=True)
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapted")


@pytest.fixture(scope="module")
def experiment(folder):
    return small_experiment(folder / "corpus").vary({"mesh.expert": 1})


@pytest.fixture(scope="module")
def expected(folder, experiment):
    base = write_run(experiment, folder / "base", 0).params
    lora = LoraConfig(rank=4, targets=get_args(Target))
    adapted = experiment.vary({"lora": lora, "init_from": str(folder / "base")})
    return merged(write_run(adapted, folder / "run", 1, base).params, base, lora)


def loaded(path, adapters=None, format=None):
    return open_pretrained(path, adapters).load(SINGLE_DEVICE, None, format)[0]


def test_all_ways_give_the_same_weights(folder, expected):
    assert main(["export-adapters", str(folder / "run"), str(folder / "peft")]) == 0
    assert main(["export", str(folder / "run"), str(folder / "exported")]) == 0
    assert main(["export", str(folder / "base"), str(folder / "plain")]) == 0
    peft = str(folder / "peft")
    assert main(["import", str(folder / "plain"), str(folder / "model"), "--adapters", peft]) == 0
    served = loaded(folder / "run")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), served, expected)
    for found in (
        loaded(folder / "base", folder / "run"),
        loaded(folder / "plain", folder / "peft"),
        loaded(folder / "exported"),
        loaded(folder / "model"),
    ):
        jax.tree.map(np.testing.assert_array_equal, found, served)
    quantized = loaded(folder / "run", format="int8")["stacks"][0]["blocks"][0]["feed_forward"]["experts"]
    assert all(isinstance(weight, QuantizedWeight) for weight in quantized.values())


def test_what_has_no_adapters_or_another_base_is_refused(folder, experiment, expected):
    with pytest.raises(ConfigError, match="base: trained all weights, and no adapters"):
        loaded(folder / "run", folder / "base")
    (folder / "base").rename(folder / "first")
    write_run(experiment, folder / "base", 5)
    with pytest.raises(ConfigError, match="embedding_VD differs: these weights are not those that .*run was trained"):
        loaded(folder / "run")
