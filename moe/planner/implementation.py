"""How a framework computes what the settings leave open. Estimates need it: for our own programs it is what XLA makes
of them, and for published figures what the code that was measured does."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Implementation:
    """
    hides_gathers: whether a layer's weights are gathered while the layer before computes.
    gathers_stored: whether the backward pass gathers weights in the stored format instead of the compute format.
    sums: the collective that sums a weight's gradient where its parts are kept by several devices.
    sums_once: whether gradients are summed once a step instead of once a microbatch.
    stages_recompute: whether a pipeline's backward pass begins with the stage's forward pass.
    full_buffers: whether the kernels between exchange and experts work on buffers for the most rows that could come.
    passes: memory traffic of the kernels that only move numbers, in units of ours, which XLA fuses.
    kernels: kernels launched, in units of ours.
    """

    hides_gathers: bool = False
    gathers_stored: bool = True
    sums: Literal["all-reduce", "reduce-scatter"] = "all-reduce"
    sums_once: bool = False
    stages_recompute: bool = True
    full_buffers: bool = True
    passes: float = 1.0


OURS = Implementation()
