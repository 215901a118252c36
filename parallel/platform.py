"""The platform of the devices that compute: the one at hand, or one that is only compiled for."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax

SHARED_MEMORY = {"7.0": 98_304, "8.0": 166_912, "8.9": 101_376, "9.0": 232_448, "10.0": 232_448}
"""By compute capability, bytes that one block of threads may take of a multiprocessor's shared memory (CUDA C++
Programming Guide, table of technical specifications)."""


class _Target(NamedTuple):
    platform: str
    capability: str


_described: ContextVar[_Target | None] = ContextVar("described_target", default=None)


def platform() -> str:
    """ "cpu" or "gpu": what backends named "auto" are chosen for."""
    target = _described.get()
    return target.platform if target else jax.default_backend()


@cache
def multiplies_bfloat16() -> bool:
    """Whether this machine's processor has products of bfloat16 (AVX512-BF16, AMX, Arm's BF16); taken for granted where
    Linux does not tell."""
    told = Path("/proc/cpuinfo")
    if not told.exists():
        return True
    lines = [line.partition(":") for line in told.read_text().splitlines()]
    flags = {flag for name, _, value in lines if name.strip() in ("flags", "Features") for flag in value.split()}
    return not flags.isdisjoint(("avx512_bf16", "amx_bf16", "bf16"))


def shared_memory() -> int:
    """Bytes that one block of a kernel's threads may have of the GPU's shared memory. Of a GPU that is not known as
    much as every one has from Ampere on."""
    target = _described.get()
    capability = target.capability if target else getattr(jax.devices()[0], "compute_capability", "")
    return shared_memory_of(capability)


def shared_memory_of(capability: str) -> int:
    """The same by compute capability."""
    return SHARED_MEMORY.get(capability, SHARED_MEMORY["8.9"])


@contextmanager
def compiling_for(name: str, capability: str = "") -> Iterator[None]:
    """What is traced inside is for devices of platform `name`, which need not be here.

    Args:
        capability: of GPUs, CUDA's compute capability, such as "9.0".
    """
    token = _described.set(_Target(name, capability))
    try:
        yield
    finally:
        _described.reset(token)
