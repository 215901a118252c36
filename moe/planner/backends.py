"""Which backends of the ops a chip can use: what "auto" stands for when its program is compiled or estimated."""

from dataclasses import replace

from moe.model.execution import Execution
from moe.planner.chips import Chip

AMPERE = (8, 0)


def backends(chip: Chip, execution: Execution) -> Execution:
    """`execution` as it is from Ampere on, where "auto" comes to cuDNN's flash attention (its support matrix begins
    there) and our Triton kernels (XLA compiles Triton "only for Ampere GPUs and up"). Before it every "auto" is
    replaced: by attention in chunks, and by jax.lax.ragged_dot, which XLA lowers to a product over all experts of the
    device, so with one expert a device nothing is lost.
    """
    if chip.capability >= AMPERE:
        return execution
    attention = "chunked" if execution.attention == "auto" else execution.attention
    product = "ragged" if execution.grouped_matmul == "auto" else execution.grouped_matmul
    return replace(execution, attention=attention, grouped_matmul=product)
