"""Compiled programs that outlive their process: a run that goes on, or a server that starts again, finds the program
that an earlier one compiled (JAX's persistent compilation cache) and begins at once.

A program is found by all that it was compiled from: its operations, the devices, the versions and flags. What cannot
be read, or written, is told of in a warning, and compiled. Nothing is ever taken out; the folder may be deleted at any
time, as `make clean` does.
"""

from pathlib import Path

import jax

FOLDER = Path(".cache/programs")


def keep_programs() -> None:
    """From here on, keeps in `FOLDER` each program that takes a second or more to compile.

    JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=false keeps none. For a command that is
    one process. Several share out what compiling for GPUs measures, so all must find a program or none: they keep
    programs only where the variable names a folder that all of them see.
    """
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(FOLDER.absolute()))
