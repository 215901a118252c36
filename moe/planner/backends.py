"""Which backends of the ops a chip can use: what "auto" stands for when its program is compiled or estimated."""

from dataclasses import replace

from moe.model.execution import Execution
from moe.planner.chips import Chip

AMPERE = (8, 0)


def backends(chip: Chip, execution: Execution) -> Execution:
    """`execution` with every "auto" replaced for `chip`.

    From Ampere on: cuDNN's flash attention (its support matrix begins there) and our Triton kernels (XLA compiles
    Triton "only for Ampere GPUs and up"). Before it: attention in chunks, and jax.lax.ragged_dot, which XLA lowers to a
    product over all experts of the device, so with one expert a device nothing is lost.
    """
    modern = chip.capability >= AMPERE
    attention = execution.attention if execution.attention != "auto" else "cudnn" if modern else "chunked"
    product = execution.grouped_matmul if execution.grouped_matmul != "auto" else "triton" if modern else "ragged"
    return replace(execution, attention=attention, grouped_matmul=product)
