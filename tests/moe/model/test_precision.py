import jax.numpy as jnp
import numpy as np
import pytest

from moe.model.config import ConfigError
from moe.model.precision import Precision
from moe.model.products import product
from moe.ops.grouped_matmul import grouped_matmul

LONG = 4096
"""Terms of 1: a sum in bfloat16 would stop at 256."""


def test_products_of_bfloat16_are_summed_in_float32():
    x_BTD, w_DF = jnp.ones((1, 2, LONG), jnp.bfloat16), jnp.ones((LONG, 3), jnp.bfloat16)
    np.testing.assert_array_equal(product("BTD,DF->BTF", x_BTD, w_DF, None, None).astype(jnp.float32), LONG)


@pytest.mark.parametrize("backend", ["blocked", "ragged"])
def test_grouped_products_of_bfloat16_are_summed_in_float32(backend):
    x_RD, w_EDF = jnp.ones((4, LONG), jnp.bfloat16), jnp.ones((2, LONG, 3), jnp.bfloat16)
    y_RF = grouped_matmul(x_RD, w_EDF, jnp.array([1, 3]), backend=backend)
    np.testing.assert_array_equal(y_RF.astype(jnp.float32), LONG)


@pytest.mark.parametrize("field", ["parameters", "compute", "router", "softmax", "gradients"])
def test_a_format_that_is_none_is_refused_by_name(field):
    with pytest.raises(ConfigError, match=f"precision.{field}='float16': give 'float32' or 'bfloat16'"):
        Precision(**{field: "float16"})
