"""The platform of the devices that compute: the one at hand, or one that is only compiled for."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

_described: ContextVar[str | None] = ContextVar("described_platform", default=None)


def platform() -> str:
    """ "cpu" or "gpu": what backends named "auto" are chosen for."""
    return _described.get() or jax.default_backend()


@contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """What is traced inside is for devices of platform `name`, which need not be here."""
    token = _described.set(name)
    try:
        yield
    finally:
        _described.reset(token)
