"""Every test sees eight virtual CPU devices; meshes of fewer take the first ones. `make test-gpu` puts a GPU before
them."""

import os

# LLVM's expensive passes took nearly half of the tests' time. Processes that tests start do without them as well.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# A test reads what it has compiled itself, or sets a folder of its own (tests/parallel/test_program_cache.py).
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

import jax

if jax.__version_info__ < (0, 11):
    # Writing each fusion by MLIR took a quarter of what was left. Later versions have no such flag.
    os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}"

from tests.gpu import PLATFORMS

jax.config.update("jax_platforms", os.environ.get(PLATFORMS, "cpu"))
jax.config.update("jax_num_cpu_devices", 8)
if PLATFORMS in os.environ:
    # Otherwise products of float32 are taken of rounded operands there.
    jax.config.update("jax_default_matmul_precision", "highest")
