"""Every test sees eight virtual CPU devices; meshes of fewer take the first ones."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
