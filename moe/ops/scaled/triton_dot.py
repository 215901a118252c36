"""A dot of two fp8 arrays inside Pallas kernels for Triton, which Pallas's own rule for dot_general does not give.

That rule refuses operands of two types, though tensor cores multiply float8_e4m3fn by float8_e5m2 as they are (PTX ISA,
wgmma.mma_async: .atype and .btype are independent) and tt.dot does so too. And it asks for sums that are exact in
float32, which Hopper's fp8 cores do not give: Triton then widens to float16, at half the speed. Here sums of up to 128
products are left to the tensor core, and added up in float32 outside (DeepSeek-V3, arXiv 2412.19437 §3.3.2).
"""

import jax
import jax.numpy as jnp
from jax._src.pallas.triton import lowering
from jax.experimental.pallas import triton as plgpu
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.triton import dialect

LONGEST = 128
"""Products that one dot may sum."""


def dot(a: jax.Array, b: jax.Array, *, trans_a: bool = False, trans_b: bool = False) -> jax.Array:
    """a · b of 8-bit matrices: f32, or i32 of int8."""
    if a.dtype == jnp.int8:
        return plgpu.dot(a, b, trans_a, trans_b)
    return _fp8_dot_p.bind(a, b, trans_a=trans_a, trans_b=trans_b)


_fp8_dot_p = Primitive("fp8_dot")


@_fp8_dot_p.def_abstract_eval
def _shape(a, b, *, trans_a: bool, trans_b: bool):
    return jax.core.ShapedArray((a.shape[trans_a], b.shape[1 - trans_b]), jnp.float32)


def _interpreted(a: jax.Array, b: jax.Array, *, trans_a: bool, trans_b: bool) -> jax.Array:
    return plgpu.dot(a.astype(jnp.float32), b.astype(jnp.float32), trans_a, trans_b)


mlir.register_lowering(_fp8_dot_p, mlir.lower_fun(_interpreted, multiple_results=False))


@lowering.register_lowering(_fp8_dot_p)
def _compiled(ctx, a, b, *, trans_a: bool, trans_b: bool):
    if trans_a:
        a = dialect.trans(a, (1, 0))
    if trans_b:
        b = dialect.trans(b, (1, 0))
    zeros = lowering._zeros(ir.RankedTensorType.get(ctx.avals_out[0].shape, ir.F32Type.get()))
    return dialect.dot(a, b, zeros, max_num_imprecise_acc=LONGEST)
