"""A step on the GPU, with its own kernels, gives the loss and the gradients of the one on CPU, in every mode."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from experiments.quality import MODES, experiment
from tests import gpu

pytestmark = pytest.mark.skipif(not gpu.HERE, reason="needs a GPU: make test-gpu")

ALONE = [name for name, changes in MODES.items() if experiment.vary(changes).mesh.num_devices == 1]


def losses(mode, platform):
    environment = os.environ | {
        "JAX_PLATFORMS": platform,
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    command = [sys.executable, "-m", "tests.gpu.steps", mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.array(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("mode", ALONE)
def test_loss_and_gradients(mode):
    on_cpu, on_gpu = losses(mode, "cpu"), losses(mode, "cuda")
    # Rounded differently, routers decide differently for some tokens.
    loss, gradients = (1e-5, 1e-3) if mode == "float32" else (1e-3, 0.05)
    np.testing.assert_allclose(on_gpu[:, 0], on_cpu[:, 0], rtol=loss)
    np.testing.assert_allclose(on_gpu[:, 1], on_cpu[:, 1], rtol=gradients)
