"""How far 8-bit products are from float32's: python -m moe.ops.scaled"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moe.ops.scaled.einsum import scaled_einsum
from moe.ops.scaled.history import new_history
from moe.ops.scaled.recipe import Recipe

B, D, F = 1024, 1024, 512
DATA = {"normal": (0, 1.0), "outlier channels": (8, 30.0), "outlier rows": (8, 30.0)}
"""How many of D channels, or of B rows, of x are how many times as large as the others; of dy likewise."""


def main() -> None:
    names = list(DATA)
    print("error of y, dx, dw: ‖8 bits - float32‖ / ‖float32‖, in %\n")
    print(" " * 15 + "".join(f"{name:>24}" for name in names))
    for format in ("fp8", "int8"):
        for scaling in ("tensor", "delayed", "row", "block"):
            recipe = Recipe(format, scaling)
            errors = [" ".join(f"{100 * error:6.2f}" for error in errors_of(recipe, name)) for name in names]
            print(f"{format:5}{scaling:10}" + "".join(f"{error:>24}" for error in errors))


def errors_of(recipe: Recipe, data: str) -> list[float]:
    """Of y, dx and dw; with "delayed" in the second step, when the magnitudes are known."""
    x_BD, w_DF, dy_BF = arrays(data)
    history = new_history() if recipe.scaling == "delayed" else None
    run = jax.jit(partial(products, recipe))
    if history is not None:
        history = run(x_BD, w_DF, dy_BF, history)[3]
    actual = run(x_BD, w_DF, dy_BF, history)
    x, w, dy = (np.asarray(value, np.float64) for value in (x_BD, w_DF, dy_BF))
    exact = x @ w, dy @ w.T, x.T @ dy
    return [float(np.linalg.norm(a - e) / np.linalg.norm(e)) for a, e in zip(actual, exact, strict=False)]


def products(recipe: Recipe, x_BD: jax.Array, w_DF: jax.Array, dy_BF: jax.Array, history: jax.Array | None):
    """y, dx, dw and the next history."""
    y_BF, pull = jax.vjp(partial(scaled_einsum_of, recipe), x_BD, w_DF, history)
    return y_BF, *pull(dy_BF)


def scaled_einsum_of(recipe: Recipe, x_BD: jax.Array, w_DF: jax.Array, history: jax.Array | None) -> jax.Array:
    return scaled_einsum("BD,DF->BF", x_BD, w_DF, recipe, history)


def arrays(data: str) -> list[jax.Array]:
    """x, w and dy."""
    count, factor = DATA[data]
    r = np.random.default_rng(0)
    x_BD, w_DF, dy_BF = r.normal(size=(B, D)), r.normal(size=(D, F)) / 32, r.normal(size=(B, F)) * 1e-4
    if data == "outlier rows":
        x_BD[:count] *= factor
        dy_BF[:count] *= factor
    else:
        x_BD[:, :count] *= factor
        dy_BF[:, :count] *= factor
    return [jnp.asarray(value, jnp.float32) for value in (x_BD, w_DF, dy_BF)]


if __name__ == "__main__":
    main()
