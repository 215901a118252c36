"""What tells the frozen base of a run from any other: of each piece of a parameter the sum of its bits, weighed by
where they stand. The same on every mesh, for whole numbers may be added in any order. Not a cryptographic digest: it
finds what was trained on, merged or exchanged, not what was forged.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.model.config import ConfigError
from moe.model.parameter import ParameterSpec, is_spec
from moe.model.pieces import Piece, Source, leading_axes
from moe.train.checkpoint import named
from moe.train.run_folder import write_atomically
from moe.train.state import Blueprint

BLOCK = 1 << 22
"""Numbers that are summed at once on the host."""


def check_base(file: Path, blueprint: Blueprint, frozen: dict[str, Any], *, begins: bool) -> None:
    """Writes down the sums of the base with which a run begins, or compares those of the base with which it goes on.

    Raises:
        ConfigError: it goes on with another base.
    """
    found = base_sums(blueprint, frozen)
    if begins:
        if jax.process_index() == 0:
            write_atomically(file, json.dumps(found))
        return
    for name, sums in read_sums(file).items():
        _compare(
            name, found.get(name), sums, f"init_from, or the seed, gives another base than {file.parent} began with"
        )


def base_sums(blueprint: Blueprint, frozen: dict[str, Any]) -> dict[str, Any]:
    """Of every array of a frozen base, by name: a number, or nested lists of them by layer and expert."""

    @partial(jax.jit, out_shardings=blueprint.layout.whole())
    def sums(frozen: dict[str, Any]) -> dict[str, Any]:
        def of(spec: ParameterSpec, weight: Any) -> Any:
            return jax.tree.map(lambda x: _sums(x, leading_axes(spec)), weight)

        return jax.tree.map(of, blueprint.frozen_specs, frozen, is_leaf=is_spec)

    return {name: np.asarray(x).tolist() for name, x in named(sums(frozen)).items()}


def read_sums(file: Path) -> dict[str, Any]:
    """
    Raises:
        ConfigError: the file is missing or damaged.
    """
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file}: cannot be read ({error}), so that nothing tells whether the run's base is the one its adapters "
            "were trained for; restore the file, or start another --run-dir"
        ) from error


class CheckedSource:
    """The base of a run's adapters, compared piece by piece as it is read with what the run began with; a
    `moe.model.pieces.Source`. What the run had quantized is not compared."""

    def __init__(self, base: Source, file: Path, dtype: jnp.dtype) -> None:
        """
        Args:
            file: as `check_base` wrote it. dtype: in which the run had what it did not quantize.
        """
        self.base, self.file, self._dtype = base, file, dtype
        self._sums = read_sums(file)

    def dtype(self, piece: Piece) -> np.dtype:
        return self.base.dtype(piece)

    def read(self, piece: Piece) -> np.ndarray:
        values = self.base.read(piece)
        expected = self._sums.get(piece.name)
        if expected is not None:
            for place in piece.index:
                expected = expected[place]
            where = ".".join(map(str, (piece.name, *piece.index)))
            found = sum_on_host(values.astype(self._dtype))
            _compare(where, found, expected, f"these weights are not those that {self.file.parent} was trained for")
        return values


def sum_on_host(values: np.ndarray) -> int:
    """Of one piece."""
    bits = np.ascontiguousarray(values).reshape(-1).view(f"u{values.dtype.itemsize}")
    total = 0
    for first in range(0, len(bits), BLOCK):
        block = bits[first : first + BLOCK].astype(np.uint32)
        weights = 2 * np.arange(first, first + len(block)).astype(np.uint32) + np.uint32(1)
        total += int((block * weights).sum(dtype=np.uint32))
    return total % 2**32


def _sums(x: jax.Array, leading: int) -> jax.Array:
    """Σ bits · (2 i + 1) modulo 2^32, over all but the leading axes, where i counts along these others."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis in range(leading, x.ndim):
        place = place * jnp.uint32(x.shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return (bits * (2 * place + 1)).sum(range(leading, x.ndim), dtype=jnp.uint32)


def _compare(name: str, found: Any, expected: Any, what: str) -> None:
    if found != expected:
        raise ConfigError(f"{name} differs: {what}; put the weights back as they were, or start another --run-dir")
