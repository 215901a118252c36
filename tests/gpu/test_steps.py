"""A step on the GPU, with its own kernels, gives the loss and the gradients of the one on CPU, in every mode."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from experiments.quality import MODES
from tests import gpu

pytestmark = pytest.mark.skipif(not gpu.HERE, reason="needs a GPU: make test-gpu")

ALONE = [name for name, changes in MODES.items() if not changes.keys() & {"mesh.expert", "mesh.data"}]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    processes = {}
    for platform in ("cpu", "cuda"):
        environment = os.environ | {"JAX_PLATFORMS": platform, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
        command = [sys.executable, "-m", "tests.gpu.steps", str(folder / platform)]
        processes[platform] = subprocess.Popen(command, env=environment)
    assert [process.wait() for process in processes.values()] == [0, 0]
    return {platform: json.loads((folder / platform).read_text("utf-8")) for platform in processes}


@pytest.mark.parametrize("mode", ALONE)
def test_loss_and_gradients(found, mode):
    on_cpu, on_gpu = (np.array(found[platform][mode]) for platform in ("cpu", "cuda"))
    tolerance = 1e-4 if mode == "float32" else 0.02
    np.testing.assert_allclose(on_gpu[0], on_cpu[0], rtol=tolerance)
    np.testing.assert_allclose(on_gpu[:, 0], on_cpu[:, 0], rtol=tolerance)
