"""What a backward pass makes again, where it would keep all else."""

from collections.abc import Callable
from typing import Any

import jax

MADE_AGAIN = "custom_jvp_call"
"""By which name a checkpoint's policy knows such an operation; softmax of jax.nn has it as well."""


def made_again(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function` of arrays as one operation, which moe/model/remat.py does not keep the result of.

    For what becomes of a weight on its way into products: cast, gathered, widened. All layers' would be kept, as large
    as they are in use.
    """
    operation = jax.custom_jvp(function)

    @operation.defjvp
    def with_tangents(primals: Any, tangents: Any) -> Any:
        return operation(*primals), jax.jvp(function, primals, tangents)[1]

    return operation
