"""Every test sees eight virtual CPU devices; meshes of fewer take the first ones."""

import os

# LLVM's expensive passes took nearly half of the tests' time. Processes that tests start do without them as well.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
